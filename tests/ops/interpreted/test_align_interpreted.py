"""The grouping of slots by expert against a stable sort, and the list of tiles against one written here by hand."""

import pytest
import torch
from case import poisoned

from moe_core.ops._align import LISTED, AlignLaunch
from moe_core.ops._launch import ExpertsProblem
from moe_core.ops.experts import experts_workspace

BLOCK_M = 32


def aligned(ids, experts, short=0, num_rows=None, num_sms=132):
    problem = ExpertsProblem(experts, ids.shape[1], 16, 16, num_sms=num_sms)
    workspace = poisoned(experts_workspace(problem, torch.float32, ids.shape[0]), "cpu")
    rows = None if num_rows is None else torch.tensor([num_rows], dtype=torch.int32)
    AlignLaunch(problem, BLOCK_M, pdl=False, short=short)(ids, rows, workspace, None)
    return workspace


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("num_sms", [132, 2], ids=["an expert a program", "two"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "num_rows"), [(1, 1, 1, None), (37, 3, 5, None), (150, 4, 6, 101), (9, 2, 4, 0)]
)
def test_rows_are_a_stable_sort_of_the_slots(tokens, top_k, experts, num_rows, num_sms, dtype):
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts, (tokens, top_k), generator=generator).to(dtype)
    found = aligned(ids, experts, num_rows=num_rows, num_sms=num_sms)
    flat = ids[:num_rows].flatten()
    order = flat.masked_fill(flat < 0, experts).sort(stable=True).indices[: int((flat >= 0).sum())]
    assert torch.equal(found["slot_of_row"][: len(order)].long(), order)
    assert torch.equal(found["row_of_slot"][order].long(), torch.arange(len(order)))
    counts = torch.bincount(flat[flat >= 0], minlength=experts)
    assert torch.equal(found["row_end"].long(), counts.cumsum(0))


def tile_numbers(counts, short):
    """{tile number: (expert, first row)} of neighbours that share theirs, those with a short last tile first."""
    numbers, start = {}, 0
    for low in range(0, len(counts), LISTED):
        at, first, after = start // BLOCK_M + low, [], []
        for e, count in enumerate(counts[low : low + LISTED], low):
            tiles = [(e, start + row) for row in range(0, count, BLOCK_M)]
            (first if len(tiles) > 1 and 0 < count % BLOCK_M <= short else after).extend(tiles)
            start += count
        numbers |= dict(enumerate(first + after, at))
    return numbers


@pytest.mark.parametrize("num_sms", [132, 2], ids=["an expert a program", "two"])
@pytest.mark.parametrize("experts", [7, 32, 69])
def test_experts_with_a_short_last_tile_come_before_their_neighbours(experts, num_sms):
    counts = [(40, 64, 0, 32, 70, 5, 100)[e % 7] for e in range(experts)]
    flat = torch.cat([torch.full((count,), e, dtype=torch.int32) for e, count in enumerate(counts)])
    flat = torch.cat([flat, flat.new_full((2 - len(flat) % 2,), -1)])
    ids = flat[torch.randperm(len(flat))].view(-1, 2)
    found = aligned(ids, experts, short=16, num_sms=num_sms)
    expected = tile_numbers(counts, 16)
    assert list(dict.fromkeys(e for e, _ in expected.values()))[:3] == [0, 4, 6]
    total = ids.numel() // BLOCK_M + experts
    assert found["tile_expert"][:total].tolist() == [expected.get(i, (-1, 0))[0] for i in range(total)]
    for i, (_, row) in expected.items():
        assert found["tile_row"][i] == row
