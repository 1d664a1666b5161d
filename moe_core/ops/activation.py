"""The function between an expert's two GEMMs: its description in primitive values, and its torch twin.

I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

GATED_FUNCTIONS = ("silu", "gelu", "gelu_tanh", "swiglu_oai")
UNGATED_FUNCTIONS = ("silu", "gelu", "relu2")
GATE_UP_LAYOUTS = ("gate_up", "up_gate", "interleaved")


@dataclass(frozen=True)
class Activation:
    """With gate g and up u: "silu" g·σ(g)·u, "gelu" and "gelu_tanh" gelu(g)·u, "swiglu_oai" g·σ(alpha·g)·(u + 1).

    Without a gate: "silu", "gelu" (erf), "relu2" relu(h)².

    Attributes:
        function: one of the names above.
        gate_up_layout: the order of the 2I rows of w13: "gate_up" and "up_gate" (halves), "interleaved" (gate, up,
            gate, …); None: no gate, w13 has I rows.
        limit: g is clamped to at most `limit`, u to [-limit, limit], before the function; None: no clamp.
        alpha: of "swiglu_oai" only.
    """

    function: str = "silu"
    gate_up_layout: str | None = "gate_up"
    limit: float | None = None
    alpha: float = 1.702

    def __post_init__(self) -> None:
        if self.gate_up_layout is not None and self.gate_up_layout not in GATE_UP_LAYOUTS:
            raise ValueError(
                f"Activation.gate_up_layout = {self.gate_up_layout!r}; legal values: {', '.join(GATE_UP_LAYOUTS)}, None"
            )
        legal = GATED_FUNCTIONS if self.gated else UNGATED_FUNCTIONS
        if self.function not in legal:
            raise ValueError(
                f"Activation.function = {self.function!r} with gate_up_layout = {self.gate_up_layout!r}; "
                f"legal values: {', '.join(legal)}"
            )
        if self.limit is not None and not (self.gated and self.limit > 0):
            raise ValueError(f"Activation.limit = {self.limit!r}; legal values: None, or > 0 with a gate")

    @property
    def gated(self) -> bool:
        """Whether w13 holds gate and up rows (2I) and not I rows."""
        return self.gate_up_layout is not None

    def constants(self) -> dict[str, Any]:
        """The kernels' constants for it, the order of gate and up included."""
        return {
            "ACT": self.function,
            "GATED": self.gated,
            "INTERLEAVED": self.gate_up_layout == "interleaved",
            "UP_FIRST": self.gate_up_layout == "up_gate",
            "ALPHA": self.alpha,
            "LIMIT": 0.0 if self.limit is None else self.limit,
        }


def activate_torch(h: torch.Tensor, activation: Activation) -> torch.Tensor:
    """`[..., 2I]` (without a gate `[..., I]`) to `[..., I]`, in the dtype of `h`; float32 is meant."""
    function = activation.function
    if not activation.gated:
        if function == "relu2":
            return torch.relu(h).square()
        return torch.nn.functional.silu(h) if function == "silu" else torch.nn.functional.gelu(h)
    if activation.gate_up_layout == "interleaved":
        gate, up = h[..., 0::2], h[..., 1::2]
    else:
        gate, up = h.chunk(2, dim=-1)
        if activation.gate_up_layout == "up_gate":
            gate, up = up, gate
    if activation.limit is not None:
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
    if function == "swiglu_oai":
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    if function == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if function == "gelu_tanh" else "none") * up
