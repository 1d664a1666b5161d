"""The one formula of each quantizer: what the bytes of a packed tensor stand for, and how values become such bytes.

Shape letters: N rows · K columns of a matrix (not top-k, in this file) · G columns of a group.

Everything here is exact torch arithmetic on any device, and the truth that kernels are compared with. What is agreed:

- A scale means x ≈ q · scale; values are divided by it (never multiplied by its reciprocal), in fp32.
- The scale of a group is amax / (largest code): 448 for e4m3, 6 for e2m1. amax is raised to `AMAX_FLOOR` first, so a
  group of zeros has a scale to divide by.
- Rounding is to nearest, ties to even. Finite values that are too large saturate; Inf and NaN become NaN.
- A group that holds Inf or NaN gets the scale NaN, so all of it comes back as NaN: propagated, never hidden.
- Power-of-two scales are the fp32 scale rounded up to the next power of two, so nothing saturates.
- Two levels (NVFP4): the group scale is e4m3, of (amax / 6) · (1 / global scale), and what divides is the product of
  both, rounded to fp32 once. A group whose scale rounds to zero is zero.

Sources, checked bit by bit in tests: DeepSeek-V3's block FP8, compressed-tensors (float-quantized, nvfp4-pack-
quantized), ModelOpt (FP8, NVFP4), OCP Microscaling 1.0 (e2m1, UE8M0).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_core.quant import QuantSpec, ScaleFormat

E4M3_MAX = 448.0
E2M1_MAX = 6.0
AMAX_FLOOR = 1e-10
"""As in vLLM's and SGLang's group quantizers. DeepSeek's first one had none, and divided zeros by zero."""

_FP8, _FP4 = "float8_e4m3fn", "float4_e2m1"
_LARGEST = {_FP8: E4M3_MAX, _FP4: E2M1_MAX}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_UE8M0_BIAS = 127

Group = tuple[int, int]


def storage_dtype(spec: QuantSpec) -> torch.dtype:
    """What packed elements are stored as: fp8 as itself, two fp4 codes in a uint8."""
    _largest(spec)
    return torch.uint8 if spec.dtype == _FP4 else torch.float8_e4m3fn


def codes_per_byte(spec: QuantSpec) -> int:
    """Elements along K in one stored element."""
    return 2 if spec.dtype == _FP4 else 1


def scale_dtype(spec: QuantSpec) -> torch.dtype:
    """What group scales are held as: e4m3 as itself, all others in fp32 (which holds every power of two)."""
    return torch.float8_e4m3fn if spec.scale_format is ScaleFormat.E4M3 else torch.float32


def scale_shape(group: Group, rows: int, columns: int) -> tuple[int, int]:
    """The grid of groups over a matrix `[rows, columns]`; the last group of a ragged one is smaller."""
    size = _resolve(group, rows, columns)
    return -(-rows // size[0]), -(-columns // size[1])


def dequantize(
    q: torch.Tensor, scale: torch.Tensor, spec: QuantSpec, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Packed values as fp32.

    Args:
        q: `[..., N, K]` float8_e4m3fn, or `[..., N, K / 2]` uint8, two codes a byte, the low nibble first.
        scale: the grid of `scale_shape`, `[..., N / group rows, K / G]`, fp32 or e4m3.
        spec: the format.
        global_scale: one element, or what broadcasts with `scale`; exactly where the format has a second level.

    Returns:
        `[..., N, K]` float32: fp8 as q · s, fp4 as code · (s · global), each product rounded once.
    """
    values = q.to(torch.float32) if spec.dtype == _FP8 else unpack_e2m1(q)
    total = _expand(_total_scale(scale, spec, global_scale), spec.group_shape, values.shape[-2], values.shape[-1])
    return values * total


def quantize(
    x: torch.Tensor,
    spec: QuantSpec,
    *,
    scale: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values as packed elements and group scales; `dequantize` is the way back.

    Args:
        x: `[..., N, K]` in any floating dtype. Read as fp32.
        spec: the format.
        scale: static group scales; None: from the data.
        global_scale: as for `dequantize`.

    Returns:
        (q, scale), of `storage_dtype` and `scale_dtype`.
    """
    x = x.to(torch.float32)
    if scale is None:
        scale = scale_of(group_amax(x, spec.group_shape), spec, global_scale)
    total = _expand(_total_scale(scale, spec, global_scale), spec.group_shape, x.shape[-2], x.shape[-1])
    scaled = x / total
    if spec.dtype == _FP8:
        return to_e4m3(scaled), scale
    return pack_e2m1(torch.where(total == 0, 0.0, scaled)), scale


def quantize_dequantize(
    x: torch.Tensor,
    spec: QuantSpec,
    *,
    scale: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a format makes of values, as fp32: the emulation of a quantized GEMM's input."""
    q, scale = quantize(x, spec, scale=scale, global_scale=global_scale)
    return dequantize(q, scale, spec, global_scale)


def scale_of(amax: torch.Tensor, spec: QuantSpec, global_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Group scales from group maxima (fp32), in `scale_dtype`."""
    # By a tensor: on CUDA, torch multiplies by the reciprocal of a number, which loses a bit.
    quotient = amax.clamp(min=AMAX_FLOOR) / torch.full_like(amax, _largest(spec))
    scale = torch.where(amax.isfinite(), quotient, torch.nan)
    if spec.scale_format is ScaleFormat.UE8M0:
        return round_up_to_power_of_two(scale)
    if spec.scale_format is ScaleFormat.FP32:
        return scale
    assert global_scale is not None, "an e4m3 scale stands under a global scale"
    # 1 / global in fp64 and then fp32 gives a checkpoint's own inverse back, bit by bit
    return to_e4m3(scale * (1 / global_scale.to(torch.float64)).to(torch.float32))


def global_scale_of(amax: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The second-level scale of a tensor by its largest magnitude (fp32): amax / (largest code · 448), as float64."""
    return (amax.clamp(min=AMAX_FLOOR) / (_largest(spec) * E4M3_MAX)).to(torch.float64)


def group_amax(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The largest magnitude in each group of `x [..., N, K]`: the grid of `scale_shape`. NaN where one is in it."""
    rows, columns = x.shape[-2:]
    size = _resolve(group, rows, columns)
    grid = scale_shape(group, rows, columns)
    magnitudes = F.pad(x.abs(), (0, grid[1] * size[1] - columns, 0, grid[0] * size[0] - rows))
    return magnitudes.unflatten(-1, (grid[1], size[1])).unflatten(-3, (grid[0], size[0])).amax(dim=(-3, -1))


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """fp32 → float8_e4m3fn: nearest, ties to even; finite values saturate, Inf and NaN become NaN."""
    clamped = x.clamp(-E4M3_MAX, E4M3_MAX)  # NaN passes; beyond 464 some versions of torch make NaN
    return torch.where(x.isinf(), torch.nan, clamped).to(torch.float8_e4m3fn)


def decode_ue8m0(exponents: torch.Tensor) -> torch.Tensor:
    """Power-of-two scales, uint8 or float8_e8m0fnu, as fp32: the byte b is 2^(b - 127), 255 is NaN."""
    codes = exponents.view(torch.uint8).to(torch.int32)
    powers = torch.ldexp(torch.ones_like(codes, dtype=torch.float64), codes - _UE8M0_BIAS)
    return torch.where(codes == 255, torch.nan, powers).to(torch.float32)


def round_up_to_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The least power of two that is not below a positive fp32 scale; NaN for NaN and Inf."""
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa · 2^exponent, 0.5 ≤ mantissa < 1
    power = torch.ldexp(torch.ones_like(mantissa), torch.where(mantissa == 0.5, exponent - 1, exponent))
    return torch.where(scale.isfinite(), power, torch.nan)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """uint8 `[..., K / 2]` → fp32 `[..., K]`: the low nibble is the even element."""
    table = torch.tensor(_E2M1, device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return table[codes.to(torch.int64)]


def pack_e2m1(x: torch.Tensor) -> torch.Tensor:
    """fp32 `[..., K]` → uint8 `[..., K / 2]`: nearest, ties to the even code, saturating.

    There is no NaN among 16 codes: it becomes 0 here, and the scale of its group carries it on.
    """
    magnitude, code = x.abs(), torch.signbit(x).to(torch.uint8) << 3
    for i, midpoint in enumerate(_E2M1_MIDPOINTS):
        # A tie belongs to the even code: below midpoint i lies code i, so the tie rounds up where i is odd.
        code += magnitude >= midpoint if i % 2 else magnitude > midpoint
    pairs = code.unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def _largest(spec: QuantSpec) -> float:
    if spec.dtype not in _LARGEST:
        raise ValueError(f"QuantSpec.dtype = {spec.dtype!r}; formats that have a formula: {', '.join(_LARGEST)}")
    return _LARGEST[spec.dtype]


def _total_scale(scale: torch.Tensor, spec: QuantSpec, global_scale: torch.Tensor | None) -> torch.Tensor:
    """Both levels as one, fp32. In fp64, (s · (1 / inverse)) rounds to the very bits of (s / inverse) in fp32."""
    assert (global_scale is not None) == spec.second_level, "a global scale exactly where the format has one"
    if global_scale is None:
        return scale.to(torch.float32)
    return (scale.to(torch.float64) * global_scale.to(torch.float64)).to(torch.float32)


def _resolve(group: Group, rows: int, columns: int) -> Group:
    """-1 is the whole extent; an empty extent has no groups."""
    return (max(rows, 1) if group[0] == -1 else group[0]), (max(columns, 1) if group[1] == -1 else group[1])


def _expand(scale: torch.Tensor, group: Group, rows: int, columns: int) -> torch.Tensor:
    """A grid of scales as what broadcasts over `[..., rows, columns]`, ragged ends cut off."""
    size = _resolve(group, rows, columns)
    grid = scale_shape(group, rows, columns)
    assert tuple(scale.shape[-2:]) == grid, f"scales {tuple(scale.shape)} for a grid of {grid}"
    if grid[1] > 1:
        scale = scale.repeat_interleave(size[1], dim=-1)[..., :columns]
    if grid[0] > 1 and size[0] > 1:
        scale = scale.repeat_interleave(size[0], dim=-2)[..., :rows, :]
    return scale
