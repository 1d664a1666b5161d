"""Batched dispatch between virtual ranks: what travels, where it lands, and the bits of what comes back.

Shape letters: T tokens · H hidden · E experts, global · E_l local experts · K top-k · W ranks · M the largest T.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from moe_batched.all_to_all import AllToAllPrepareAndFinalize
from moe_batched.owners import Owners
from moe_core.errors import CapacityError, MoEError
from moe_core.expert_map import ExpertMapManager
from moe_core.testing import run_on_ranks
from moe_core.types import MODEL_DTYPE_PAYLOAD, ExpertPlacement, Routing

E, H, K, M = 7, 13, 3, 6
SIZES = ((4, 6, 0), (0, 0, 5), (0, 0, 0), (6, 6, 6))
NAN = float("nan")


def make(group: Any, placement: ExpertPlacement, exact: bool) -> tuple[AllToAllPrepareAndFinalize, ExpertMapManager]:
    manager = ExpertMapManager(E, group.size, group.rank, placement)
    backend = AllToAllPrepareAndFinalize(
        group, num_experts=E, placement=placement, num_local_experts=manager.num_local_experts, top_k=K, max_tokens=M,
        exact=exact,
    )  # fmt: skip
    return backend, manager


def step(rank: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, H + 3, generator=generator).to(dtype)[:, :H]
    ids = torch.randint(-1, E, (tokens, K), generator=generator)  # with duplicates and choices of nobody
    ids[1::4] = -1
    weights = torch.rand(tokens, K, generator=generator).masked_fill(ids < 0, NAN)
    return x, Routing(ids, weights)


def prepare(backend: AllToAllPrepareAndFinalize, manager: ExpertMapManager, x: torch.Tensor, routing: Routing) -> Any:
    table = manager.expert_map("cpu")
    return backend.prepare(x, routing, num_experts=E, expert_map=table, payload=MODEL_DTYPE_PAYLOAD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("placement", ExpertPlacement)
def test_the_bits_are_those_of_one_fp32_sum_in_the_order_of_k(
    placement: ExpertPlacement, exact: bool, dtype: torch.dtype
) -> None:
    """Experts that multiply by 3, 4, 5, …: the emulation is exact."""

    def work(group: Any, sizes: tuple[int, ...]) -> None:
        backend, manager = make(group, placement, exact)
        x, routing = step(group.rank, sizes[group.rank], dtype)
        before = x.clone()
        d = prepare(backend, manager, x, routing)
        own = list(manager.local_experts)
        assert d.x.shape == (len(own), M * group.size, H)
        everyone = [step(rank, sizes[rank], dtype) for rank in range(group.size)]
        y = torch.full(d.x.shape, NAN, dtype=dtype)
        for local, (expert, count) in enumerate(zip(own, d.tokens_per_expert.tolist(), strict=True)):
            sent = [rows[(r.topk_ids == expert).any(dim=1)] for rows, r in everyone]
            assert torch.equal(d.x[local, :count], torch.cat(sent)), "by rank, and ascending by token"
            y[local, :count] = d.x[local, :count] * (3 + expert)
        out = torch.full(x.shape, NAN, dtype=dtype)
        backend.finalize(y, d.handle, routing, out)
        total = torch.zeros(x.shape)
        for k in range(K):
            ids, weights = routing.topk_ids[:, k : k + 1], routing.topk_weights[:, k : k + 1]
            term = (x * (3 + ids).to(dtype)).float()
            total.addcmul_(torch.where(ids < 0, 0.0, term), torch.where(ids < 0, 0.0, weights))
        assert torch.equal(out, total.to(dtype))
        assert torch.equal(x, before)

    for sizes in SIZES:
        run_on_ranks(3, work, sizes)


@pytest.mark.parametrize("placement", ExpertPlacement)
def test_the_owner_of_an_expert_is_the_placements(placement: ExpertPlacement) -> None:
    for experts, size in itertools.product((4, 5, 7, 16), (1, 2, 3, 4)):
        wanted = [size] + [0] * experts
        for rank in range(size):
            for expert in ExpertMapManager(experts, size, rank, placement).local_experts:
                wanted[expert + 1] = rank
        ids = torch.arange(-1, experts, dtype=torch.int32)
        assert Owners(experts, size, placement).of(ids).tolist() == wanted


def test_what_does_not_fit_and_what_is_used_twice_is_named() -> None:
    def work(group: Any) -> None:
        backend, manager = make(group, ExpertPlacement.LINEAR, True)
        with pytest.raises(CapacityError, match=f"rank {group.rank}: T = 7 tokens, but max_tokens_per_rank = 6"):
            prepare(backend, manager, *step(0, 7, torch.float32))
        with pytest.raises(MoEError, match=r"payload = 'nvfp4' .* it carries 'model dtype'"):
            backend.prepare(*step(0, 2, torch.float32), num_experts=E, expert_map=None, payload="nvfp4")
        x, routing = step(group.rank, 3, torch.float32)
        d = prepare(backend, manager, x, routing)
        backend.finalize(d.x, d.handle, routing, torch.empty(3, H))
        with pytest.raises(MoEError, match=r"finalize got one that was consumed; .* exactly once"):
            backend.finalize(d.x, d.handle, routing, torch.empty(3, H))
        released = prepare(backend, manager, x, routing)
        backend.release(released.handle)
        with pytest.raises(MoEError, match="consumed"):
            backend.finalize(d.x, released.handle, routing, torch.empty(3, H))

    run_on_ranks(2, work)


def test_the_fixed_form_asks_nobody_and_always_moves_the_same() -> None:
    def work(group: Any) -> tuple[int, int]:
        calls = []
        for tokens in (0, 2, 6):
            backend, manager = make(group, ExpertPlacement.LINEAR, False)
            x, routing = step(group.rank, tokens, torch.float32)
            start = group.calls
            d = prepare(backend, manager, x, routing)
            assert d.handle.owed == d.handle.due == [M * K] * 2, "K = 3 is less than the largest share, 4"
            backend.finalize(d.x, d.handle, routing, torch.empty(tokens, H))
            calls.append(group.calls - start)
        return min(calls), max(calls)

    assert run_on_ranks(2, work) == [(2, 2)] * 2


@pytest.mark.parametrize("exact", [True, False])
def test_equal_ids_of_a_row_make_one_row_each_way(exact: bool) -> None:
    """So the fixed form has room for min(K, largest E_l) rows a token and no more."""

    def work(group: Any) -> None:
        backend, manager = make(group, ExpertPlacement.ROUND_ROBIN, exact)
        x = torch.randn(M, H)
        routing = Routing(torch.tensor([6, 6, 6]).repeat(M, 1), torch.tensor([0.5, 0.25, 1.0]).repeat(M, 1))
        d = prepare(backend, manager, x, routing)
        own = list(manager.local_experts)
        assert d.tokens_per_expert.tolist() == [M * group.size if expert == 6 else 0 for expert in own]
        if exact:
            assert d.handle.due == [M * (rank == 6 % group.size) for rank in range(group.size)]
        else:
            largest_share = -(-E // group.size)
            assert d.handle.due == [M * min(K, largest_share)] * group.size
        out = torch.full((M, H), NAN)
        backend.finalize(d.x * 2, d.handle, routing, out)
        torch.testing.assert_close(out, x * 3.5)

    for size in (2, 4):
        run_on_ranks(size, work)
