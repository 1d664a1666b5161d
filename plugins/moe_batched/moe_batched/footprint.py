"""What a step costs in bytes, on one rank and between ranks: for `moe-core plan` and `moe-core explain`.

Shape letters: T tokens on this rank · H hidden · E_l local experts · K top-k · W ranks · M `max_tokens_per_rank` ·
C row capacity per local expert · R received rows · D rows that a rank can owe another one.

Every array whose size has two of these letters in it is counted; those of one letter (`[E_l]`, `[W]`) are not, but for
the counts.
"""

from __future__ import annotations

import torch

from moe_batched.all_to_all import most_rows
from moe_core.config import Problem
from moe_core.footprint import payload_row_bytes, quantizing_bytes, share_of_tokens
from moe_core.types import DispatchFootprint
from moe_core.wire import WireRow, payload_spec

_INT64, _INT32, _BOOL, _FP32 = (dtype.itemsize for dtype in (torch.int64, torch.int32, torch.bool, torch.float32))


def footprint(problem: Problem, payload: str, tokens: int) -> DispatchFootprint:
    """See `moe_core.types.Footprint`. On a CPU the exchange is the exact one, elsewhere the one of fixed sizes."""
    config, parallel = problem.config, problem.parallel
    if parallel.ep_size > 1 and not parallel.tokens_are_replicated:
        return _between_ranks(problem, payload, tokens)
    capacity = config.max_tokens_per_rank or tokens
    held = _packed(problem, payload, capacity) + tokens * config.top_k * _INT64
    early = max(_counting(problem, tokens), quantizing_bytes(problem, payload, tokens))
    return DispatchFootprint(rows=capacity, held_bytes=held, scratch_bytes=max(early - held, _summing(problem, tokens)))


def _between_ranks(problem: Problem, payload: str, tokens: int) -> DispatchFootprint:
    config, ranks = problem.config, problem.parallel.ep_size
    most = config.max_tokens_per_rank
    assert most is not None, "without max_tokens_per_rank selection refuses this backend"
    spec = payload_spec(payload, problem.scheme, "batched")
    width = WireRow(config.experts_hidden_size, config.dtype, config.top_k, spec, weighted=False).row_bytes
    result = config.experts_hidden_size * config.dtype.itemsize
    # rows that travel to this rank, back from it, and home to it; and how many of the last are of other ranks
    sent, told = ranks * most, 0
    owed = returned = sent * most_rows(config.num_experts, config.top_k, ranks)
    from_others = returned * (ranks - 1) // ranks
    if problem.device.type == "cpu":
        own, told = problem.num_local_experts / config.num_experts, 2 * _INT64
        sent = round(ranks * tokens * share_of_tokens(problem))
        owed, returned = round(ranks * tokens * config.top_k * own), tokens * config.top_k
        from_others = round(returned * (1 - own))
    held = _packed(problem, payload, ranks * most) + (tokens + sent) * config.top_k * _INT64
    return DispatchFootprint(
        rows=ranks * most,
        dispatch_wire_bytes=(ranks - 1) * (sent * width // ranks + told),
        combine_wire_bytes=from_others * result,
        held_bytes=held,
        scratch_bytes=max(
            # until the exchange is over, hardly anything of `held` is there
            (tokens + sent) * width + quantizing_bytes(problem, payload, tokens) - held,
            2 * sent * width - held,
            sent * width + _counting(problem, sent),
            returned * result + max(owed * result, _summing(problem, tokens)),
        ),
    )


def _counting(problem: Problem, rows: int) -> int:
    """Beside the places of all choices, what it takes to find them: on a GPU nothing."""
    if problem.device.type != "cpu":
        return 0
    return rows * (problem.num_local_experts * (_INT32 + _BOOL) + problem.config.top_k * 2 * _INT64)


def _packed(problem: Problem, payload: str, capacity: int) -> int:
    """`[E_l, C, H]` with its scales, and the counts; one row more takes what goes nowhere."""
    experts = problem.num_local_experts
    return (experts * capacity + 1) * sum(payload_row_bytes(problem, payload)) + experts * _INT32


def _summing(problem: Problem, tokens: int) -> int:
    """The sum over K: the total, one choice's rows as they came and in fp32, and those of the choice before. On a GPU
    one kernel has all that in its registers.
    """
    if problem.device.type != "cpu":
        return 0
    config = problem.config
    row = config.experts_hidden_size * (3 * _FP32 + config.dtype.itemsize)
    return tokens * (row + config.top_k * (_INT64 + _FP32))
