"""Two micro-batches interleaved through the kernel's stages, with ranks that come at random moments.

A backend that keeps a step's state anywhere but in its handle gives one batch the other's rows here.
"""

from __future__ import annotations

import pytest
import torch
from rank_cases import Case, E, H, build, choose

from moe_core import MoEError, Routing
from moe_core.reference import moe_reference
from moe_core.testing import Faults, run_on_ranks

BATCHES = ((5, 2, 0, 7), (1, 9, 4, 0), (0, 3, 3, 6))
"""Tokens of each rank, by micro-batch."""
ORDERS = {
    "both dispatched first": "dA dB eA sA eB sB fA fB",
    "the second ends first": "dA dB eB sB fB eA sA fA",
    "overlapping combines": "dA eA dB sA eB sB fB fA",
    "a chain of three": "dA eA dB sA eB dC fA sB eC fB sC fC",
}
"""d dispatch · e experts · s start of the combine · f its end; A, B, C micro-batches."""
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
    flights, rows, ends = {}, {}, {}
    for stage, name in order.split():
        number = ord(name) - ord("A")
        if stage == "d":
            flights[number] = kernel.dispatch(*batch(case, number, group.rank))
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
    for seed in range(3):
        faults = Faults(jitter=0.003, seed=seed, delay={seed: 0.002})
        by_rank = run_on_ranks(4, interleave, case, order, faults=faults)
        for rank, outs in enumerate(by_rank):
            for number, out in enumerate(outs):
                x, routing = batch(case, number, rank)
                ids, scores = routing.topk_ids, routing.topk_weights
                wanted = moe_reference(x, ids, scores, whole, config.activation, compute_dtype=torch.float64)
                torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)


def test_ranks_that_interleave_differently_are_told():
    """Rank 1 combines before it dispatches the second batch: the group sees another collective in turn."""
    orders = ("dA dB eA sA fA eB sB fB", "dA eA sA fA dB eB sB fB")

    def work(group):
        return interleave(group, Case("all_gather", 2), orders[group.rank])

    with pytest.raises(MoEError, match="the ranks' collectives are out of order: as collective 1, rank"):
        run_on_ranks(2, work, timeout_s=2)
