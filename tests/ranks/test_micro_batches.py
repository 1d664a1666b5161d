"""Two micro-batches interleaved through the kernel's stages, with ranks that come at random moments.

A backend that keeps a step's state anywhere but in its handle gives one batch the other's rows here.
"""

from __future__ import annotations

import threading

import attrs
import pytest
import torch
from rank_cases import Case, E, H, build, choose

from moe_core import MoEError, Routing, SharedExperts
from moe_core.errors import CollectiveError
from moe_core.reference import moe_reference
from moe_core.testing import Faults, VirtualGroup, run_on_ranks
from moe_core.types import SharedExpertsOrder

BATCHES = ((5, 2, 0, 7), (1, 9, 4, 0), (0, 3, 3, 6))
"""Tokens of each rank, by micro-batch."""
ORDERS = {
    "both dispatched first": "dA dB eA sA eB sB fA fB",
    "the second ends first": "dA dB eB sB fB eA sA fA",
    "overlapping combines": "dA eA dB sA eB sB fB fA",
    "a chain of three": "dA eA dB sA eB dC fA sB eC fB sC fC",
    "dispatches in halves": "pA pB rA eA sA rB eB sB fA fB",
    "every wire busy": "pA rA pB eA sA rB eB pC sB fA rC eC sC fB fC",
    "the second is received first": "pA pB rB eB rA eA sB sA fB fA",
}
"""d dispatch · p start of it · r its end · e experts · s start of the combine · f its end; A, B, C micro-batches."""
KINDS = [
    Case("local", 4),
    Case("all_gather", 4),
    Case("all_gather", 4, bounded=False),
    Case("batched", 4),
    Case("batched", 4, fixed=True),
]


def batch(case: Case, number: int, rank: int) -> tuple[torch.Tensor, Routing]:
    """Micro-batch `number` as a rank has it; replicated tokens are the same for all."""
    owner = 0 if case.replicated else rank
    generator = torch.Generator().manual_seed(100 * number + owner)
    tokens = BATCHES[number][owner]
    x = torch.randn(tokens, H, generator=generator)
    return x, Routing(*choose(torch.randn(tokens, E, generator=generator), case.top_k))


def interleave(group, case: Case, order: str) -> list[torch.Tensor]:
    """Run the stages in the order that the letters say."""
    runner = build(case, group)
    kernel, weights = runner.kernel, runner.routed_experts.weights
    arrivals, flights, rows, ends = {}, {}, {}, {}
    for stage, name in order.split():
        number = ord(name) - ord("A")
        if stage == "d":
            flights[number] = kernel.dispatch(*batch(case, number, group.rank))
        elif stage == "p":
            arrivals[number] = kernel.dispatch_start(*batch(case, number, group.rank))
        elif stage == "r":
            flights[number] = arrivals.pop(number)()
        elif stage == "e":
            rows[number] = kernel.run_experts(flights[number], weights)
        elif stage == "s":
            ends[number] = kernel.combine(flights[number], rows[number])
        else:
            ends[number]()
    outs = [flights[number].out for number in sorted(flights)]
    return outs if runner.plan.output_is_reduced else [group.all_reduce(out) for out in outs]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("case", KINDS, ids=lambda c: f"{c.dispatch}{'' if c.bounded else ' by sizes'}{c.fixed or ''}")
def test_interleaved_micro_batches_do_not_mix(case, order):
    whole = run_on_ranks(1, lambda group: build(Case("local", 1), group).routed_experts.weights)[0]
    config = run_on_ranks(1, lambda group: build(Case("local", 1), group).plan.config)[0]
    one_by_one = " ".join(f"d{name} e{name} s{name} f{name}" for name in "ABC"[: len(set(order) & set("ABC"))])
    alone = run_on_ranks(4, interleave, case, one_by_one)
    for seed in range(3):
        faults = Faults(jitter=0.003, seed=seed, delay={seed: 0.002})
        by_rank = run_on_ranks(4, interleave, case, order, faults=faults)
        for rank, outs in enumerate(by_rank):
            for number, out in enumerate(outs):
                assert torch.equal(out, alone[rank][number]), "the bits of the whole forms"
                x, routing = batch(case, number, rank)
                ids, scores = routing.topk_ids, routing.topk_weights
                wanted = moe_reference(x, ids, scores, whole, config.activation, compute_dtype=torch.float64)
                torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)


SPLIT = [case for case in KINDS if case.dispatch != "local"]


@pytest.mark.parametrize("case", SPLIT, ids=lambda c: f"{c.dispatch}{'' if c.bounded else ' by sizes'}{c.fixed or ''}")
def test_a_start_waits_for_nobody(case):
    """Rank 1 enters no stage before rank 0 has started it: if a start waited, both would, until the timeout.

    Sizes and counts, which values on the host decide, are told within the start; rank 1 comes to these.
    """
    case = attrs.evolve(case, world=2)
    told = not case.bounded or (case.dispatch == "batched" and not case.fixed)
    started = {stage: threading.Event() for stage in ("prepare", "finalize")}

    def wait_for_rank_0(group, stage):
        if group.rank == 1 and not (told and stage == "prepare"):
            assert started[stage].wait(5), f"rank 0 waits in {stage}"

    def work(group):
        runner = build(case, group)
        kernel, weights = runner.kernel, runner.routed_experts.weights
        wait_for_rank_0(group, "prepare")
        arrive = kernel.dispatch_start(*batch(case, 0, group.rank))
        started["prepare"].set()
        flight = arrive()
        rows = kernel.run_experts(flight, weights)
        wait_for_rank_0(group, "finalize")
        finish = kernel.combine(flight, rows)
        started["finalize"].set()
        finish()

    run_on_ranks(2, work, timeout_s=8)


@pytest.mark.parametrize("dispatch", ["all_gather", "batched"])
def test_shared_experts_run_while_the_combine_is_under_way(dispatch):
    ran = threading.Event()

    class Shared(torch.nn.Module):
        def forward(self, x):
            ran.set()
            return x

    def work(group):
        runner = build(Case(dispatch, 2, shared="whole"), group, shared_experts=SharedExperts(Shared()))
        assert runner.plan.shared_experts_order is SharedExpertsOrder.INTERNAL
        kernel, (x, routing) = runner.kernel, batch(Case(dispatch, 2), 0, group.rank)
        if group.rank == 0:
            return kernel(x, routing, runner.routed_experts.weights, shared_experts=runner.shared_experts,
                          shared_experts_input=x)  # fmt: skip
        flight = kernel.dispatch(x, routing)
        rows = kernel.run_experts(flight, runner.routed_experts.weights)
        assert ran.wait(5), "rank 0 runs its shared experts before rank 1 has come to the combine"
        return kernel.combine(flight, rows)()

    run_on_ranks(2, work, timeout_s=8)


def test_a_micro_batch_that_is_abandoned_or_never_arrives_holds_no_slot():
    def work(group):
        kernel = build(Case("all_gather", 2), group).kernel
        kernel.abandon(kernel.dispatch(*batch(Case("all_gather", 2), 0, group.rank)))
        assert kernel._in_flight == 0
        arrive = kernel.dispatch_start(*batch(Case("all_gather", 2), 0, group.rank))
        assert kernel._in_flight == 1
        if group.rank == 1:
            raise KeyError("rank 1 goes")
        with pytest.raises(CollectiveError, match="rank 0 waits in prepare: rank 1 did not come"):
            kernel.dispatch(*batch(Case("all_gather", 2), 0, group.rank))
        arrive()
        assert kernel._in_flight == 1
        raise ValueError("rank 0 is through")

    first, second = run_on_ranks(2, work, return_errors=True, timeout_s=5)
    assert isinstance(first, ValueError), first
    assert isinstance(second, KeyError)


@pytest.mark.parametrize("moment", ["start", "end"])
@pytest.mark.parametrize(("stage", "collective"), [("prepare", "all_gather"), ("finalize", "reduce_scatter")])
def test_a_collective_that_fails_is_told_with_the_stage(stage, collective, moment, monkeypatch):
    """As a group of processes fails: it knows the rank and the collective, and the kernel what they were for."""

    def fail(*_):
        raise CollectiveError(f"rank 0 of 1 in {collective}: gone")

    def work(group):
        layer = build(Case("all_gather", 2), group)
        monkeypatch.setattr(VirtualGroup, f"{collective}_start", fail if moment == "start" else lambda *_: fail)
        with pytest.raises(CollectiveError, match=rf"^{stage} of all_gather: rank 0 of 1 in {collective}: gone$"):
            layer(torch.ones(2, H), torch.ones(2, E))
        assert layer.kernel._in_flight == 0

    run_on_ranks(2, work)


def test_a_sum_over_ranks_that_fails_is_told_too(monkeypatch):
    def fail(*_):
        raise CollectiveError("rank 0 of 2 in all_reduce: gone")

    def work(group):
        layer = build(Case("local", 2), group)
        monkeypatch.setattr(VirtualGroup, "all_reduce", fail)
        with pytest.raises(CollectiveError, match=r"^sum over ranks: rank 0 of 2 in all_reduce: gone$"):
            layer(torch.ones(2, H), torch.ones(2, E))

    run_on_ranks(2, work)


def test_ranks_that_interleave_differently_are_told():
    """Rank 1 combines before it dispatches the second batch: the group sees another collective in turn."""
    orders = ("dA dB eA sA fA eB sB fB", "dA eA sA fA dB eB sB fB")

    def work(group):
        return interleave(group, Case("all_gather", 2), orders[group.rank])

    with pytest.raises(MoEError, match="the ranks' collectives are out of order: as collective 1, rank"):
        run_on_ranks(2, work, timeout_s=2)
