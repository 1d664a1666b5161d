"""Every kernel against its twin in torch: places, rows that are written, and rows that must not be.

Shape letters: T tokens · H hidden · E experts, global · E_l local experts · K top-k · W ranks · M the largest T ·
R rows · C capacity.
"""

import itertools

import pytest
import torch

from moe_batched import launch, rows
from moe_batched.owners import Owners
from moe_core import Routing
from moe_core.quant import QuantSpec
from moe_core.types import ExpertPlacement
from moe_core.wire import WireRow

E, H = 7, 77
MARK = 7.0
IDS = [torch.int32, torch.int64]


@pytest.fixture(autouse=True)
def marked(monkeypatch):
    """What is allocated without a value holds a mark, on both sides, so that they can be compared whole."""
    empty = torch.empty

    def full(*shape, **options):
        made = empty(*shape, **options)
        plain = made.view(torch.uint8) if made.dtype.itemsize == 1 else made
        return plain.fill_(MARK).view(made.dtype)

    monkeypatch.setattr(torch, "empty", full)


def choices(count, top_k, dtype, seed=0):
    """With duplicates, and rows of nobody."""
    ids = torch.randint(-1, E, (count, top_k), generator=torch.Generator().manual_seed(seed))
    ids[1::5] = -1
    return ids.to(dtype)


@pytest.mark.parametrize("dtype", IDS, ids=str)
@pytest.mark.parametrize(("count", "top_k"), [(0, 2), (1, 1), (9, 3), (1200, 5)])
def test_slots(count, top_k, dtype):
    ids = choices(count, top_k + 1, dtype)[:, :top_k]
    table = torch.tensor([-1, 2, 0, -1, 1, 3, -1], dtype=torch.int32)
    for expert_map, capacity in itertools.product((None, table), (3, max(count, 1))):
        experts = E if expert_map is None else 4
        wanted = rows.find_slots(ids, expert_map, experts, capacity)
        for given in (ids, ids.T.contiguous().T):
            found = launch.find_slots(given, expert_map, experts, capacity)
            assert torch.equal(found[0], wanted[0])
            assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_there_and_back(dtype, scaled):
    count, top_k, capacity = 9, 3, 9
    values = torch.randn(count, H + 3).to(dtype)[:, :H]
    scales = torch.rand(count, 6)[:, :5] if scaled else None
    place, _ = rows.find_slots(choices(count, top_k, torch.int64), None, E, capacity)
    (x, x_scale), (wanted, wanted_scale) = (
        module.to_slots(values, scales, place, E * capacity) for module in (launch, rows)
    )
    assert torch.equal(x.view(torch.uint8), wanted.view(torch.uint8))
    assert (x_scale is None and wanted_scale is None) or torch.equal(x_scale, wanted_scale)
    y = x.to(torch.float32)
    for most in (top_k, 4):
        assert torch.equal(launch.from_slots(y, place, most), rows.from_slots(y, place, most))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_sum(dtype):
    ids = choices(9, 3, torch.int64)
    place, _ = rows.find_slots(ids, None, E, 9)
    y = torch.randn(E * 9, H).to(dtype)
    y[torch.ones(E * 9).scatter_(0, place[place >= 0], 0).bool()] = torch.nan
    weights = torch.rand(9, 3).masked_fill(ids < 0, torch.nan)
    found, wanted = (torch.empty(9, H + 1, dtype=dtype)[:, :H] for _ in range(2))
    launch.weigh_and_sum(y, place, weights, found)
    rows.weigh_and_sum(y, place, weights, wanted)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("placement", ExpertPlacement)
@pytest.mark.parametrize("dtype", IDS, ids=str)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_block_for_each_rank(ranks, dtype, placement):
    owners, most_tokens = Owners(E, ranks, placement), 6
    spec = QuantSpec("float8_e4m3fn", (1, 128), dynamic=True)
    for tokens, payload in itertools.product((0, 4, 6), (None, spec)):
        hidden = 256 if payload else H
        x, ids = torch.randn(tokens, hidden + 16).bfloat16()[:, :hidden], choices(tokens, 3, dtype, tokens)
        routing = Routing(ids, torch.rand(tokens, 3))
        row = WireRow(hidden, x.dtype, 3, payload, weighted=False)
        wanted, wanted_home = rows.spread(row, x, routing, owners, most_tokens, 3)
        packed = row.unpack(row.pack(x, routing, tokens))
        found = torch.empty(ranks * most_tokens, row.row_bytes, dtype=torch.uint8)
        home = launch.spread(packed.x, packed.x_scale, ids, row.unpack(found), owners, most_tokens, 3)
        assert torch.equal(found, wanted)
        assert torch.equal(home, wanted_home)
