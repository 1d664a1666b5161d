"""The FP8 schemes: which elements share a scale, in weights and in activations.

e4m3 throughout (largest value 448, no infinity). The formulas are `moe_core.formats`; a scale means x ≈ q · scale.
"""

from __future__ import annotations

import attrs

from moe_core.quant import QuantScheme, QuantSpec, ScaleFormat

_E4M3 = "float8_e4m3fn"
_TENSOR, _ROW = (-1, -1), (1, -1)


def block_scheme(block: tuple[int, int], scale_format: ScaleFormat) -> QuantScheme:
    """Weights in blocks (rows, columns), activations in groups of as many columns: DeepSeek-V3's recipe."""
    return QuantScheme(
        "fp8_block" if scale_format is ScaleFormat.FP32 else "fp8_block_ue8m0",
        QuantSpec(_E4M3, block, scale_format),
        QuantSpec(_E4M3, (1, block[1]), scale_format, dynamic=True),
    )


FP8_BLOCK = block_scheme((128, 128), ScaleFormat.FP32)
"""DeepSeek-V3 and R1: 128×128 weight blocks, activations in groups of 1×128."""
FP8_BLOCK_UE8M0 = block_scheme((128, 128), ScaleFormat.UE8M0)
"""DeepSeek-V3.1: the same with power-of-two scales."""
FP8_TENSOR = QuantScheme("fp8_tensor", QuantSpec(_E4M3, _TENSOR), QuantSpec(_E4M3, _TENSOR))
"""One scale for each projection, and one for its input, from the checkpoint (ModelOpt FP8)."""
FP8_TENSOR_DYNAMIC = QuantScheme(
    "fp8_tensor_dynamic", QuantSpec(_E4M3, _TENSOR), QuantSpec(_E4M3, _TENSOR, dynamic=True)
)
"""The same with the input's scale from the rows that an expert gets."""
FP8_CHANNEL = QuantScheme("fp8_channel", QuantSpec(_E4M3, _ROW), QuantSpec(_E4M3, _ROW, dynamic=True))
"""A scale for each output channel, and one for each token (compressed-tensors, "FP8 dynamic")."""
FP8_WEIGHT_ONLY = QuantScheme("fp8_weight_only", QuantSpec(_E4M3, _ROW))
"""FP8 weights, activations as they are. From a checkpoint: with the checkpoint's own weight scales, of any shape."""

SCHEMES = (FP8_BLOCK, FP8_BLOCK_UE8M0, FP8_TENSOR, FP8_TENSOR_DYNAMIC, FP8_CHANNEL, FP8_WEIGHT_ONLY)
ROW_WISE = frozenset(s.name for s in SCHEMES if s.activation is not None and s.activation.row_wise)
"""Schemes whose rows a dispatch may quantize before they reach the experts."""


def weight_only(scheme: QuantScheme) -> QuantScheme:
    """The same weights without quantized activations."""
    return attrs.evolve(FP8_WEIGHT_ONLY, weight=scheme.weight)
