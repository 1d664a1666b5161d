"""A model's experts over several ranks, through any dispatch backend; all the rest of the model on each of them.

    torchrun --nproc-per-node 2 -m moe_core run DIR --dispatch batched

transformers can spread experts too: since 5.23 by a registry of expert-parallel implementations, before by a parallel
style, which is another contract in nearly every release. Both load experts through its own weight converters and know
no packed ones. Here the experts are loaded by `moe_core.checkpoint`, as packed ones are on one rank: one way for all
versions and formats, in which a rank reads its own experts only.

Every rank runs the whole dense model on the same tokens. A dispatch that carries none (`local`) gets all of them on all
ranks, and the sum over ranks completes the output. One that does gets tokens of each rank's own, taken in turn as
sequence parallelism does, and the results are gathered again.

Shape letters: T tokens · H hidden · K top-k · W ranks · M the largest number of tokens that a rank dispatches at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_core.config import MoEParallelConfig
from moe_core.interfaces import Group
from moe_core.plugins import registry
from moe_core.types import Routing

MAX_TOKENS_PER_RANK = 128
"""M, where the dispatch allows it: longer prompts take several turns, and buffers stay small."""


def parallel_over(group: Group, dispatch: str | None) -> MoEParallelConfig:
    """Whole experts shared out over the ranks, with the tokens as the dispatch wants them; None: selection decides."""
    carries = dispatch is not None and registry().find("dispatch", dispatch).capabilities.carries_tokens
    return MoEParallelConfig.fold(
        tp_size=group.size, tp_rank=group.rank, expert_parallel=True, sequence_parallel=carries
    )


def most_tokens(dispatch: str | None) -> int:
    """M for a dispatch."""
    if dispatch is None:
        return MAX_TOKENS_PER_RANK
    limit = registry().find("dispatch", dispatch).capabilities.max_tokens_per_rank
    return MAX_TOKENS_PER_RANK if limit is None else min(limit, MAX_TOKENS_PER_RANK)


def run_in_turn(
    step: Callable[[torch.Tensor, Routing], torch.Tensor], x: torch.Tensor, routing: Routing, group: Group, most: int
) -> torch.Tensor:
    """Each rank runs its share of the tokens, at most M at once; all ranks get all results.

    Args:
        step: `[t, H]` and their routing → `[t, H]`, entered by every rank equally often, also with t = 0.
        x: `[T, H]`, the same on all ranks.
        routing: of all T.
        group: the ranks.
        most: M.
    """
    out = torch.empty_like(x)
    for start in range(0, x.shape[0], most * group.size):
        here = min(x.shape[0] - start, most * group.size)
        share, remainder = divmod(here, group.size)
        sizes = [share + (rank < remainder) for rank in range(group.size)]
        first = start + sum(sizes[: group.rank])
        own = slice(first, first + sizes[group.rank])
        mine = step(x[own], Routing(routing.topk_ids[own], routing.topk_weights[own]))
        out[start : start + here] = group.all_gather(mine, sizes)
    return out
