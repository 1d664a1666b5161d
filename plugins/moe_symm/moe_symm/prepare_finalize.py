"""Tokens to the ranks of their experts and back, over memory that all GPUs of a host can write.

Shape letters: T tokens on this rank · M the largest T of any rank · H hidden · K top-k · W ranks · R = W · M.

    prepare    row [t] ─► each rank with a chosen expert, once, at row source · M + t ─► x [R, H], ids [R, K] or -1
    finalize   [T, H]  ◄─ fp32 sum over ranks, in their order ◄─ [R, H], weighted and summed by the experts

No counts are exchanged and no slots are assigned: a row's place follows from where it comes from, so every result is
the same each time. Rounding: the experts' rows are in the model dtype, and the sum is rounded once.
"""

from __future__ import annotations

import weakref
from typing import Any

import attrs
import torch

from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.errors import CapacityError, CollectiveError, MoEError
from moe_core.interfaces import Group, PrepareAndFinalize
from moe_core.pool import Lease
from moe_core.types import MODEL_DTYPE_PAYLOAD, Dispatched, ExpertPlacement, Routing
from moe_symm.buffers import Connect, Lane, SharedBuffer, lease_buffer
from moe_symm.layout import Layout, Shares, describe_fault

_TIMEOUT_S = 30.0
"""Where the group says nothing."""
_ALIGNMENT = 16
"""Bytes. Kernels are compiled for pointers on such borders, and none may be compiled in a step."""


@attrs.define(eq=False)
class SymmHandle:
    """One step between its dispatch and its combine.

    Attributes:
        lane: the part of the buffer that it uses.
        ids: `[T, K]`, what was dispatched: the combine reads from them which ranks send a row.
        consumed: `finalize` or `release` has had it.
    """

    lane: Lane
    ids: torch.Tensor
    consumed: bool = False


class SymmPrepareAndFinalize(PrepareAndFinalize):
    """STANDARD format over the GPUs of one host, each rank with tokens of its own. Two micro-batches may be in flight.

    `Dispatched.x`, its ids and its weights are views of the buffer, valid until the step's `finalize`. Steps of layers
    that share a buffer belong on one stream, or on streams that wait for one another.

    Args:
        lease: of the buffer.
        layout: the buffer's.
        shares: which rank holds which experts.
        rank: this rank.
    """

    def __init__(self, lease: Lease[SharedBuffer], layout: Layout, shares: Shares, rank: int) -> None:
        self.layout = layout
        self.shares = shares
        self.rank = rank
        self._buffer = lease.item
        self._connection = lease.item.connection
        self._keep = lease.keep
        weakref.finalize(self, lease.close)

    def prepare(
        self,
        hidden_states: torch.Tensor,
        routing: Routing,
        *,
        num_experts: int,
        expert_map: torch.Tensor | None,
        payload: str,
    ) -> Dispatched:
        """See `PrepareAndFinalize.prepare`. `expert_map` is not read: the placement is known by arithmetic.

        Raises:
            CapacityError: T is above M.
            CollectiveError: a rank did not come to an earlier step.
        """
        tokens = hidden_states.shape[0]
        if payload != MODEL_DTYPE_PAYLOAD:
            raise MoEError(f"dispatch symm was given payload = {payload!r}; it carries {MODEL_DTYPE_PAYLOAD!r}")
        if tokens > self.layout.max_tokens:
            raise CapacityError(
                f"dispatch symm, rank {self.rank}: T = {tokens} tokens, but max_tokens_per_rank = "
                f"{self.layout.max_tokens} sized the buffer; raise it in MoEConfig, or pass fewer tokens a step"
            )
        self.check()
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            self._keep()
        ids = _placed(routing.topk_ids)
        lane = self._buffer.take()
        try:
            self._connection.dispatch(
                lane.index, self.shares, _placed(hidden_states), ids, _placed(routing.topk_weights)
            )
            self.check()
        except BaseException:
            self._buffer.give(lane)
            raise
        return Dispatched(x=lane.x, handle=SymmHandle(lane, ids), topk_ids=lane.ids, topk_weights=lane.weights)

    def finalize(self, expert_out: torch.Tensor, handle: Any, routing: Routing, out: torch.Tensor) -> None:
        """See `PrepareAndFinalize.finalize`. After a rank did not come, `out` is NaN.

        Raises:
            CollectiveError: it is known already that a rank did not come. If not, the next step, or `check`, says so.
        """
        if not isinstance(handle, SymmHandle) or handle.consumed:
            used = "one that was consumed" if isinstance(handle, SymmHandle) else repr(handle)
            raise MoEError(f"dispatch symm: finalize got {used}; it takes the handle of one prepare, exactly once")
        handle.consumed = True
        target = out if _is_placed(out) else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        try:
            self._connection.combine(handle.lane.index, self.shares, _placed(expert_out), handle.ids, target)
        finally:
            self._buffer.give(handle.lane)
        if target is not out:
            out.copy_(target)
        self.check()

    def release(self, handle: Any) -> None:
        """An exception came in between. The other ranks' combine needs this one's: it sends NaN for every row."""
        if not isinstance(handle, SymmHandle) or handle.consumed:
            return
        handle.consumed = True
        x = handle.lane.x
        nothing = torch.full((self.layout.rows, self.layout.hidden), torch.nan, dtype=x.dtype, device=x.device)
        unused = nothing.new_empty(handle.ids.shape[0], self.layout.hidden)
        try:
            self._connection.combine(handle.lane.index, self.shares, nothing, handle.ids, unused)
        finally:
            self._buffer.give(handle.lane)

    def check(self) -> None:
        """Raise for a rank that was waited for in vain. Does not wait for the device.

        Raises:
            CollectiveError: who waited for whom, in which stage.
        """
        code = self._connection.fault()
        if code:
            raise CollectiveError(
                f"dispatch symm, rank {self.rank} of {self.layout.ranks}: {describe_fault(code)} in vain; that step's "
                "results are NaN, and the ranks are out of step: look at that rank's output, and start all ranks again"
            )


def _is_placed(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0


def _placed(tensor: torch.Tensor) -> torch.Tensor:
    """As kernels take it: contiguous, on a border for vector loads."""
    return tensor if _is_placed(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def make(
    config: MoEConfig,
    parallel: MoEParallelConfig,
    group: Group | None,
    placement: ExpertPlacement,
    *,
    connect: Connect,
) -> SymmPrepareAndFinalize:
    """Build it for a layer: lease the buffer, which the first layer of a shape connects, and compile. Collective."""
    if group is None or config.max_tokens_per_rank is None:
        raise MoEError(f"dispatch symm: group = {group}, max_tokens_per_rank = {config.max_tokens_per_rank}; pass both")
    layout = Layout(
        parallel.ep_size,
        config.max_tokens_per_rank,
        config.experts_hidden_size,
        config.top_k,
        config.dtype.itemsize,
    )
    shares = Shares.of(config.num_experts, parallel.ep_size, placement)
    timeout_s = float(getattr(group, "timeout_s", _TIMEOUT_S))
    lease = lease_buffer(connect, group, layout, config.dtype, timeout_s)
    lease.item.connection.compile(shares, config.dtype)
    return SymmPrepareAndFinalize(lease, layout, shares, group.rank)
