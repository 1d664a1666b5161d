"""The formulas of `moe_core.formats`: by hand, at their edges, and there and back."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from moe_core import QuantSpec, ScaleFormat, formats

E4M3, E2M1 = "float8_e4m3fn", "float4_e2m1"
SPECS = {
    "tensor": QuantSpec(E4M3, (-1, -1)),
    "row": QuantSpec(E4M3, (1, -1)),
    "group": QuantSpec(E4M3, (1, 128)),
    "group_ue8m0": QuantSpec(E4M3, (1, 128), ScaleFormat.UE8M0),
    "block": QuantSpec(E4M3, (128, 128)),
    "block_ue8m0": QuantSpec(E4M3, (128, 128), ScaleFormat.UE8M0),
    "nvfp4": QuantSpec(E2M1, (1, 16), ScaleFormat.E4M3, second_level=True),
}
NVFP4 = SPECS["nvfp4"]


def top_of(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor | None:
    return formats.global_scale_of(x.float().abs().amax(), spec) if spec.second_level else None


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> QuantSpec:
    return SPECS[request.param]


@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (130, 272), (128, 256), (3, 16)])
def test_there_and_back_is_within_half_a_step_and_a_second_time_exact(spec, rows, columns):
    torch.manual_seed(0)
    spread = 3 if spec.dtype == E4M3 else 1  # e4m3 scales under one global scale span less than fp32 ones
    x = torch.randn(rows, columns) * torch.logspace(-spread, spread, rows).unsqueeze(1)
    top = top_of(x, spec)
    q, scale = formats.quantize(x, spec, global_scale=top)
    assert q.dtype == formats.storage_dtype(spec)
    assert scale.dtype == formats.scale_dtype(spec)
    assert tuple(scale.shape) == formats.scale_shape(spec.group_shape, rows, columns)
    back = formats.dequantize(q, scale, spec, top)
    total = (scale.double() * (1 if top is None else top)).float()
    step = formats._expand(total, spec.group_shape, rows, columns)
    # e4m3: half of 2^-3 relative, at least half the smallest step; e2m1: half of the widest step, which is 2
    bound = torch.maximum(x.abs() / 16, step * 2**-10) if spec.dtype == E4M3 else step
    assert bool(((back - x).abs() <= bound + 1e-30).all())
    again, _ = formats.quantize(back, spec, scale=scale, global_scale=top)
    assert torch.equal(formats.dequantize(again, scale, spec, top), back)


def test_zeros_stay_zeros(spec):
    x = torch.zeros(130, 144)
    x[129] = 1.0  # one group lives, the others are empty
    y = formats.quantize_dequantize(x, spec, global_scale=top_of(x, spec))
    assert bool((y[:128] == 0).all())
    assert bool(y.isfinite().all())
    empty = torch.zeros(2, 144)
    assert torch.equal(formats.quantize_dequantize(empty, spec, global_scale=top_of(empty, spec)), empty)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_inf_and_nan_take_their_whole_group_with_them_and_no_other(spec, bad):
    torch.manual_seed(0)
    x = torch.randn(200, 288)
    top = top_of(x, spec)  # static: a second level that is NaN would be NaN everywhere
    x[130, 40] = bad
    y = formats.quantize_dequantize(x, spec, global_scale=top)
    rows, columns = spec.group_shape
    row = slice(None) if rows == -1 else slice(130 // rows * rows, 130 // rows * rows + rows)
    column = slice(None) if columns == -1 else slice(40 // columns * columns, 40 // columns * columns + columns)
    assert bool(y[row, column].isnan().all())
    y[row, column] = 0.0
    assert bool(y.isfinite().all())


def test_a_static_scale_saturates_what_is_finite_and_passes_nan_on():
    x = torch.tensor([[1e9, -1e9, math.inf, -math.inf, math.nan, 448.0, 464.0, 1e-9]])
    y = formats.quantize_dequantize(x, SPECS["tensor"], scale=torch.ones(1, 1))
    assert y[0, :2].tolist() == [448.0, -448.0]
    assert bool(y[0, 2:5].isnan().all())
    assert y[0, 5:].tolist() == [448.0, 448.0, 0.0]


def test_scales_are_amax_over_the_largest_code_and_divide():
    x = torch.tensor([[0.3, -7.7, 2.0, 0.1]])
    q, scale = formats.quantize(x, QuantSpec(E4M3, (1, 2)))
    expected = torch.tensor([[7.7, 2.0]]) / 448
    assert torch.equal(scale, expected)
    assert torch.equal(q.float(), (x / expected.repeat_interleave(2, 1)).to(torch.float8_e4m3fn).float())


def test_power_of_two_scales_are_the_next_power_up():
    scale = torch.tensor([1.0, 2.0, 1.0000001, 3.0, 0.75, 2**-126, 2**-127, 1e-40, math.inf, math.nan])
    got = formats.round_up_to_power_of_two(scale)
    assert got[:8].tolist() == [1.0, 2.0, 2.0, 4.0, 1.0, 2**-126, 2**-127, 2**-132]
    assert bool(got[8:].isnan().all())
    exact = torch.exp2(torch.arange(-120.0, 120))
    assert torch.equal(formats.round_up_to_power_of_two(exact), exact)


def test_every_ue8m0_byte():
    codes = torch.arange(256, dtype=torch.uint8)
    got = formats.decode_ue8m0(codes)
    assert torch.equal(got[:255].double(), torch.exp2(torch.arange(255, dtype=torch.float64) - 127))
    assert got[255].isnan()
    assert torch.equal(formats.decode_ue8m0(codes.view(torch.float8_e8m0fnu))[:255], got[:255])


def test_every_e2m1_byte_unpacks_low_nibble_first_and_packs_back():
    packed = torch.arange(256, dtype=torch.uint8)
    values = formats.unpack_e2m1(packed.unsqueeze(0))
    assert values[0, 2 * 0x72 : 2 * 0x72 + 2].tolist() == [1.0, 6.0]
    assert torch.equal(formats.pack_e2m1(values)[0], packed)


def test_e2m1_rounds_to_nearest_ties_to_the_even_code():
    grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for code, (low, high) in enumerate(itertools.pairwise(grid)):
        middle = (low + high) / 2
        x = torch.tensor([middle, math.nextafter(middle, 0) - 1e-6, middle + 1e-6, -middle])
        even = low if code % 2 == 0 else high
        assert formats.unpack_e2m1(formats.pack_e2m1(x)).tolist() == [even, low, high, -even]
    assert formats.unpack_e2m1(formats.pack_e2m1(torch.tensor([100.0, -math.inf]))).tolist() == [6.0, -6.0]


def test_an_inverse_global_scale_divides_to_the_same_bits():
    """fp64 between the levels: x · (1 / g) rounds to what x / g is in fp32, for every e4m3 scale."""
    torch.manual_seed(0)
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for inverse in (torch.rand(300) * 10000 + 1e-3).split(1):
        top = 1 / inverse.double()
        assert torch.equal(formats._total_scale(scales, NVFP4, top), scales.float() / inverse)


def test_a_group_whose_scale_underflows_is_zero():
    x = torch.full((1, 32), 1e-6)
    x[0, 16] = 1e4
    y = formats.quantize_dequantize(x, NVFP4, global_scale=top_of(x, NVFP4))
    assert bool((y[0, :16] == 0).all())
    assert y[0, 16] == pytest.approx(1e4)


def test_a_format_without_a_formula_is_refused_by_name():
    with pytest.raises(ValueError, match=r"float6_e3m2.*float8_e4m3fn, float4_e2m1"):
        formats.storage_dtype(QuantSpec("float6_e3m2", (1, 32)))
