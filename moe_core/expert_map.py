"""Which rank holds which expert, and the tables that translate expert ids.

Three numberings of experts, all starting at 0:
- *global* (also "logical"): the model's own, 0..E-1. Routers speak it.
- *local*: the index into one rank's weights, 0..E_l-1.
- *physical*: rank-major, rank · E_l + local, so that rank = physical // E_l. Some dispatch backends speak it.

Shape letters: T tokens on this rank · E experts, global · E_l local experts · K top-k · W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch

from moe_core.types import ExpertPlacement


@attrs.frozen
class ExpertMapManager:
    """The placement of E experts on W ranks, seen from one of them.

    Construction makes no tensor. A table is made when a device first asks for it and kept: ask once at build time, so
    that no step (and no graph capture) makes one. Tables are shared by all callers, who only read them.

    Attributes:
        num_experts: E.
        ep_size: W.
        ep_rank: this rank.
        placement: LINEAR: contiguous blocks. ROUND_ROBIN: expert e on rank e mod W. In both the first E mod W ranks
            hold one expert more than the others.
    """

    num_experts: int
    ep_size: int = 1
    ep_rank: int = 0
    placement: ExpertPlacement = ExpertPlacement.LINEAR
    _tables: dict[tuple[str, torch.device], torch.Tensor] = attrs.field(factory=dict, init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        for name, minimum in (("num_experts", 1), ("ep_size", 1), ("ep_rank", 0)):
            value: Any = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"ExpertMapManager.{name} = {value!r}; legal values: int >= {minimum}")
        if self.ep_size > self.num_experts:
            raise ValueError(
                f"ExpertMapManager.ep_size = {self.ep_size}; legal values: 1 to num_experts = {self.num_experts} "
                "(every rank holds at least one expert)"
            )
        if self.ep_rank >= self.ep_size:
            raise ValueError(
                f"ExpertMapManager.ep_rank = {self.ep_rank}; legal values: 0 to ep_size - 1 = {self.ep_size - 1}"
            )
        if not isinstance(self.placement, ExpertPlacement):
            legal = ", ".join(str(item) for item in ExpertPlacement)
            raise ValueError(f"ExpertMapManager.placement = {self.placement!r}; legal values: {legal}")

    @property
    def local_experts(self) -> range:
        """The global ids of this rank's experts, in local order."""
        if self.placement is ExpertPlacement.ROUND_ROBIN:
            return range(self.ep_rank, self.num_experts, self.ep_size)
        share, remainder = divmod(self.num_experts, self.ep_size)
        first = self.ep_rank * share + min(self.ep_rank, remainder)
        return range(first, first + share + (self.ep_rank < remainder))

    @property
    def num_local_experts(self) -> int:
        """E_l of this rank."""
        return len(self.local_experts)

    @property
    def has_equal_shares(self) -> bool:
        """Every rank holds the same number of experts, so that physical ids exist."""
        return self.num_experts % self.ep_size == 0

    def expert_map(self, device: torch.device | str) -> torch.Tensor | None:
        """int32 `[E]`: global id → local index on this rank, or -1. None with one rank, which holds all."""
        if self.ep_size == 1:
            return None
        return self._table("expert_map", device, self._make_expert_map)

    def global_to_physical(self, device: torch.device | str) -> torch.Tensor:
        """int64 `[E]`: global id → physical id. The identity under LINEAR.

        Raises:
            ValueError: shares are unequal.
        """
        return self._table("global_to_physical", device, self._make_global_to_physical)

    def physical_to_global(self, device: torch.device | str) -> torch.Tensor:
        """int64 `[E]`: the inverse of `global_to_physical`.

        Raises:
            ValueError: shares are unequal.
        """
        return self._table("physical_to_global", device, lambda: self._make_global_to_physical().argsort())

    def remap_to_physical(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Translate global ids to physical ones, once, before a dispatch that wants them.

        Args:
            topk_ids: `[T, K]` (or any shape) int32 or int64, global ids; -1 = no expert. Never written.

        Returns:
            a new tensor of the same shape and dtype; -1 stays -1. Nothing is read back to the host.

        Raises:
            ValueError: shares are unequal.
        """
        table = self.global_to_physical(topk_ids.device)
        # As an index, -1 would mean the last expert: it is replaced before the table is read and put back after.
        physical = table[topk_ids.clamp(min=0)].to(topk_ids.dtype)
        return physical.masked_fill(topk_ids < 0, -1)

    def _make_expert_map(self) -> torch.Tensor:
        table = torch.full((self.num_experts,), -1, dtype=torch.int32)
        local = self.local_experts
        table[local.start : local.stop : local.step] = torch.arange(len(local), dtype=torch.int32)
        return table

    def _make_global_to_physical(self) -> torch.Tensor:
        if not self.has_equal_shares:
            raise ValueError(
                f"ExpertMapManager: {self.num_experts} experts on {self.ep_size} ranks make unequal shares "
                f"({self.num_experts // self.ep_size} or one more), so that there are no physical ids (rank · E_l + "
                "local); use a number of ranks that divides the experts, or a dispatch that takes logical ids"
            )
        expert = torch.arange(self.num_experts)
        if self.placement is ExpertPlacement.LINEAR:
            return expert
        num_local_experts = self.num_experts // self.ep_size
        return expert % self.ep_size * num_local_experts + expert // self.ep_size

    def _table(self, name: str, device: torch.device | str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        asked = torch.device(device)
        if (name, asked) not in self._tables:
            with torch.inference_mode(False):  # a table outlives the step that asks first: no inference tensor
                table = make().to(asked)
            # "cuda" and "cuda:0" are two keys for one place: the step asks by the second, the build may by the first.
            self._tables[name, asked] = self._tables[name, table.device] = table
        return self._tables[name, asked]
