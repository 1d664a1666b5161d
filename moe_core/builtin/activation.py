"""The function between an expert's two GEMMs, on workspaces that the caller owns.

Shape letters: M rows of one expert (or of all) · I intermediate per rank.
"""

from __future__ import annotations

import torch

from moe_core.config import ActivationSpec
from moe_core.types import GateUpLayout


def split_gate_up(h: torch.Tensor, layout: GateUpLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the gate and the up part, each `[..., I]`, of `h` `[..., 2I]`."""
    if layout is GateUpLayout.INTERLEAVED:
        return h[..., 0::2], h[..., 1::2]
    half = h.shape[-1] // 2
    first, second = h.narrow(-1, 0, half), h.narrow(-1, half, half)
    return (first, second) if layout is GateUpLayout.GATE_UP else (second, first)


def activate(spec: ActivationSpec, layout: GateUpLayout | None, h: torch.Tensor, out: torch.Tensor) -> None:
    """`out = f(h)`. Nothing is allocated; `h` is scratch and holds anything afterwards.

    Args:
        spec: which function, with its limit and alpha.
        layout: of the weights that made `h`, which packing may have changed; None without a gate.
        h: `[..., 2I]` (`[..., I]` without a gate), any strides.
        out: `[..., I]`, any strides, no overlap with `h`.
    """
    if layout is None:
        _ungated(spec.function, h, out)
        return
    gate, up = split_gate_up(h, layout)
    if spec.limit is not None:
        gate.clamp_(max=spec.limit)
        up.clamp_(-spec.limit, spec.limit)
    if spec.function == "silu":
        torch.ops.aten.silu.out(gate, out=out)
    elif spec.function == "gelu":
        torch.ops.aten.gelu.out(gate, approximate="none", out=out)
    elif spec.function == "gelu_tanh":
        torch.ops.aten.gelu.out(gate, approximate="tanh", out=out)
    else:
        assert spec.function == "swiglu_oai", f"unknown gated function {spec.function!r}"
        torch.mul(gate, spec.alpha, out=out)
        out.sigmoid_().mul_(gate)
        up.add_(1)
    out.mul_(up)


def _ungated(function: str, h: torch.Tensor, out: torch.Tensor) -> None:
    if function == "silu":
        torch.ops.aten.silu.out(h, out=out)
    elif function == "gelu":
        torch.ops.aten.gelu.out(h, approximate="none", out=out)
    else:
        assert function == "relu2", f"unknown function without a gate {function!r}"
        torch.mul(h.relu_(), h, out=out)
