"""Tokens to `[E_l, C, H]` and back, on one rank. `all_to_all.py` puts an exchange between ranks around it.

Shape letters: T tokens on this rank · H hidden · E experts, global · E_l local experts · K top-k · C row capacity per
local expert.
"""

from __future__ import annotations

import attrs
import torch

from moe_batched.rows import find_slots, to_slots, weigh_and_sum
from moe_core.errors import CapacityError, MoEError
from moe_core.interfaces import PrepareAndFinalize
from moe_core.quant import UNQUANTIZED, QuantScheme
from moe_core.types import Dispatched, Routing
from moe_core.wire import payload_spec, quantize_rows


@attrs.define
class BatchedHandle:
    """Where every choice went.

    Attributes:
        place: int64 `[T, K]`, e · C + slot in the flattened `[E_l · C, H]`; -1 where the choice has no row.
        consumed: `finalize` or `release` has had it.
    """

    place: torch.Tensor
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
        place, counts = find_slots(topk_ids, expert_map, self.num_local_experts, capacity)
        if capacity < tokens:
            self._note_overflow(counts, capacity)
            counts = counts.clamp(max=capacity)
        x, x_scale = to_slots(rows, scales, place, self.num_local_experts * capacity)
        in_blocks = (self.num_local_experts, capacity)
        return Dispatched(
            x=x.unflatten(0, in_blocks),
            x_scale=None if x_scale is None else x_scale.unflatten(0, in_blocks),
            handle=BatchedHandle(place),
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
        weigh_and_sum(expert_out.flatten(0, 1), handle.place, routing.topk_weights, out)

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
