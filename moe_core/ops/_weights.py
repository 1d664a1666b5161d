"""What the kernels need to know about one layer's weights, read once when they are bound.

H hidden · I intermediate · E_l local experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_core.ops.activation import Activation

TMA_ALIGNMENT = 16  # bytes: base address and every stride but the last of a tensor map


def unit_dim(weight: torch.Tensor, name: str) -> str:
    """Which of the last two dims is contiguous: "k" (the last) or "n" (the one before it)."""
    if weight.stride(2) == 1 or weight.shape[2] == 1:
        return "k"
    if weight.stride(1) == 1 or weight.shape[1] == 1:
        return "n"
    raise ValueError(
        f"{name} has strides {tuple(weight.stride())}: one of its last two dims must have stride 1; "
        f"pass the parameter itself or a transposed view of it"
    )


def tensor_map_fits(weight: torch.Tensor) -> bool:
    """Whether the strides and the address of `weight` suit a tensor map (Hopper's bulk copies)."""
    size = weight.element_size()
    strides = [s for s in weight.stride() if s != 1]
    # A dim of one row may carry any stride; the map then needs one that fits, which is not worth a special case.
    return weight.data_ptr() % TMA_ALIGNMENT == 0 and all(s > 0 and s * size % TMA_ALIGNMENT == 0 for s in strides)


def experts_are_neighbours(weight: torch.Tensor) -> bool:
    """Whether all rows of [E_l, rows, columns] stand at one stride, so that halves of experts, or all experts' rows,
    may be one dim of a tensor map; weights with contiguous rows in the other dim need it not."""
    return weight.stride(2) != 1 or weight.stride(0) == weight.shape[1] * weight.stride(1)


@dataclass(frozen=True)
class LayerWeights:
    """One layer's experts: `w13 [E_l, 2I, H]` (without a gate `[E_l, I, H]`), `w2 [E_l, H, I]`, any strides with one
    unit stride in the last two dims; `bias13 [E_l, 2I]` and `bias2 [E_l, H]`, contiguous, or None."""

    w13: torch.Tensor
    w2: torch.Tensor
    bias13: torch.Tensor | None
    bias2: torch.Tensor | None
    activation: Activation

    def __post_init__(self) -> None:
        for name, tensor, dims in (("w13", self.w13, 3), ("w2", self.w2, 3)):
            if tensor.dim() != dims:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; {dims} dims are expected, [E_l, rows, columns]"
                )
        experts, rows, hidden = self.w13.shape
        intermediate = rows // 2 if self.activation.gated else rows
        if (self.activation.gated and rows % 2) or tuple(self.w2.shape) != (experts, hidden, intermediate):
            raise ValueError(
                f"w13 {tuple(self.w13.shape)} and w2 {tuple(self.w2.shape)} do not fit "
                f"gate_up_layout = {self.activation.gate_up_layout!r}; expected w13 [E_l, "
                f"{'2I' if self.activation.gated else 'I'}, H] and w2 [E_l, H, I]"
            )
        if self.w13.dtype != self.w2.dtype or self.w13.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(
                f"w13 is {self.w13.dtype}, w2 is {self.w2.dtype}; both must be bfloat16, float16 or float32"
            )
        for name, bias, shape in (("bias13", self.bias13, (experts, rows)), ("bias2", self.bias2, (experts, hidden))):
            if bias is not None and (tuple(bias.shape) != shape or not bias.is_contiguous()):
                raise ValueError(f"{name} has shape {tuple(bias.shape)}; a contiguous {list(shape)} is expected")

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.w13.shape[2]

    @property
    def intermediate_size(self) -> int:
        return self.w2.shape[2]

    def activation_constants(self) -> dict[str, Any]:
        """The kernels' constants for the activation and the order of gate and up."""
        return self.activation.constants()


def stride_constants(weight: torch.Tensor) -> dict[str, int]:
    """The kernels' constants for the strides of `weight [E_l, rows, columns]`."""
    return {"WE": weight.stride(0), "WN": weight.stride(1), "WK": weight.stride(2)}
