"""What needs no other rank: rows that are quantized as they are sent, and the counts that become places."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from moe_core import formats
from moe_core.quant import QuantSpec, ScaleFormat
from moe_symm.kernels import dispatch

PITCH = 1408


@triton.jit
def send_rows(x, rows, scales, H: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    row = tl.program_id(0)
    dispatch._send_quantized(x + row * H, rows + row * 1408, scales + row * G, row != 1, H, BLOCK, 128, POWER_OF_TWO)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("scales", [ScaleFormat.FP32, ScaleFormat.UE8M0])
@pytest.mark.parametrize(("hidden", "block"), [(77, 128), (384, 512), (1300, 1024)])
def test_rows_have_the_bits_of_the_formats(hidden, block, scales):
    x = torch.randn(4, hidden, generator=torch.Generator().manual_seed(0)) * 100
    x[2, 5], x[3, :] = torch.inf, 0
    spec = QuantSpec("float8_e4m3fn", (1, 128), scales, dynamic=True)
    wanted, wanted_scale = formats.quantize(x, spec)
    groups = wanted_scale.shape[1]
    rows, found = torch.full((4, PITCH), 7, dtype=torch.uint8), torch.full((4, groups), 7.0)
    send_rows[(4,)](x, rows, found, hidden, block, groups, scales is ScaleFormat.UE8M0)
    sent = torch.tensor([0, 2, 3])
    assert torch.equal(found[sent].nan_to_num(-1), wanted_scale[sent].nan_to_num(-1))
    numbers = ~wanted[sent].float().isnan()
    assert torch.equal(rows[sent, :hidden][numbers], wanted[sent].view(torch.uint8)[numbers])
    assert bool((rows[:, hidden:] == 7).all())
    assert bool((rows[1] == 7).all())
    assert bool((found[1] == 7).all())


@triton.jit
def count_before(ids, out, K: tl.constexpr, IDS: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0)
    for first in tl.static_range(0, K, 4):
        counts = dispatch._counts_before(ids, ids + row * K, row * K, first, K, IDS, CHUNK)
        for choice in tl.static_range(first, min(first + 4, K)):
            tl.store(out + row * K + choice, ((counts >> (16 * (choice - first))) & 0xFFFF).to(tl.int32))


@pytest.mark.parametrize("top_k", [1, 4, 6])
@pytest.mark.parametrize("chunk", [16, 256])
def test_counts_of_earlier_choices(top_k, chunk):
    ids = torch.randint(-1, 9, (40, top_k), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    found = torch.full_like(ids, -7)
    count_before[(40,)](ids, found, top_k, ids.numel(), chunk)
    for row in range(40):
        assert found[row].tolist() == [int((ids[:row] == expert).sum()) for expert in ids[row]]
