"""What the FP8 kernels need to know about one layer's weights, read once when they are bound.

H hidden · I intermediate · E_l local experts · P halves of w13 (2, or 1 without a gate).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_core.ops.activation import Activation

FP8_GROUP = 128
"""Columns that share a scale in groups of activations, rows and columns in blocks of weights."""

FP8_ALIGNMENT = 16  # bytes, so e4m3 columns: of every row's start, for tensor maps and loads of 16 bytes
WEIGHTS = ("block", "tensor", "channel")
ACTIVATIONS = ("group", "row", "static", "tensor", None)


@dataclass(frozen=True)
class Fp8Format:
    """Which elements share a scale.

    Attributes:
        weights: "block" (128 × 128), "tensor" (each projection) or "channel" (each row).
        activations: "group" (1 × 128), "row", "tensor" (the rows that one expert gets), all with scales from the data;
            "static" (each projection's input, a scale from the checkpoint); None: not quantized.
        power_of_two: scales of activations are rounded up to powers of two.
    """

    weights: str
    activations: str | None
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS or self.activations not in ACTIVATIONS:
            raise ValueError(f"{self!r}; legal weights: {WEIGHTS}, activations: {ACTIVATIONS}")
        if self.activations == "group" and self.weights != "block":
            raise ValueError(f"{self!r}: scales of groups are applied block by block; weights 'block' go with them")
        if self.weights == "block" and self.activations not in ("group", None):
            raise ValueError(f"{self!r}: with weights in blocks, activations are quantized in groups or not at all")

    @property
    def by_expert(self) -> bool:
        """An expert's input has one scale, so a token is quantized anew for each of its experts."""
        return self.activations in ("static", "tensor")

    def scale_columns(self, length: int) -> int:
        """How many scales a row of activations has in x_scale."""
        return -(-length // FP8_GROUP) if self.activations == "group" else 1


@dataclass(frozen=True)
class Fp8Weights:
    """One layer's packed experts.

    Attributes:
        w13, w2: float8_e4m3fn `[E_l, P·I, H]`, `[E_l, H, I]`, contiguous.
        scale13, scale2: float32. "block" `[E_l, P, ⌈I/128⌉, ⌈H/128⌉]`, `[E_l, ⌈H/128⌉, ⌈I/128⌉]`; "tensor"
            `[E_l, P, 1, 1]`, `[E_l, 1, 1]`; "channel" `[E_l, P·I, 1]` (rows as in w13), `[E_l, H, 1]`.
        format, activation: see there.
        bias13, bias2: `[E_l, P·I]`, `[E_l, H]`, or None.
        input13, input2: float32 `[E_l, P]`, `[E_l, 1]`: scales of "static" activations, else None.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    scale13: torch.Tensor
    scale2: torch.Tensor
    format: Fp8Format
    activation: Activation
    bias13: torch.Tensor | None = None
    bias2: torch.Tensor | None = None
    input13: torch.Tensor | None = None
    input2: torch.Tensor | None = None

    def __post_init__(self) -> None:
        experts, rows, hidden = self.w13.shape
        halves = 2 if self.activation.gated else 1
        inner = rows // halves
        grids: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
            "block": ((experts, halves, -(-inner // FP8_GROUP), -(-hidden // FP8_GROUP)),
                      (experts, -(-hidden // FP8_GROUP), -(-inner // FP8_GROUP))),
            "tensor": ((experts, halves, 1, 1), (experts, 1, 1)),
            "channel": ((experts, rows, 1), (experts, hidden, 1)),
        }  # fmt: skip
        expected: dict[str, tuple[torch.Tensor | None, tuple[int, ...], torch.dtype]] = {
            "w13": (self.w13, (experts, halves * inner, hidden), torch.float8_e4m3fn),
            "w2": (self.w2, (experts, hidden, inner), torch.float8_e4m3fn),
            "scale13": (self.scale13, grids[self.format.weights][0], torch.float32),
            "scale2": (self.scale2, grids[self.format.weights][1], torch.float32),
        }
        if self.format.activations == "static":
            expected["input13"] = (self.input13, (experts, halves), torch.float32)
            expected["input2"] = (self.input2, (experts, 1), torch.float32)
        for name, (tensor, shape, dtype) in expected.items():
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
                found = "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ValueError(f"{name} is {found}; {self.format} expects a contiguous {list(shape)} {dtype}")
        for name, size in (("H", hidden), ("I", inner)):
            if size % FP8_ALIGNMENT:
                raise ValueError(f"{name} = {size}; FP8 kernels read rows of a multiple of {FP8_ALIGNMENT} columns")
        for name, bias, size in (("bias13", self.bias13, rows), ("bias2", self.bias2, hidden)):
            if bias is not None and (tuple(bias.shape) != (experts, size) or not bias.is_contiguous()):
                raise ValueError(f"{name} has shape {tuple(bias.shape)}; a contiguous {[experts, size]} is expected")

    @property
    def plain(self) -> bool:
        """silu(gate) · up of two halves, no clamp, no biases: what the specialized kernel computes."""
        a = self.activation
        halves = a.gate_up_layout in ("gate_up", "up_gate")
        return a.function == "silu" and halves and a.limit is None and self.bias13 is None and self.bias2 is None

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.w13.shape[2]

    @property
    def intermediate_size(self) -> int:
        return self.w2.shape[2]

    def halves(self, name: str) -> tuple[Any, Any]:
        """(gate's, up's) part of w13, scale13, bias13 or input13, as views. Without a gate both are the whole.

        So kernels know nothing of the order of gate and up.
        """
        tensor = getattr(self, name)
        layout = self.activation.gate_up_layout
        by_row = name in ("w13", "bias13") or (name == "scale13" and self.format.weights == "channel")
        if tensor is None:
            return None, None
        if layout is None:
            whole = tensor if by_row else tensor[:, 0]
            return whole, whole
        if not by_row:
            first, second = tensor.unbind(1)
        elif layout == "interleaved":
            first, second = tensor[:, 0::2], tensor[:, 1::2]
        else:
            first, second = tensor.chunk(2, dim=1)
        return (second, first) if layout == "up_gate" else (first, second)

    def activation_constants(self) -> dict[str, Any]:
        """The kernels' constants for the activation."""
        a = self.activation
        return {"ACT": a.function, "GATED": a.gated, "ALPHA": a.alpha, "LIMIT": 0.0 if a.limit is None else a.limit}

    def up_constants(self) -> dict[str, int]:
        """Strides of one half of w13 and of what comes with it."""
        w, s = self.halves("w13")[0], self.halves("scale13")[0]
        b, i = self.halves("bias13")[0], self.halves("input13")[0]
        return {
            "WE": w.stride(0), "WN": w.stride(1), "SE": s.stride(0), "SN": s.stride(1),
            "BIE": 0 if b is None else b.stride(0), "BIN": 0 if b is None else b.stride(1),
            "IE": 0 if i is None else i.stride(0),
        }  # fmt: skip

    def down_constants(self) -> dict[str, int]:
        """The same of w2."""
        w, s = self.w2, self.scale2
        return {"WE": w.stride(0), "WN": w.stride(1), "SE": s.stride(0), "SN": s.stride(1)}


def triton_dtype(dtype: torch.dtype) -> Any:
    """A constant of kernels that round to the model dtype before they quantize."""
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
