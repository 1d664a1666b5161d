"""Every dispatch on virtual ranks against one rank: dispatch × W × tokens × placement × K × shared experts × scale."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from rank_cases import TOKENS, Case, assert_right, choose, inputs, run

from moe_core import ExpertPlacement
from moe_core.testing import Faults, run_on_ranks

DISPATCHES = ("local", "all_gather", "batched")
WORLDS = (1, 2, 4)
SHARED = (None, "whole", "partial")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch fills uninitialised memory with NaN (bytes: 255, which is NaN in every floating dtype)."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(case: Case) -> None:
    results = run_on_ranks(case.world, run, case)
    assert_right(results, case)
    again = run_on_ranks(case.world, run, case, faults=Faults(jitter=0.0005, seed=case.world))
    assert all(map(torch.equal, results, again)), "the same bits, whoever comes first"


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_the_result_is_that_of_one_rank(dispatch, world, tokens):
    for placement, top_k in itertools.product(ExpertPlacement, (1, 3, 5)):
        check(Case(dispatch, world, tokens, placement, top_k))


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_scale_and_shared_experts_once(dispatch, world, shared):
    if shared == "partial" and dispatch != "local" and world > 1:
        shared = "whole"  # tokens of each rank's own: split shared experts have a test with a group of their own
    for tokens, dtype in itertools.product(("unequal", "none on a rank"), (torch.float32, torch.bfloat16)):
        check(Case(dispatch, world, tokens, shared=shared, scale=1.7, dtype=dtype))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("world", WORLDS)
def test_the_other_form_of_the_exchange(world, tokens):
    """all_gather without a bound tells sizes; batched as on a GPU exchanges without counts."""
    for placement, top_k in itertools.product(ExpertPlacement, (1, 5)):
        check(Case("all_gather", world, tokens, placement, top_k, bounded=False))
        if world > 1:
            check(Case("batched", world, tokens, placement, top_k, fixed=True))


def test_the_inputs_hold_what_the_cases_claim():
    _, logits = inputs(Case("all_gather", 4))
    ids, _ = choose(torch.cat(logits), 3)
    assert any(len(set(row)) < 3 and -1 not in row for row in ids.tolist()), "a duplicate"
    assert any(row[0] >= 0 and row[-1] == -1 for row in ids.tolist()), "a dropped choice"
    assert any(row == [-1] * 3 for row in ids.tolist()), "a token of nobody"


@pytest.mark.full
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_the_whole_product(dispatch, world, tokens, shared):
    if shared == "partial" and dispatch != "local":
        shared = "whole"
    options = itertools.product(
        ExpertPlacement, (1, 2, 3, 5), (1.0, 1.7), (True, False), (False, True), (torch.float32, torch.bfloat16)
    )
    for placement, top_k, scale, bounded, fixed, dtype in options:
        exchanges = dispatch == "batched" and world > 1
        if (exchanges and not bounded) or (fixed and not exchanges):
            continue
        check(Case(dispatch, world, tokens, placement, top_k, shared, scale, bounded, fixed, dtype))
