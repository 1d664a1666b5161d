"""What MoRI's intra-node kernels take, and the sizes that follow. Pure arithmetic.

Shape letters: T tokens on this rank · H hidden · K top-k · W ranks · M the largest T of any rank
(`MoEConfig.max_tokens_per_rank`) · R = W · M received rows at most.
"""

from __future__ import annotations

import torch

from moe_core.config import Problem
from moe_core.footprint import payload_row_bytes, share_of_tokens
from moe_core.types import DispatchFootprint

MAX_RANKS = 8
"""W of one host; between hosts MoRI has other kernels, which this adapter does not use."""
MAX_TOPK = 9

Version = tuple[int, ...]
_SKIPS_DROPPED_IDS = (1, 2, 1)
"""From here on a negative id is sent nowhere. Before, -1 divided by E_l was 0, so that it went to rank 0."""


def skips_dropped_ids(version: Version | None) -> bool:
    """Does this version take -1? An unknown one is taken for a new one."""
    return version is None or version >= _SKIPS_DROPPED_IDS


def refuse(problem: Problem) -> str | None:
    """Why MoRI can't serve a layer, where no field of the capabilities says it."""
    config, parallel = problem.config, problem.parallel
    ranks = parallel.ep_size
    if problem.device.name.startswith("NVIDIA"):
        return f"runs on AMD GPUs, not on {problem.device.name}"
    if ranks > 1 and parallel.tokens_are_replicated:
        return f"all {ranks} ranks have the same tokens, so that nothing needs to travel; dispatch local serves that"
    if ranks & (ranks - 1):
        return f"ep_size = {ranks}: the ranks of one host must be a power of two"
    if config.max_tokens_per_rank is None:
        return f"max_tokens_per_rank = None: the receive buffers are max_tokens_per_rank · {ranks} rows; set it"
    return None


def footprint(problem: Problem, payload: str, tokens: int) -> DispatchFootprint:
    """One row for each rank that a token goes to, with all of its ids and weights; one summed row back.

    `buffer_bytes` follows the allocations in MoRI's sources (`EpDispatchCombineHandle`): two output buffers, three for
    rows under way with what belongs to them, and their ids, weights and scales. Nobody has measured it.
    """
    config, ranks = problem.config, problem.parallel.ep_size
    assert config.max_tokens_per_rank is not None, "selection asks for it"
    rows = ranks * config.max_tokens_per_rank
    values, scales = payload_row_bytes(problem, payload)
    plain = config.experts_hidden_size * config.dtype.itemsize
    beside = config.top_k * (torch.int32.itemsize + torch.float32.itemsize) + scales
    remote = (ranks - 1) * tokens * share_of_tokens(problem)
    under_way = plain + beside + torch.int32.itemsize  # with the token's index
    return DispatchFootprint(
        rows=rows,
        dispatch_wire_bytes=round(remote * (values + beside)),
        combine_wire_bytes=round(remote * plain),
        held_bytes=(rows * config.top_k + 1) * torch.int32.itemsize,
        scratch_bytes=tokens * (values + scales) if scales else 0,
        buffer_bytes=(rows + config.max_tokens_per_rank) * plain + rows * (3 * under_way + 2 * beside),
    )
