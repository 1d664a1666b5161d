"""Tokens to the ranks of their experts and back, over memory that all GPUs of a host can write.

Shape letters: T tokens on this rank · M the largest T of any rank · H hidden · G groups of 128 columns · E_l local
experts · C = W · M row capacity of an expert · K top-k · W ranks · R = W · M.

    prepare    row [t] ─► each rank with a chosen expert, once, at row t · W + source ─► x [R, H], ids [R, K] or -1
                                       batched and exact: ─► its place in each expert's rows ─► x [E_l, C, H]
    finalize   [T, H]  ◄─ fp32 sum over ranks, in their order ◄─ [R, H], weighted and summed by the experts
               batched: weighted and summed at the experts' rank, in the order of K, then as above ◄─ [E_l, C, H]
               exact: weighted and summed at the token's rank, in the order of K ◄─ a row for each choice

No counts are exchanged: a row's place follows from where it comes from and from the ids that came before it, so every
result is the same each time. Rounding: rows that travel are in the model dtype, and each sum is rounded once; sums are
fused multiply-adds in fp32. Rows of an fp8 payload are quantized as they are sent, to the bits of `moe_core.formats`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import attrs
import torch

from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.errors import CapacityError, CollectiveError, MoEError
from moe_core.interfaces import Group, PrepareAndFinalize
from moe_core.pool import Lease
from moe_core.quant import QuantScheme
from moe_core.types import MODEL_DTYPE_PAYLOAD, Dispatched, ExpertPlacement, Routing
from moe_symm.buffers import Connect, Lane, Layer, SharedBuffer, lease_buffer
from moe_symm.layout import Form, Layout, Shares, describe_fault
from moe_symm.limits import FP8_PAYLOADS

_TIMEOUT_S = 30.0
"""Where the group says nothing."""
_ALIGNMENT = 16
"""Bytes. Kernels are compiled for pointers on such borders, and none may be compiled in a step."""


@attrs.define(eq=False)
class SymmHandle:
    """One step between its dispatch and its combine.

    Attributes:
        lane: the part of the buffer that it uses.
        resets: of the buffer, when the step began.
        ids: `[T, K]`, what was dispatched: the combine reads from them which ranks send a row.
        weights: float32 `[T, K]`.
        consumed: `finalize` or `release` has had it.
    """

    lane: Lane
    resets: int
    ids: torch.Tensor
    weights: torch.Tensor
    consumed: bool = False


class SymmPrepareAndFinalize(PrepareAndFinalize):
    """Dispatch over the GPUs of one host, each rank with tokens of its own. Two micro-batches may be in flight.

    In the standard form `Dispatched.x`, its ids and its weights are views of the buffer, valid until the step's
    `finalize`. Steps of layers that share a buffer belong on one stream, or on streams that wait for one another.

    Args:
        lease: of the buffer.
        layout: the buffer's.
        layer: what kernels know of the layer.
        rank: this rank.
    """

    def __init__(self, lease: Lease[SharedBuffer], layout: Layout, layer: Layer, rank: int) -> None:
        self.layout = layout
        self.layer = layer
        self.rank = rank
        quantized = [name for name, scales in FP8_PAYLOADS.items() if scales is layer.scales]
        self._payloads = (MODEL_DTYPE_PAYLOAD, *quantized)
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
        whole = self.layout.form is Form.STANDARD
        return self._received(self._send(hidden_states, routing, payload, wait=whole), arrived=whole)

    def prepare_start(
        self,
        hidden_states: torch.Tensor,
        routing: Routing,
        *,
        num_experts: int,
        expert_map: torch.Tensor | None,
        payload: str,
    ) -> Callable[[], Dispatched]:
        """Send; what this returns waits for the other ranks' rows. Raises as `prepare` does."""
        return functools.partial(self._received, self._send(hidden_states, routing, payload, wait=False), arrived=False)

    def expert_output(self, dispatched: Dispatched, out: torch.Tensor) -> torch.Tensor | None:
        """With many tokens: where the other ranks will fetch the rows. They may be elsewhere, at the cost of a copy."""
        place: torch.Tensor | None = dispatched.handle.lane.y
        return place

    def finalize(self, expert_out: torch.Tensor, handle: Any, routing: Routing, out: torch.Tensor) -> None:
        """See `PrepareAndFinalize.finalize`. After a rank did not come, `out` is NaN.

        Raises:
            CollectiveError: it is known already that a rank did not come. If not, the next step, or `check`, says so.
        """
        self._admit(handle)
        y, target = _ready(expert_out, handle.lane), _room_for(out)  # before anything is sent: it may fail
        handle.consumed = True
        try:
            self._combine(handle, y, target)
        finally:
            self._buffer.give(handle.lane)
        if target is not out:
            out.copy_(target)
        self.check()

    def finalize_start(
        self, expert_out: torch.Tensor, handle: Any, routing: Routing, out: torch.Tensor
    ) -> Callable[[], None]:
        """Send rows home; what this returns waits for those of the other ranks, and writes `out`."""
        self._admit(handle)
        y, target = _ready(expert_out, handle.lane), _room_for(out)
        handle.consumed = True
        try:
            self._combine(handle, y, target, collect=False)
        except BaseException:
            self._buffer.give(handle.lane)
            raise

        def receive() -> None:
            self._still_there(handle)
            try:
                self._combine(handle, y, target, send=False)
            finally:
                self._buffer.give(handle.lane)
            if target is not out:
                out.copy_(target)
            self.check()

        return receive

    def release(self, handle: Any) -> None:
        """An exception came in between. The other ranks' combine needs this one's: it sends NaN for every row."""
        if not isinstance(handle, SymmHandle) or handle.consumed or handle.resets != self._buffer.resets:
            return
        handle.consumed = True
        lane = handle.lane
        lane.places.clamp_(max=0)  # so that one row will do for all
        rows = self.layout.rows if self.layout.form is Form.STANDARD else 1
        nothing = torch.full((rows, self.layout.hidden), torch.nan, dtype=lane.x.dtype, device=lane.x.device)
        try:
            self._combine(handle, _ready(nothing, lane), nothing.new_empty(handle.ids.shape[0], self.layout.hidden))
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
                "results are NaN, and the ranks are out of step: look at that rank's output, and start all ranks "
                "again, or call reset() of this backend on all of them"
            )

    def reset(self) -> None:
        """After a rank did not come: bring all ranks back into step. Collective, and for all layers of the buffer.

        Waits for the device. Steps that were in flight are lost, and graphs that were captured go on to work.
        """
        self._buffer.reset()

    def _send(self, hidden_states: torch.Tensor, routing: Routing, payload: str, *, wait: bool) -> Dispatched:
        """The first half of a dispatch: what it returns is filled by `_received`."""
        tokens = hidden_states.shape[0]
        if payload not in self._payloads:
            raise MoEError(f"dispatch symm was given payload = {payload!r}; this layer's are {list(self._payloads)}")
        if tokens > self.layout.max_tokens:
            raise CapacityError(
                f"dispatch symm, rank {self.rank}: T = {tokens} tokens, but max_tokens_per_rank = "
                f"{self.layout.max_tokens} sized the buffer; raise it in MoEConfig, or pass fewer tokens a step"
            )
        self.check()
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            self._keep()
        x, ids, weights = _placed(hidden_states), _placed(routing.topk_ids), _placed(routing.topk_weights)
        quantize = payload != MODEL_DTYPE_PAYLOAD
        lane = self._buffer.take()
        try:
            dispatched = self._room(SymmHandle(lane, self._buffer.resets, ids, weights), quantize)
            self._connection.dispatch(lane.index, self.layer, x, ids, weights, quantize=quantize, wait=wait)
        except BaseException:
            self._buffer.give(lane)
            raise
        return dispatched

    def _room(self, handle: SymmHandle, quantized: bool) -> Dispatched:
        """Where rows will be: in the buffer, or, by expert, in tensors of the step."""
        lane, layout = handle.lane, self.layout
        if layout.form is Form.STANDARD:
            return Dispatched(
                x=lane.quantized if quantized else lane.x,
                handle=handle,
                x_scale=lane.scales if quantized else None,
                topk_ids=lane.ids,
                topk_weights=lane.weights,
                num_rows=lane.num_rows,
            )
        rows = (self.layer.shares.held(self.rank), layout.rows)
        new = functools.partial(torch.empty, device=lane.x.device)
        return Dispatched(
            x=new((*rows, layout.hidden), dtype=torch.float8_e4m3fn if quantized else lane.x.dtype),
            handle=handle,
            x_scale=new((*rows, layout.groups), dtype=torch.float32) if quantized else None,
            tokens_per_expert=new(rows[0], dtype=torch.int32),
        )

    def _received(self, dispatched: Dispatched, *, arrived: bool) -> Dispatched:
        """The second half of a dispatch, if rows have not `arrived` in the first."""
        handle, counts = dispatched.handle, dispatched.tokens_per_expert
        self._still_there(handle)
        lane, tokens = handle.lane.index, handle.ids.shape[0]
        try:
            if counts is not None:
                self._connection.expand(lane, self.layer, tokens, dispatched.x, dispatched.x_scale, counts)
            elif not arrived:
                self._connection.arrive(lane, self.layer)
            self.check()
        except BaseException:
            self._buffer.give(handle.lane)
            raise
        return dispatched

    def _combine(
        self, handle: SymmHandle, y: torch.Tensor, out: torch.Tensor, *, send: bool = True, collect: bool = True
    ) -> None:
        lane = handle.lane.index
        self._connection.combine(lane, self.layer, y, handle.ids, handle.weights, out, send=send, collect=collect)

    def _admit(self, handle: Any) -> None:
        if not isinstance(handle, SymmHandle) or handle.consumed:
            used = "one that was consumed" if isinstance(handle, SymmHandle) else repr(handle)
            raise MoEError(f"dispatch symm: finalize got {used}; it takes the handle of one prepare, exactly once")
        self._still_there(handle)

    def _still_there(self, handle: SymmHandle) -> None:
        if handle.resets != self._buffer.resets:
            raise MoEError("dispatch symm: the buffer was reset while this step was in flight; begin it again")


def _is_placed(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0


def _placed(tensor: torch.Tensor) -> torch.Tensor:
    """As kernels take it: contiguous, on a border for vector loads."""
    return tensor if _is_placed(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _room_for(out: torch.Tensor) -> torch.Tensor:
    """Where kernels write `out`, which may be a view of any kind."""
    return out if _is_placed(out) else torch.empty(out.shape, dtype=out.dtype, device=out.device)


def _ready(expert_out: torch.Tensor, lane: Lane) -> torch.Tensor:
    """As the combine takes it: to be sent, or where it will be fetched."""
    if lane.y is None:
        return _placed(expert_out)
    if expert_out.data_ptr() != lane.y.data_ptr():
        lane.y.copy_(expert_out)
    return lane.y


def make(
    config: MoEConfig,
    parallel: MoEParallelConfig,
    scheme: QuantScheme,
    group: Group | None,
    placement: ExpertPlacement,
    *,
    connect: Connect,
    form: Form = Form.STANDARD,
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
        form,
    )
    layer = Layer(
        Shares.of(config.num_experts, parallel.ep_size, placement), config.dtype, FP8_PAYLOADS.get(scheme.name)
    )
    timeout_s = float(getattr(group, "timeout_s", _TIMEOUT_S))
    lease = lease_buffer(connect, group, layout, config.dtype, timeout_s)
    lease.item.connection.compile(layer)
    return SymmPrepareAndFinalize(lease, layout, layer, group.rank)
