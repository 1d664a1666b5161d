"""What a step costs in bytes, on one rank and between ranks: for `moe-core plan` and `moe-core explain`.

Shape letters: T tokens on this rank · H hidden · E_l local experts · K top-k · W ranks · M `max_tokens_per_rank` ·
C row capacity per local expert · R received rows · D rows that a rank can owe another one.

Every array whose size has two of these letters in it is counted; those of one letter (`[E_l]`, `[W]`) are not, but for
the counts.
"""

from __future__ import annotations

import torch

from moe_batched.all_to_all import most_owed
from moe_core.config import Problem
from moe_core.footprint import payload_row_bytes, quantizing_bytes, share_of_tokens
from moe_core.types import DispatchFootprint
from moe_core.wire import WireRow, payload_spec

_INT64, _INT32, _BOOL, _FP32 = (dtype.itemsize for dtype in (torch.int64, torch.int32, torch.bool, torch.float32))
_PLACE = _INT64 + _BOOL
"""Bytes of a choice in a handle: its place, and whether it is kept."""


def footprint(problem: Problem, payload: str, tokens: int) -> DispatchFootprint:
    """See `moe_core.types.Footprint`. On a CPU the exchange is the exact one, elsewhere the one of fixed sizes."""
    config, parallel = problem.config, problem.parallel
    if parallel.ep_size > 1 and not parallel.tokens_are_replicated:
        return _between_ranks(problem, payload, tokens)
    counting = tokens * (problem.num_local_experts * (_INT32 + _BOOL) + config.top_k * 2 * _INT64)
    capacity = config.max_tokens_per_rank or tokens
    held = _packed(problem, payload, capacity) + tokens * config.top_k * _PLACE
    quantized = quantizing_bytes(problem, payload, tokens)
    return DispatchFootprint(
        rows=capacity, held_bytes=held, scratch_bytes=max(counting - held, quantized - held, _summing(problem, tokens))
    )


def _between_ranks(problem: Problem, payload: str, tokens: int) -> DispatchFootprint:
    config, ranks = problem.config, problem.parallel.ep_size
    most = config.max_tokens_per_rank
    assert most is not None, "without max_tokens_per_rank selection refuses this backend"
    spec = payload_spec(payload, problem.scheme, "batched")
    width = WireRow(config.experts_hidden_size, config.dtype, config.top_k, spec, weighted=False).row_bytes
    result = config.experts_hidden_size * config.dtype.itemsize
    due = most_owed(config.num_experts, config.top_k, most, ranks)
    sent, owed, told = ranks * most, ranks * due, 0  # rows that travel to this rank, back from it (and home to it)
    returned, from_others = sent * due // most, (ranks - 1) * due
    if problem.device.type == "cpu":
        own, told = problem.num_local_experts / config.num_experts, 2 * _INT64
        sent = round(ranks * tokens * share_of_tokens(problem))
        owed, returned = round(ranks * tokens * config.top_k * own), tokens * config.top_k
        from_others = round(returned * (1 - own))
    held = _packed(problem, payload, ranks * most) + tokens * config.top_k * _PLACE + owed * _INT64
    # who asked for which row: a bool and two int64 per choice and rank, and its place, owner and first of its kind
    tracing = sent * config.top_k * (ranks * (_BOOL + 2 * _INT64) + _PLACE + 2 * _INT64)
    quantized = quantizing_bytes(problem, payload, tokens)
    return DispatchFootprint(
        rows=ranks * most,
        dispatch_wire_bytes=(ranks - 1) * (sent * width // ranks + told),
        combine_wire_bytes=from_others * result,
        held_bytes=held,
        scratch_bytes=max(
            (tokens + 1) * width + quantized - held,  # until the exchange is over, nothing of `held` is there
            (tokens + 1 + 2 * sent) * width - held,
            sent * width + tracing,
            returned * result + max(owed * result, _summing(problem, tokens)),
        ),
    )


def _packed(problem: Problem, payload: str, capacity: int) -> int:
    """`[E_l, C, H]` with its scales, and the counts; one row more takes what goes nowhere."""
    experts = problem.num_local_experts
    return (experts * capacity + 1) * sum(payload_row_bytes(problem, payload)) + experts * _INT32


def _summing(problem: Problem, tokens: int) -> int:
    """The sum over K: the total, one choice's rows as they came and in fp32, and those of the choice before."""
    config = problem.config
    row = config.experts_hidden_size * (3 * _FP32 + config.dtype.itemsize)
    return tokens * (row + config.top_k * (_INT64 + _FP32))
