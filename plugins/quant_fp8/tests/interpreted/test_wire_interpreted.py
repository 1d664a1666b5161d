"""Rows quantized by the kernel, as a GPU does before they travel, have the bits of `formats`."""

import pytest
import torch

from moe_core import formats
from moe_core.quant import QuantSpec, ScaleFormat
from moe_core.wire import row_kernel, run_row_kernel

E4M3 = "float8_e4m3fn"
SPECS = {
    "by 128": QuantSpec(E4M3, (1, 128), dynamic=True),
    "by 128, powers of two": QuantSpec(E4M3, (1, 128), ScaleFormat.UE8M0, dynamic=True),
    "by row": QuantSpec(E4M3, (1, -1), dynamic=True),
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_bits_are_the_formats(spec, dtype):
    wide = torch.randn(9, 320, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 9)[:, None]
    wide[1], wide[2, 5], wide[3, 200] = 0, torch.inf, torch.nan
    x = wide.to(dtype)[:, :296]  # rows further apart than they are long, and a ragged last group
    q, scale = run_row_kernel(row_kernel(296, spec), x, spec)
    wanted, wanted_scale = formats.quantize(x, spec)
    assert (q.shape, q.dtype, scale.shape, scale.dtype) == (
        wanted.shape, wanted.dtype, wanted_scale.shape, wanted_scale.dtype,
    )  # fmt: skip
    finite = wanted.float().isfinite()
    assert torch.equal(q.float()[finite], wanted.float()[finite])
    assert torch.equal(q.float().isfinite(), finite)
    assert torch.equal(scale.nan_to_num(-1), wanted_scale.nan_to_num(-1))


def test_no_rows_and_formats_without_a_kernel():
    spec = SPECS["by 128"]
    q, scale = run_row_kernel(row_kernel(256, spec), torch.empty(0, 256), spec)
    assert (tuple(q.shape), tuple(scale.shape)) == ((0, 256), (0, 2))
    assert row_kernel(256, QuantSpec(E4M3, (1, 64), dynamic=True)) is None
    assert row_kernel(256, QuantSpec("float4_e2m1", (1, 128), dynamic=True)) is None
