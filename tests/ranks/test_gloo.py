"""A part of the product, and plans that differ, on real processes. One test a world size: one pool serves it."""

from __future__ import annotations

import itertools

import pytest
from rank_cases import TOKENS, Case, assert_right

from moe_core import ExpertPlacement


def cases(world: int) -> list[Case]:
    chosen = [
        Case(dispatch, world, tokens, placement)
        for dispatch, tokens, placement in itertools.product(
            ("local", "all_gather", "batched"), TOKENS, ExpertPlacement
        )
    ]
    for tokens in ("unequal", "none at all"):
        chosen.append(Case("all_gather", world, tokens, bounded=False, shared="whole", scale=1.7))
        chosen.append(Case("batched", world, tokens, fixed=True, top_k=5))
    return chosen


def check(pool, world: int) -> None:
    every = cases(world)
    by_rank = pool("run_cases", every)
    for answer in by_rank:
        assert not isinstance(answer, str), answer
    for case, *results in zip(every, *by_rank, strict=True):
        assert_right(results, case)


def test_two_ranks(gloo):
    pool = gloo(2)
    check(pool, 2)
    different = [{}, {"top_k": 2}]
    for text, seconds in pool("build_with", Case("all_gather", 2), different):
        assert "top_k: rank 0 has 3, rank 1 has 2" in text
        assert seconds < 10
    assert pool("in_order", Case("batched", 2)) == [2, 2], "an error before the first collective leaves nothing behind"


@pytest.mark.full
def test_four_ranks(gloo):
    check(gloo(4), 4)
