"""The plain-Triton kernels of the NVFP4 paths in the interpreter: lists of slots, and the order of the lanes."""

from __future__ import annotations

import pytest
import torch

from moe_core.ops._nvfp4_layout import lane_order
from moe_core.ops._runtime import KernelLaunch


@pytest.mark.parametrize("num_rows", [None, 0, 3])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (5, 3, 4), (16, 2, 7)])
def test_each_experts_slots_in_order(tokens, top_k, experts, num_rows):
    from moe_core.ops._kernels.nvfp4_prepare import nvfp4_list_kernel

    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts, (tokens, top_k), generator=generator).to(torch.int32)
    slot_of_row = torch.full((tokens * top_k,), -7, dtype=torch.int32)
    row_end = torch.full((experts,), -7, dtype=torch.int32)
    valid = None if num_rows is None else torch.tensor([num_rows], dtype=torch.int32)
    launch = KernelLaunch(nvfp4_list_kernel, {"K": top_k, "SLOTS": 64, "PDL": False}, warps=1)
    launch((experts, 1, 1), None, ids, valid, slot_of_row, row_end, tokens * top_k)
    flat = ids.flatten()[: tokens * top_k if num_rows is None else num_rows * top_k]
    expected = torch.cat([torch.where(flat == expert)[0] for expert in range(experts)])
    assert row_end.tolist() == [int(((flat >= 0) & (flat <= expert)).sum()) for expert in range(experts)]
    assert torch.equal(slot_of_row[: len(expected)].long(), expected)
    assert bool((slot_of_row[len(expected) :] == -7).all())


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (11, 192)])
def test_columns_in_the_order_of_the_lanes(tokens, hidden):
    from moe_core.ops._kernels.nvfp4_prepare import nvfp4_permute_kernel

    x = torch.randn(tokens, hidden + 8)[:, :hidden]
    out = torch.full((tokens, hidden), float("nan"))
    launch = KernelLaunch(nvfp4_permute_kernel, {"H": hidden, "BT": 8, "BH": 128}, warps=4)
    launch((-(-tokens // 8), -(-hidden // 128), 1), None, x, out, tokens, x.stride(0))
    assert torch.equal(out, x[:, lane_order(hidden)])


@pytest.mark.parametrize("gap", [0, 64])
def test_batched_columns_of_experts_with_many_rows(gap):
    from moe_core.ops._kernels.align import batched_tiles_kernel
    from moe_core.ops._kernels.nvfp4_prepare import nvfp4_permute_batched_kernel

    counts, capacity, hidden, few = [0, 2, 3, 20, 40], 30, 192, 2
    memory = torch.full((2, 5, capacity * hidden + gap), float("nan"))
    x, out = (part.as_strided((5, capacity, hidden), (capacity * hidden + gap, hidden, 1)) for part in memory)
    x[:] = torch.randn(x.shape)
    row_end, tile_expert, tile_row, num_tiles = (torch.full((n,), -7, dtype=torch.int32) for n in (5, 10, 10, 1))
    lists = (row_end, tile_expert, tile_row, num_tiles)
    tiles = KernelLaunch(batched_tiles_kernel, {"E": 5, "EP": 8, "BM": 16, "FEW": few, "PDL": False}, warps=1)
    tiles((1, 1, 1), None, torch.tensor(counts, dtype=torch.int32), *lists, capacity)
    launch = KernelLaunch(
        nvfp4_permute_batched_kernel, {"H": hidden, "BM": 16, "BT": 8, "BH": 128, "PDL": False}, warps=4
    )
    launch((3, 1, 1), None, x, *lists, out, hidden, hidden, gap, gap)
    for expert, count in enumerate(counts):
        rows = min(count, capacity) if count > few else 0
        assert torch.equal(out[expert, :rows], x[expert, :rows, lane_order(hidden)])
        assert bool(out[expert, rows:].isnan().all())
