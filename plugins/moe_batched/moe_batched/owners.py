"""Whose an expert is, and which choices of a row are one.

Shape letters: T tokens on this rank · E experts, global · K top-k · W ranks · R rows.
"""

from __future__ import annotations

import attrs
import torch

from moe_core.types import ExpertPlacement


@attrs.frozen
class Owners:
    """The rank of each expert, by arithmetic and not by a table, so that a first step, which may be a graph capture,
    copies nothing to a device. It is `ExpertMapManager`'s placement, and a test holds it to that.

    Attributes:
        num_experts: E.
        ranks: W.
        placement: of the experts.
    """

    num_experts: int
    ranks: int
    placement: ExpertPlacement

    @property
    def shares(self) -> tuple[int, int]:
        """Experts that every rank has, and how many of the first ranks have one more."""
        return divmod(self.num_experts, self.ranks)

    @property
    def is_linear(self) -> bool:
        return self.placement is ExpertPlacement.LINEAR

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """The rank of each expert, int64 like `ids` `[T, K]`; W where the id is -1."""
        ids, (share, more) = ids.long(), self.shares
        if self.is_linear:
            split = more * (share + 1)  # from here on ranks have `share` experts, before it one more
            rank = torch.where(ids < split, ids // (share + 1), more + (ids - split) // share)
        else:
            rank = ids % self.ranks
        return torch.where(ids < 0, self.ranks, rank)

    def wants(self, ids: torch.Tensor) -> torch.Tensor:
        """bool `[T, K, W]`: the choice is the first of its id in its row, and that rank's."""
        owner = self.of(ids).masked_fill(~is_first(ids), self.ranks)
        return owner.unsqueeze(2) == torch.arange(self.ranks, device=ids.device)


def first_of(values: torch.Tensor) -> torch.Tensor:
    """int64 `[R, K]`: the first k of the row that holds the same."""
    return (values.unsqueeze(2) == values.unsqueeze(1)).to(torch.int8).argmax(dim=2)


def is_first(values: torch.Tensor) -> torch.Tensor:
    """bool `[R, K]`: no k before holds the same."""
    return first_of(values) == torch.arange(values.shape[1], device=values.device)
