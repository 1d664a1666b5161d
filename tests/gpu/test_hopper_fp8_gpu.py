"""The rule of `tests/quant/hopper_fp8.py` beside the device that it describes, bit by bit."""

from __future__ import annotations

import pytest
import torch

from tests.quant.hopper_fp8 import UNIT_ROWS, in_float64, matrix_unit

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402 - after the skip where there is none

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU (compute capability 9.0)")


@triton.jit
def product_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, L: tl.constexpr):
    """out [M, N] = a [M, L] @ b [N, L].T in one call of the matrix unit's."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, L)
    rows = tl.load(a + m[:, None] * L + k[None, :])
    columns = tl.load(b + n[None, :] * L + k[:, None])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(rows, columns))


def codes(rows: int, length: int, spread: float, seed: int) -> torch.Tensor:
    """Random e4m3 codes of 2^(±spread) around 8, subnormal and largest ones among them."""
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(2, rows, length, generator=generator, device="cuda")
    return (8 * values[0] * torch.exp2(spread * values[1])).clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("length", [32, 64, 128])
@pytest.mark.parametrize("spread", [0, 2, 4])
def test_sums_are_cut_in_tiles_of_64_rows_and_not_in_smaller_ones(spread, length):
    for rows in (16, 32, 64, 128):
        a, b = codes(rows, length, spread, 1), codes(64, length, spread, 2)
        out = torch.empty(rows, 64, device="cuda")
        product_kernel[(1,)](a, b, out, rows, 64, length, num_warps=4)
        if rows >= UNIT_ROWS:
            assert torch.equal(out.double(), matrix_unit(a, b))
        else:
            terms = a.double().abs() @ b.double().abs().T
            assert bool(((out - in_float64(a, b)).abs() <= 2**-20 * terms).all())
