"""TP, EP, DP, SP and their combinations on 4 ranks: routed and shared experts are each summed over ranks exactly once.

Shape letters: T tokens of one rank · H hidden · E experts · W ranks.
"""

from __future__ import annotations

import itertools

import attrs
import pytest
import torch
from rank_cases import Case, E, H, assert_right, build, inputs, shared_module

from moe_core import MoEError, MoEParallelConfig, SharedExperts, UnsupportedError
from moe_core.testing import run_on_ranks

WORLD = 4
SIZES = (3, 1, 0, 5)
"""Tokens of the batch's owners: of a dp group's, or of a sequence-parallel rank."""


@attrs.frozen
class Spread:
    """
    Attributes:
        tp, dp: sizes around the layer; tp · dp = 4.
        ep: experts are shared out whole over all ranks.
        sp: the tp ranks hold rows of one batch in turn.
    """

    tp: int
    dp: int
    ep: bool
    sp: bool

    def place(self, rank: int) -> tuple[int, int]:
        """(dp rank, tp rank)."""
        return divmod(rank, self.tp)

    def tokens_of(self, rank: int) -> int:
        """Which entry of `SIZES` a rank holds: ranks with one number have the same tokens."""
        return rank if self.sp else self.place(rank)[0]

    def parallel(self, rank: int) -> MoEParallelConfig:
        dp_rank, tp_rank = self.place(rank)
        return MoEParallelConfig.fold(
            tp_size=self.tp,
            tp_rank=tp_rank,
            dp_size=self.dp,
            dp_rank=dp_rank,
            expert_parallel=self.ep,
            sequence_parallel=self.sp,
        )


SPREADS = [
    Spread(tp, WORLD // tp, ep, sp)
    for tp, ep, sp in itertools.product((1, 2, 4), (False, True), (False, True))
    if tp > 1 or not sp
]
ROWS = torch.randn(sum(SIZES), H, generator=torch.Generator().manual_seed(3)).split(SIZES)
LOGITS = torch.randn(sum(SIZES), E, generator=torch.Generator().manual_seed(4)).split(SIZES)


def run(group, spread: Spread, case: Case):
    """One rank's output, or the refusal; and whose tokens it had."""
    tp_ranks = [spread.place(group.rank)[0] * spread.tp + i for i in range(spread.tp)]
    tp_group = group.subgroup(tp_ranks)
    shared = None
    if case.shared:
        # split over the tp ranks where those have the same tokens, whole elsewhere
        split = case.shared == "partial" and not spread.sp and spread.tp > 1
        module = shared_module(spread.tp if split else 1)
        shared = SharedExperts(module, output_is_partial=split, group=tp_group if spread.ep and split else None)
    runner = build(case, group if spread.ep else tp_group, spread.parallel(group.rank), shared_experts=shared)
    mine = spread.tokens_of(group.rank)
    return runner(ROWS[mine], LOGITS[mine])


def wanted(spread: Spread, case: Case) -> list[torch.Tensor]:
    alone = attrs.evolve(case, world=1, dispatch="local")
    by_owner = [
        run_on_ranks(1, lambda g, x=x, l=l: build(alone, g, MoEParallelConfig())(x, l))[0]
        for x, l in zip(ROWS, LOGITS, strict=True)
    ]
    return [by_owner[spread.tokens_of(rank)] for rank in range(WORLD)]


@pytest.mark.parametrize("shared", [None, "whole", "partial"])
@pytest.mark.parametrize("dispatch", ["local", "all_gather", "batched"])
@pytest.mark.parametrize("spread", SPREADS, ids=str)
def test_every_combination_gives_what_one_rank_gives_or_is_refused(spread, dispatch, shared):
    case = Case(dispatch, WORLD, shared=shared, scale=1.3)
    parallel = spread.parallel(0)
    layers_ranks = max(parallel.ep_size, parallel.tp_size)
    can = {
        "local": layers_ranks == 1 or parallel.tokens_are_replicated,
        "batched": spread.ep or not spread.sp,
        "all_gather": True,
    }
    if not can[dispatch]:
        with pytest.raises(UnsupportedError, match=r"carries no tokens between ranks|gathers no tokens"):
            run_on_ranks(WORLD, run, spread, case)
        return
    for out, expected in zip(run_on_ranks(WORLD, run, spread, case), wanted(spread, case), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_shared_experts_split_over_ranks_with_different_tokens_are_refused():
    def work(group):
        module = SharedExperts(shared_module(2), output_is_partial=True)
        return build(Case("all_gather", 2, shared="partial"), group, shared_experts=module)

    with pytest.raises(MoEError, match=r"split over ranks .* dp_size = 2, sp_size = 1 .* group=the ranks"):
        run_on_ranks(2, work)


def test_shared_experts_split_over_a_part_of_the_ranks_are_summed_over_that_part():
    """Two copies, each split over a pair, beside routed experts that all four ranks share."""
    case = Case("local", WORLD, shared="partial")

    def work(group):
        pair = group.subgroup([0, 1] if group.rank < 2 else [2, 3])
        module = SharedExperts(shared_module(2), output_is_partial=True, group=pair)
        x, logits = (parts[group.rank] for parts in inputs(case))
        return build(case, group, shared_experts=module)(x, logits)

    assert_right(run_on_ranks(WORLD, work), case)
