"""Ranks with different plans say so, with the field, on every rank, before they hang."""

from __future__ import annotations

import time

import attrs
import pytest
import torch
from rank_cases import Case, layer_config

import moe_core
from moe_core import ActivationSpec, ExpertPlacement, MoEError, MoEParallelConfig, RouterSpec
from moe_core.agreement import check_agreement
from moe_core.testing import Faults, RankDropped, run_on_ranks

CASE = Case("all_gather", 2)
CHANGES = {
    "dtype": {"dtype": torch.bfloat16},
    "top_k": {"top_k": 2},
    "num_experts": {"num_experts": 8},
    "hidden_size": {"hidden_size": 32},
    "intermediate_size": {"intermediate_size": 32},
    "activation": {"activation": ActivationSpec(limit=7.0)},
    "router": {"router": RouterSpec("softmax")},
    "router_weight_on_input": {"router_weight_on_input": True},
    "routed_scaling": {"routed_scaling_factor": 2.0},
    "placement": {"placement": ExpertPlacement.ROUND_ROBIN},
    "max_tokens_per_rank": {"max_tokens_per_rank": 64},
    "cuda_graph": {"cuda_graph": True},
}


def build(group, changes, dispatch="all_gather", **folded):
    config = attrs.evolve(layer_config(CASE), **changes)
    folded = {"dp_size": group.size, "dp_rank": group.rank} | folded
    parallel = MoEParallelConfig.fold(**folded, expert_parallel=True)
    return moe_core.build_runner(config, parallel=parallel, dispatch=dispatch, group=group, device="cpu")


def assert_all_name(errors, field):
    for error in errors:
        assert isinstance(error, MoEError), error
        assert f"\n  {field}: rank 0 has " in str(error), str(error)
        assert "rank 1 has " in str(error)


@pytest.mark.parametrize("field", CHANGES)
def test_a_field_that_differs_is_named_on_every_rank(field):
    started = time.monotonic()
    errors = run_on_ranks(2, lambda group: build(group, CHANGES[field] if group.rank else {}), return_errors=True)
    assert_all_name(errors, field)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("field", ["dispatch", "format"])
def test_another_backend_is_named(field):
    names = ("all_gather", "batched")
    assert_all_name(run_on_ranks(2, lambda g: build(g, {}, dispatch=names[g.rank]), return_errors=True), field)


def test_another_spread_is_named():
    def work(group):
        axis = "tp" if group.rank else "dp"
        folded = {"dp_size": 1, "dp_rank": 0, f"{axis}_size": 2, f"{axis}_rank": group.rank}
        return build(group, {}, **folded)

    assert_all_name(run_on_ranks(2, work, return_errors=True), "parallel")


def test_equal_plans_agree_layer_after_layer_and_a_copy_asks_nobody():
    import copy

    def work(group):
        layers = [build(group, {}) for _ in range(3)]
        if group.rank == 0:
            copied = copy.copy(layers[0])
            copied.__setstate__(layers[0].__getstate__())
        return group.calls

    assert run_on_ranks(4, work) == [0] * 4, "no collective was entered"


def test_a_rank_that_never_builds_the_layer_is_named():
    def work(group):
        return build(group, {}) if group.rank != 1 else None

    first, _, third = run_on_ranks(3, work, timeout_s=0.2, return_errors=True)
    for rank, error in ((0, first), (2, third)):
        assert f"rank {rank}, building layer number 1 of this group: rank 1 has not built it within 0.2 s" in str(error)


def test_a_difference_is_told_though_another_rank_is_absent(monkeypatch):
    monkeypatch.setattr("moe_core.agreement.DISAGREEMENT_TIMEOUT_S", 0.2)

    def work(group):
        if group.rank == 2:
            return None
        return build(group, {"top_k": 2} if group.rank else {}, dp_size=3)

    started = time.monotonic()
    first, second, _ = run_on_ranks(3, work, return_errors=True)
    assert_all_name([first, second], "top_k")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("size", [2, 3])
def test_a_group_that_is_not_the_plans_is_refused_by_every_rank(size):
    errors = run_on_ranks(size, lambda group: build(group, {}, dp_size=2, dp_rank=0), return_errors=True)
    for error in errors:
        assert isinstance(error, MoEError)
        assert f"the group is rank 1 of {size}, and MoEParallelConfig says ep_rank = 0, ep_size = 2" in str(error)


def test_advice_is_a_warning():
    def work(group):
        check_agreement(group, {"x": (1, 2)}, {"tuned tables": "ab"[group.rank]})

    for warning in run_on_ranks(2, work, return_errors=True):
        assert isinstance(warning, UserWarning), "warnings are errors in these tests"
        assert "may cost speed but no numbers:\n  tuned tables: rank 0 has 'a', rank 1 has 'b'" in str(warning)


@pytest.mark.parametrize("dispatch", ["all_gather", "batched"])
@pytest.mark.parametrize("call", [0, 1])
def test_a_rank_that_dies_in_a_step_is_named_with_the_stage(dispatch, call):
    def work(group):
        runner = build(group, {}, dispatch=dispatch)
        return runner(torch.ones(2, 24), torch.ones(2, 6))

    call += dispatch == "batched"  # on a CPU counts are told first
    first, dead = run_on_ranks(2, work, faults=Faults(drop={1: call}), timeout_s=0.3, return_errors=True)
    assert isinstance(dead, RankDropped)
    stage = ("prepare", "finalize")[call - (dispatch == "batched")]
    assert str(first).startswith(f"rank 0 waits in {stage}: rank 1 did not come to"), str(first)
