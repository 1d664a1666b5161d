"""Tokens to `[E_l, C, H]` and back, on one rank. `all_to_all.py` puts an exchange between ranks around it.

Shape letters: T tokens on this rank · H hidden · E experts, global · E_l local experts · K top-k · C row capacity per
local expert.
"""

from __future__ import annotations

import attrs
import torch

from moe_core.errors import CapacityError, MoEError
from moe_core.interfaces import PrepareAndFinalize
from moe_core.quant import UNQUANTIZED, QuantScheme
from moe_core.types import Dispatched, Routing
from moe_core.wire import payload_spec, quantize_rows


@attrs.define
class BatchedHandle:
    """Where every choice went.

    Attributes:
        place: int64 `[T, K]`, e · C + slot in the flattened `[E_l · C, H]`; E_l · C where the choice has no row.
        kept: bool `[T, K]`, the choice has a row.
        consumed: `finalize` or `release` has had it.
    """

    place: torch.Tensor
    kept: torch.Tensor
    consumed: bool = False


class BatchedPrepareAndFinalize(PrepareAndFinalize):
    """BATCHED format: each local expert's rows packed from slot 0, in ascending order of tokens.

    All bookkeeping is done by tensors on the device of the tokens: no loop over experts and, on a GPU, no value read
    back. Equal ids in a row share one slot, and their weights add up. Choices of other ranks' experts and -1 get none.

    Args:
        num_local_experts: E_l.
        max_tokens: upper bound of T. C is then always this, so that every step has the same shapes; None: C = T.
        capacity: an explicit C, which may be smaller than T. Rows beyond it are an error: on a CPU at once, on a
            GPU they are dropped, counted in `status`, and raised by `check`.
        scheme: of the layer. Where the plan's payload is its name, rows are quantized once, before they are packed,
            and `x_scale` is `[E_l, C, groups of H]`, allocated as the scheme says.
    """

    def __init__(
        self,
        num_local_experts: int,
        *,
        max_tokens: int | None = None,
        capacity: int | None = None,
        scheme: QuantScheme = UNQUANTIZED,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("capacity", capacity)):
            if value is not None and value < 1:
                raise ValueError(f"BatchedPrepareAndFinalize: {name} = {value}; legal values: None, or int >= 1")
        self.num_local_experts = num_local_experts
        self.max_tokens = max_tokens
        self.capacity = capacity
        self.scheme = scheme
        self.status: torch.Tensor | None = None
        """int32 `[1]`: rows dropped since the last `check`. Exists on a GPU once a step had fewer slots than tokens."""

    def prepare(
        self,
        hidden_states: torch.Tensor,
        routing: Routing,
        *,
        num_experts: int,
        expert_map: torch.Tensor | None,
        payload: str,
    ) -> Dispatched:
        """See `PrepareAndFinalize.prepare`; `x` is `[E_l, C, H]`, rows past the counts are uninitialised.

        Raises:
            CapacityError: T is above `max_tokens`, or (on a CPU) an expert got more rows than `capacity`.
        """
        spec = payload_spec(payload, self.scheme, "batched")
        rows, scales = (hidden_states, None) if spec is None else quantize_rows(hidden_states, spec)
        return self.pack(rows, scales, routing.topk_ids, expert_map)

    def pack(
        self,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> Dispatched:
        """Rows as they are to be delivered, `[T, …]` with their scales `[T, …]`, to `[E_l, C, …]`."""
        tokens = rows.shape[0]
        capacity = self._row_capacity(tokens)
        ids = topk_ids.long()
        if expert_map is not None:
            # As an index, -1 would mean the last expert: it is replaced before the table is read and put back after.
            ids = torch.where(ids < 0, -1, expert_map[ids.clamp(min=0)].long())
        position, counts = self._positions(ids)
        if capacity < tokens:
            self._note_overflow(counts, capacity)
            counts = counts.clamp(max=capacity)
        kept = (ids >= 0) & (position < capacity)
        nowhere = self.num_local_experts * capacity
        place = torch.where(kept, ids * capacity + position, nowhere)
        return Dispatched(
            x=self._pack(rows, place, capacity),
            x_scale=None if scales is None else self._pack(scales, place, capacity),
            handle=BatchedHandle(place, kept),
            tokens_per_expert=counts,
        )

    def finalize(self, expert_out: torch.Tensor, handle: object, routing: Routing, out: torch.Tensor) -> None:
        """Weigh and sum in fp32, in the order of K, and round once.

        Args:
            expert_out: `[E_l, C, H]`, raw rows; those past the counts may hold NaN.
            handle: of one `prepare` of this object; consumed.
            routing: the one that `prepare` was given.
            out: `[T, H]`, written whole; tokens without a row get zeros.
        """
        if not isinstance(handle, BatchedHandle) or handle.consumed:
            used = "one that was consumed" if isinstance(handle, BatchedHandle) else repr(handle)
            raise MoEError(f"dispatch batched: finalize got {used}; it takes the handle of one prepare, exactly once")
        handle.consumed = True
        weigh_and_sum(expert_out.flatten(0, 1), handle.place, handle.kept, routing.topk_weights, out)

    def release(self, handle: object) -> None:
        """An exception came between `prepare` and `finalize`: no buffer is pooled, so only the handle is closed."""
        if isinstance(handle, BatchedHandle):
            handle.consumed = True

    def check(self) -> None:
        """Raise for rows that were dropped on a GPU since the last call. Waits for the device.

        Raises:
            CapacityError: with the number of rows.
        """
        if self.status is None or not (dropped := int(self.status)):
            return
        self.status.zero_()
        raise CapacityError(
            f"dispatch batched: {dropped} rows did not fit into capacity = {self.capacity} per expert and were "
            "dropped, so results since the last check are wrong; raise the capacity (T is always enough)"
        )

    def _row_capacity(self, tokens: int) -> int:
        """C for a step of T tokens."""
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise CapacityError(
                f"dispatch batched: T = {tokens} tokens, but max_tokens_per_rank = {self.max_tokens} sized the "
                "buffers; raise it in MoEConfig, or pass fewer tokens a step"
            )
        return self.capacity or self.max_tokens or tokens

    def _positions(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The slot of every choice within its expert, and the rows of each expert.

        Args:
            ids: int64 `[T, K]`, local, -1 = none.

        Returns:
            int64 `[T, K]`, 0 .. T - 1, of no meaning where the id is -1; and int32 `[E_l]`, before any capacity.
        """
        tokens = ids.shape[0]
        if not tokens:
            return ids, torch.zeros(self.num_local_experts, dtype=torch.int32, device=ids.device)
        # A column more takes the -1, so that none of the others is touched.
        chosen = torch.zeros(tokens, self.num_local_experts + 1, dtype=torch.bool, device=ids.device)
        chosen.scatter_(1, torch.where(ids < 0, self.num_local_experts, ids), True)
        rank = chosen[:, :-1].cumsum(dim=0, dtype=torch.int32)  # tokens up to and with this one that chose the expert
        return rank.gather(1, ids.clamp(min=0)).long() - 1, rank[-1].clone()  # not a view: it would keep all of `rank`

    def _allocate(self, rows: int, like: torch.Tensor) -> torch.Tensor:
        """`[rows, …]`, uninitialised, in dtype and width of what is packed: rows of the payload, or their scales."""
        return torch.empty(rows, like.shape[1], dtype=like.dtype, device=like.device)

    def _pack(self, rows: torch.Tensor, place: torch.Tensor, capacity: int) -> torch.Tensor:
        """Rows `[T, …]` to `[E_l, C, …]`; what is past the counts is uninitialised.

        The buffer has one row more, which takes what goes nowhere.
        """
        nowhere = self.num_local_experts * capacity
        buffer = self._allocate(nowhere + 1, rows)
        plain = torch.uint8 if rows.element_size() == 1 else rows.dtype  # fp8 has no index_copy_
        for k in range(place.shape[1]):  # K writes of [T, H]: one write would need the tokens K times over
            buffer.view(plain).index_copy_(0, place[:, k], rows.view(plain))
        return buffer[:nowhere].view(self.num_local_experts, capacity, rows.shape[1])

    def _note_overflow(self, counts: torch.Tensor, capacity: int) -> None:
        """Raise where values are on the host, count where they are not. `counts`: int32 `[E_l]`."""
        if counts.device.type == "cpu":
            worst = int(counts.argmax())
            if int(counts[worst]) > capacity:
                raise CapacityError(
                    f"dispatch batched: local expert {worst} got {int(counts[worst])} rows, capacity = {capacity}; "
                    "raise the capacity (T is always enough)"
                )
        else:
            self._count_overflow(counts, capacity)

    def _count_overflow(self, counts: torch.Tensor, capacity: int) -> None:
        if self.status is None or self.status.device != counts.device:
            self.status = torch.zeros(1, dtype=torch.int32, device=counts.device)
        self.status += (counts - capacity).clamp(min=0).sum(dtype=torch.int32)


def weigh_and_sum(
    rows: torch.Tensor, place: torch.Tensor, kept: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor
) -> None:
    """Weigh and sum in fp32, in the order of K, and round once.

    Args:
        rows: `[N, H]`, raw rows of experts; those that no choice points at may hold NaN.
        place: int64 `[T, K]`, the row of each choice; anything where `kept` is False.
        kept: bool `[T, K]`, the choice has a row.
        topk_weights: float32 `[T, K]`; anything where `kept` is False.
        out: `[T, H]`, written whole; tokens without a row get zeros.
    """
    if out.numel() == 0:
        return
    if rows.shape[0] == 0:  # nobody here has a row, and there is none to read instead
        out.zero_()
        return
    # A choice without a row reads row 0, and what it reads is replaced: NaN · 0 would be NaN.
    place = place.masked_fill(~kept, 0)
    weights = topk_weights.masked_fill(~kept, 0.0)
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for k in range(place.shape[1]):
        term = rows.index_select(0, place[:, k]).float().masked_fill_(~kept[:, k : k + 1], 0.0)
        total.addcmul_(term, weights[:, k : k + 1])
    out.copy_(total)
