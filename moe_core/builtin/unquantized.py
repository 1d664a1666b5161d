"""The quantization method of weights that are not quantized.

Shape letters: E_l local experts · H hidden · I intermediate per rank.
"""

from __future__ import annotations

import torch

from moe_core.errors import CheckpointError
from moe_core.quant import UNQUANTIZED, QuantMethod, WeightsOwner
from moe_core.types import GateUpLayout

_PARTS = ("gate", "up", "down")


class UnquantizedMethod(QuantMethod):
    """w13 `[E_l, 2I, H]` (`[E_l, I, H]` without a gate) and w2 `[E_l, H, I]` in the model dtype, biases beside them."""

    scheme = UNQUANTIZED

    def create_weights(self, layer: WeightsOwner) -> None:
        experts, hidden, inner = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
        activation = layer.config.activation
        rows = 2 * inner if activation.gated else inner
        shapes: dict[str, tuple[int, ...]] = {"w13": (experts, rows, hidden), "w2": (experts, hidden, inner)}
        if activation.bias:
            shapes |= {"w13_bias": (experts, rows), "w2_bias": (experts, hidden)}
        for name, shape in shapes.items():
            # zeros, not empty: rows and columns that pad H must be zero, and stay so
            layer.register_weight(name, torch.zeros(shape, dtype=layer.config.dtype, device=layer.device))

    def load_expert(self, layer: WeightsOwner, expert: int, name: str, tensor: torch.Tensor) -> None:
        target = self._target(layer, expert, name)
        inner, hidden = layer.intermediate_size, layer.config.hidden_size
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        expected: tuple[int, ...] = shapes[name.removesuffix("_bias")]
        if name.endswith("_bias"):
            expected = expected[:1]
        if tuple(tensor.shape) != expected:
            raise CheckpointError(f"expert tensor {name!r} has shape {tuple(tensor.shape)}; expected {expected}")
        target[tuple(slice(extent) for extent in expected)].copy_(tensor)

    def _target(self, layer: WeightsOwner, expert: int, name: str) -> torch.Tensor:
        """The part of the layer's storage that a checkpoint tensor goes to."""
        part, bias = name.removesuffix("_bias"), name.endswith("_bias")
        layout = layer.config.activation.gate_up_layout
        if part not in _PARTS:
            known = ", ".join(_PARTS)
            raise CheckpointError(f"expert tensor {name!r}: unquantized experts have {known} and their _bias")
        if bias and not layer.config.activation.bias:
            raise CheckpointError(f"expert tensor {name!r}, but the layer's activation declares no bias")
        if part == "gate" and layout is None:
            raise CheckpointError(f"expert tensor {name!r}, but the layer's activation has no gate")
        suffix = "_bias" if bias else ""
        whole: torch.Tensor = layer.get_parameter(("w2" if part == "down" else "w13") + suffix).data[expert]
        if part == "down" or layout is None:
            return whole
        if layout is GateUpLayout.INTERLEAVED:
            return whole[0 if part == "gate" else 1 :: 2]
        inner = layer.intermediate_size
        first = (part == "gate") == (layout is GateUpLayout.GATE_UP)
        return whole[:inner] if first else whole[inner:]

    def pack_weights(self, layer: WeightsOwner) -> None:
        """Nothing to do: experts read this layout as it is."""
