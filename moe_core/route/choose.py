"""Top-k with an optional correction bias: the step that every router of a model shares.

Shape letters: T tokens on this rank · E experts, global · K top-k.
"""

from __future__ import annotations

import torch


def choose(
    scores_TE: torch.Tensor, correction_bias_E: torch.Tensor | None, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K best experts of each token by `scores + correction_bias`, with their scores free of the bias.

    Args:
        scores_TE: `[T, E]`, any floating dtype.
        correction_bias_E: `[E]` or None.
        top_k: K.

    Returns:
        ids `[T, K]` int64 and their scores `[T, K]` in the dtype of `scores_TE`, both new tensors. Without a bias the
        best comes first; with one the order within a row is arbitrary, as it would say nothing about the weights.
    """
    if correction_bias_E is None:
        best = scores_TE.topk(top_k, dim=-1)
        return best.indices, best.values
    ids_TK = (scores_TE + correction_bias_E).topk(top_k, dim=-1, sorted=False).indices
    return ids_TK, scores_TE.gather(-1, ids_TK)
