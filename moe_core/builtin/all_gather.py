"""All-gather / reduce-scatter: every rank sees every rank's tokens, runs its own experts on them, and the rows of each
rank are summed where they came from.

Shape letters: T tokens on this rank · H hidden · E experts, global · K top-k · R received rows · W ranks · M the
largest T of any rank (`MoEConfig.max_tokens_per_rank`).

Where M is known, every rank sends M rows: the step has one shape, asks the device for nothing and can be captured in a
graph. Where it is not, the ranks tell each other their T first; that is a value on the host, so only on a CPU.

Rounding: each rank's experts round their sum for a row to the model dtype, and the sum over ranks is taken in it, by
the group. Nothing else rounds.
"""

from __future__ import annotations

import attrs
import torch

from moe_core.builtin.local import local_ids
from moe_core.errors import CapacityError, MoEError
from moe_core.interfaces import Group, PrepareAndFinalize
from moe_core.types import MODEL_DTYPE_PAYLOAD, Dispatched, Routing

_ALIGNMENT = 16
"""Bytes. Rows, and the ids behind them, start at multiples of this: enough for any vector load."""


@attrs.define
class _Handle:
    """
    Attributes:
        sizes: rows of each rank in the gathered order, M each where padded.
        consumed: `finalize` or `release` has had it.
    """

    sizes: list[int]
    consumed: bool = False


class AllGatherPrepareAndFinalize(PrepareAndFinalize):
    """STANDARD format, R = rows of all ranks in rank order; ids of other ranks' experts, and of padding, are -1.

    Row, ids and weights travel in one buffer of bytes, so a dispatch is one collective; so is a combine. Every rank
    enters them on every step, also with T = 0. All that a step needs stands in its handle, so any number of
    micro-batches may be in flight.

    Args:
        group: the layer's ranks.
        max_tokens: M; None: the ranks exchange their T (on a CPU).
    """

    def __init__(self, group: Group, *, max_tokens: int | None = None) -> None:
        self.group = group
        self.max_tokens = max_tokens

    def prepare(
        self,
        hidden_states: torch.Tensor,
        routing: Routing,
        *,
        num_experts: int,
        expert_map: torch.Tensor | None,
        payload: str,
    ) -> Dispatched:
        """See `PrepareAndFinalize.prepare`; `x` is `[R, H]`, padded rows are uninitialised.

        Raises:
            CapacityError: T is above `max_tokens`.
        """
        if payload != MODEL_DTYPE_PAYLOAD:
            raise MoEError(
                f"dispatch all_gather was given payload = {payload!r}; it carries only {MODEL_DTYPE_PAYLOAD!r}"
            )
        sizes = self._sizes(hidden_states)
        rows, hidden = sizes[self.group.rank], hidden_states.shape[1]
        top_k = routing.topk_ids.shape[1]
        layout = _Layout(hidden, top_k, hidden_states.dtype)
        sent = layout.pack(hidden_states, routing, rows)
        gathered = self.group.all_gather(sent, sizes)
        x, ids, weights = layout.unpack(gathered)
        if expert_map is not None:
            ids = local_ids(ids, expert_map)
        return Dispatched(x=x, handle=_Handle(sizes), topk_ids=ids, topk_weights=weights)

    def finalize(self, expert_out: torch.Tensor, handle: object, routing: Routing, out: torch.Tensor) -> None:
        """Sum `expert_out` `[R, H]` over the ranks; `out` `[T, H]` gets this rank's rows of the sum."""
        if not isinstance(handle, _Handle) or handle.consumed:
            raise MoEError(
                f"dispatch all_gather: finalize got handle = {handle!r}; it takes the handle of one prepare, exactly "
                "once"
            )
        handle.consumed = True
        own = self.group.reduce_scatter(expert_out, handle.sizes)
        out.copy_(own[: out.shape[0]])

    def release(self, handle: object) -> None:
        """An exception came between `prepare` and `finalize`: no buffer is pooled, so only the handle is closed."""
        if isinstance(handle, _Handle):
            handle.consumed = True

    def _sizes(self, hidden_states: torch.Tensor) -> list[int]:
        """How many rows each rank sends."""
        tokens = hidden_states.shape[0]
        if self.max_tokens is None:
            mine = torch.tensor([tokens], device=hidden_states.device)
            told: list[int] = self.group.all_gather(mine).tolist()
            return told
        if tokens > self.max_tokens:
            raise CapacityError(
                f"dispatch all_gather, rank {self.group.rank}: T = {tokens} tokens, but max_tokens_per_rank = "
                f"{self.max_tokens} sized the buffers; raise it in MoEConfig, or pass fewer tokens a step"
            )
        return [self.max_tokens] * self.group.size


@attrs.frozen
class _Layout:
    """A row on the wire: H values in the model dtype, then K ids int32, then K weights float32.

    Attributes:
        hidden: H.
        top_k: K.
        dtype: of the values.
    """

    hidden: int
    top_k: int
    dtype: torch.dtype

    @property
    def ids_at(self) -> int:
        return _aligned(self.hidden * self.dtype.itemsize)

    @property
    def row_bytes(self) -> int:
        return self.ids_at + _aligned(8 * self.top_k)

    def pack(self, hidden_states: torch.Tensor, routing: Routing, rows: int) -> torch.Tensor:
        """uint8 `[rows, row_bytes]`: T rows, then padding whose ids are -1."""
        tokens = hidden_states.shape[0]
        buffer = torch.empty(rows, self.row_bytes, dtype=torch.uint8, device=hidden_states.device)
        x, ids, weights = self.unpack(buffer)
        x[:tokens].copy_(hidden_states)
        ids[:tokens].copy_(routing.topk_ids)
        weights[:tokens].copy_(routing.topk_weights)
        if rows > tokens:
            ids[tokens:].fill_(-1)
        return buffer

    def unpack(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views on a buffer: `[R, H]`, ids int32 `[R, K]` and weights float32 `[R, K]`."""
        ids_at, weights_at = self.ids_at, self.ids_at + 4 * self.top_k
        x = buffer[:, : self.hidden * self.dtype.itemsize].view(self.dtype)
        ids = buffer[:, ids_at:weights_at].view(torch.int32)
        return x, ids, buffer[:, weights_at : weights_at + 4 * self.top_k].view(torch.float32)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
