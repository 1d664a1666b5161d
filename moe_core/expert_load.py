"""How often each expert of a layer was chosen: counted on the device, read when somebody asks.

Shape letters: T tokens on this rank · E experts, global · K top-k.
"""

from __future__ import annotations

import torch


class ExpertLoad:
    """Counts of one layer on one rank. Made before a graph is captured, it counts in every replay too.

    Args:
        num_experts: E.
        device: where the layer runs.
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # it outlives the step that might have made it
            # one entry more takes the -1, so that nothing has to be left out
            self._counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)

    def add(self, topk_ids: torch.Tensor) -> None:
        """Count the choices of one step: global ids `[T, K]`; -1 (padding, no expert) is not counted. No host sync."""
        ids = topk_ids.flatten().long()
        ids = ids.masked_fill(ids < 0, self._counts.shape[0] - 1)
        self._counts.scatter_add_(0, ids, torch.ones_like(ids))

    def read(self, *, reset: bool = False) -> torch.Tensor:
        """int64 `[E]`, a copy on the device: choices of this rank's tokens since the last reset.

        Where ranks have tokens of their own, the layer's load is the sum over its group.
        """
        counts = self._counts[:-1].clone()
        if reset:
            self._counts.zero_()
        return counts


def imbalance(counts: torch.Tensor) -> float:
    """The busiest of the counts over their mean: 1.0 is even. Of experts `[E]`, or of ranks. Waits for the device."""
    total = int(counts.sum())
    return float(counts.max()) * counts.numel() / total if total else 1.0
