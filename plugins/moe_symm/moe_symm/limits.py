"""What a layer must be like, and what it costs in bytes. Pure arithmetic.

Shape letters: T tokens on this rank · M the largest T of any rank · H hidden · K top-k · W ranks.
"""

from __future__ import annotations

import torch

from moe_core.config import Problem
from moe_core.footprint import share_of_tokens
from moe_core.types import DispatchFootprint
from moe_symm.availability import Host
from moe_symm.layout import Layout

MAX_TOKENS = 8192
"""M: 1.9 GB a rank, at 4 ranks, H = 7168 and bf16."""
MAX_TOPK = 16


def layout_of(problem: Problem) -> Layout:
    config = problem.config
    assert config.max_tokens_per_rank is not None, "selection asks for it"
    return Layout(
        problem.parallel.ep_size,
        config.max_tokens_per_rank,
        config.experts_hidden_size,
        config.top_k,
        config.dtype.itemsize,
    )


def refuse(problem: Problem, host: Host) -> str | None:
    """Why a layer can't be served on this host, where no field of the capabilities says it."""
    ranks = problem.parallel.ep_size
    if problem.device.name.startswith("AMD"):
        return f"runs on NVIDIA GPUs, not on {problem.device.name}"
    if ranks > 1 and problem.parallel.tokens_are_replicated:
        return f"all {ranks} ranks have the same tokens, so that nothing needs to travel; dispatch local serves that"
    if host.gpus is not None and ranks > host.gpus:
        return f"ep_size = {ranks}, and this host has {host.gpus} GPUs: all ranks must be on one host, one per GPU"
    return None


def footprint(problem: Problem, payload: str, tokens: int) -> DispatchFootprint:
    """A row per token and rank with a chosen expert, there and back. `x`, ids and weights are views of the buffer,
    so that nothing is allocated on the step."""
    config, layout = problem.config, layout_of(problem)
    row = config.experts_hidden_size * config.dtype.itemsize
    arrived = tokens * (layout.ranks - 1) * share_of_tokens(problem)
    choices = config.top_k * (torch.int32.itemsize + torch.float32.itemsize)
    return DispatchFootprint(
        rows=layout.rows,
        dispatch_wire_bytes=round(arrived * (row + choices)),
        combine_wire_bytes=round(arrived * row),
        buffer_bytes=layout.total_bytes,
    )
