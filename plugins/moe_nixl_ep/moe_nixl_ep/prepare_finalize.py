"""Tokens to `[E_l, C, H]` of their experts' ranks and back, by NIXL EP's low-latency kernels.

Shape letters: T tokens on this rank · H hidden · H_w H on the wire, the next width that the kernels have · E experts,
global · E_l local experts · K top-k · W ranks · S slots per (source rank, local expert) · C = S · W row capacity.

    prepare    row [t] ─► each of its K experts, one copy each ─► [E_l, C, H], in no particular order
    finalize   [T, H]  ◄─ acc = fma(row, weight, acc) in fp32, in the order of K ◄─ [E_l, C, H]

Rounding: the experts' rows are in bf16, and the combine rounds its fp32 sum once. Nothing else rounds. An fp8 payload
is quantized by the library, with its own formula: per 128 columns amax = max(1e-4, |x|), scale = fp32(amax · fp32(1 /
448)), value = e4m3(x · fp32(448 / amax)); rounded scales are the next power of two. That is another last bit than
`moe_core.formats`, which divides.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch.nn import functional

from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.errors import CapacityError, MoEError
from moe_core.expert_map import ExpertMapManager
from moe_core.interfaces import Group, PrepareAndFinalize
from moe_core.pool import Lease
from moe_core.quant import QuantScheme
from moe_core.types import MODEL_DTYPE_PAYLOAD, Dispatched, ExpertPlacement, Routing
from moe_nixl_ep.buffers import MAX_IN_FLIGHT, BufferShape, SharedBuffer, lease_buffer
from moe_nixl_ep.library import DETERMINISM, Library
from moe_nixl_ep.limits import FP8_PAYLOADS, SCALE_GROUP, slots_per_rank, wire_hidden
from moe_nixl_ep.scales import row_major

_TIMEOUT_S = 30.0
"""Where the group says nothing: the library's own default."""
_ALIGNMENT = 16
"""Bytes that the kernels read and write at once: rows begin at a multiple, or the process is lost."""


class RanksMaskedError(MoEError):
    """Ranks did not answer in time, and the steps since then have run without their experts.

    Attributes:
        ranks: who.
        experts: the global ids of their experts: choices of these have counted as nothing.
    """

    def __init__(self, message: str, ranks: tuple[int, ...], experts: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks
        self.experts = experts


@attrs.define(eq=False)
class NixlHandle:
    """One step between its dispatch and its combine.

    Attributes:
        ids: `[T, K]` in the library's dtype, the very tensor that was dispatched: the combine needs it again.
        vendor: the library's own handle, opaque.
        expert_out: bf16 `[E_l, C, H_w]`, where the experts write; None where H_w = H, and any buffer will do.
        consumed: `finalize` or `release` has had it.
    """

    ids: torch.Tensor
    vendor: Any
    expert_out: torch.Tensor | None
    consumed: bool = False


class NixlEPPrepareAndFinalize(PrepareAndFinalize):
    """BATCHED format over several ranks with tokens of their own. bf16 on the wire, or fp8 for 128-column groups.

    Both halves of a stage are real: the kernels run on a stream of the library's, and `receive` only makes the current
    stream wait for them. Two micro-batches may be in flight, over all layers that share the buffer.

    Args:
        lease: of the buffer.
        library: NIXL EP, or its stand-in.
        shape: of the buffer.
        max_tokens: the largest T.
        hidden: H.
        experts: the placement, to name the experts of a rank that was masked.
    """

    def __init__(
        self,
        lease: Lease[SharedBuffer],
        library: Library,
        shape: BufferShape,
        *,
        max_tokens: int,
        hidden: int,
        experts: ExpertMapManager,
    ) -> None:
        self.shape = shape
        self.max_tokens = max_tokens
        self.hidden = hidden
        self.experts = experts
        self._buffer = lease.item
        self._keep = lease.keep
        self._ids = library.module.topk_idx_t
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
        """See `PrepareAndFinalize.prepare`; `x` is `[E_l, C, H]`, rows past the counts are uninitialised.

        Raises:
            CapacityError: T is above `max_tokens`.
        """
        return self.prepare_start(
            hidden_states, routing, num_experts=num_experts, expert_map=expert_map, payload=payload
        )()

    def finalize(self, expert_out: torch.Tensor, handle: Any, routing: Routing, out: torch.Tensor) -> None:
        """See `PrepareAndFinalize.finalize`."""
        self.finalize_start(expert_out, handle, routing, out)()

    def prepare_start(
        self,
        hidden_states: torch.Tensor,
        routing: Routing,
        *,
        num_experts: int,
        expert_map: torch.Tensor | None,
        payload: str,
    ) -> Callable[[], Dispatched]:
        """Start the dispatch. `expert_map` is not read: ids are physical, or linear, which is the same."""
        self._admit(hidden_states, payload)
        missing = self.shape.hidden - self.hidden
        x = functional.pad(hidden_states, (0, missing)) if missing else _aligned(hidden_states)
        ids = routing.topk_ids.to(self._ids).contiguous()
        quantized = payload != MODEL_DTYPE_PAYLOAD
        with _no_fills():
            received, counts, vendor, event, _ = self._buffer.raw.low_latency_dispatch(
                x,
                ids,
                self.shape.slots,
                num_experts,
                use_fp8=quantized,
                # Scales that are powers of two come as fp32 too, as `formats` holds them; packed bytes nobody reads.
                round_scale=FP8_PAYLOADS.get(payload, False),
                async_finish=True,
            )
        self._buffer.in_flight += 1

        def receive() -> Dispatched:
            try:
                event.current_stream_wait()
                rows, scales = received if quantized else (received, None)
                return Dispatched(
                    x=rows[..., : self.hidden],
                    x_scale=None if scales is None else row_major(scales, counts, -(-self.hidden // SCALE_GROUP)),
                    handle=NixlHandle(ids, vendor, self._expert_out(rows)),
                    tokens_per_expert=counts,
                )
            except BaseException:
                self._buffer.in_flight -= 1
                raise

        return receive

    def expert_output(self, dispatched: Dispatched, out: torch.Tensor) -> torch.Tensor | None:
        """Where rows are wider on the wire, the experts write into the buffer that is sent."""
        rows: torch.Tensor | None = dispatched.handle.expert_out
        return None if rows is None else rows[..., : self.hidden]

    def finalize_start(
        self, expert_out: torch.Tensor, handle: Any, routing: Routing, out: torch.Tensor
    ) -> Callable[[], None]:
        """Start the combine; `out` `[T, H]` is written when what this returns has been called."""
        if not isinstance(handle, NixlHandle) or handle.consumed:
            used = "one that was consumed" if isinstance(handle, NixlHandle) else repr(handle)
            raise MoEError(f"dispatch nixl_ep: finalize got {used}; it takes the handle of one prepare, exactly once")
        handle.consumed = True
        rows = handle.expert_out
        if rows is None:
            rows = _aligned(expert_out)
        elif rows.data_ptr() != expert_out.data_ptr():
            rows[..., : self.hidden].copy_(expert_out)
        direct = handle.expert_out is None and _is_aligned(out)
        target = out if direct else out.new_empty((out.shape[0], self.shape.hidden))
        weights = routing.topk_weights.contiguous()
        try:
            _, event, _ = self._buffer.raw.low_latency_combine(
                rows, handle.ids, weights, handle.vendor, async_finish=True, out=target
            )
        except BaseException:
            self._buffer.in_flight -= 1
            raise

        def receive() -> None:
            self._buffer.in_flight -= 1
            event.current_stream_wait()
            if not direct:
                out.copy_(target[:, : self.hidden])

        return receive

    def release(self, handle: Any) -> None:
        """An exception came in between. Ranks that go on to combine wait for this one, and mask it in the end."""
        if isinstance(handle, NixlHandle) and not handle.consumed:
            handle.consumed = True
            self._buffer.in_flight -= 1

    def check(self) -> None:
        """Raise for ranks that a kernel has waited for in vain. Waits for the device.

        Raises:
            RanksMaskedError: with the ranks and their experts. Those stay masked: start all ranks again.
        """
        status = torch.zeros(self.shape.ranks, dtype=torch.int32, device=self._buffer.device)
        self._buffer.raw.query_mask_buffer(status)
        ranks = tuple(status.nonzero().flatten().tolist())
        if not ranks:
            return
        held = [attrs.evolve(self.experts, ep_rank=rank).local_experts for rank in ranks]
        named = "; ".join(f"rank {rank} with {_named(own)}" for rank, own in zip(ranks, held, strict=True))
        raise RanksMaskedError(
            f"dispatch nixl_ep, rank {self.experts.ep_rank} of {self.shape.ranks}: masked after a timeout: {named}. "
            "Choices of these experts have counted as nothing since then; look at that rank's output, and start all "
            "ranks again",
            ranks,
            tuple(expert for own in held for expert in own),
        )

    def _admit(self, hidden_states: torch.Tensor, payload: str) -> None:
        """Refuse what the library would answer with a lost process."""
        tokens = hidden_states.shape[0]
        if tokens > self.max_tokens:
            raise CapacityError(
                f"dispatch nixl_ep, rank {self.experts.ep_rank}: T = {tokens} tokens, but max_tokens_per_rank = "
                f"{self.max_tokens} sized the buffer; raise it in MoEConfig, or pass fewer tokens a step"
            )
        if payload != MODEL_DTYPE_PAYLOAD and payload not in FP8_PAYLOADS:
            raise MoEError(
                f"dispatch nixl_ep was given payload = {payload!r}; it carries {MODEL_DTYPE_PAYLOAD!r}, "
                f"{', '.join(map(repr, FP8_PAYLOADS))}"
            )
        if self._buffer.in_flight >= MAX_IN_FLIGHT:
            raise MoEError(
                f"dispatch nixl_ep: {self._buffer.in_flight} micro-batches are in flight over the layers that share "
                f"this buffer, which has {MAX_IN_FLIGHT} halves; combine one before the next dispatch"
            )
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            self._keep()

    def _expert_out(self, rows: torch.Tensor) -> torch.Tensor | None:
        if self.shape.hidden == self.hidden:
            return None
        return torch.empty(rows.shape, dtype=torch.bfloat16, device=rows.device)


_filling = threading.Lock()


@contextlib.contextmanager
def _no_fills() -> Iterator[None]:
    """Keep torch from filling what the library allocates.

    In torch's deterministic mode `empty` fills new memory, on the current stream. The library allocates what its
    dispatch returns after its own stream has begun to wait for the current one, so its kernel and those fills write the
    same memory at the same time, and a count or a row's origin may end as the largest integer.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    with _filling:  # one setting for all threads
        before = DETERMINISM.fill_uninitialized_memory
        DETERMINISM.fill_uninitialized_memory = False
        try:
            yield
        finally:
            DETERMINISM.fill_uninitialized_memory = before


def _is_aligned(rows: torch.Tensor) -> bool:
    return rows.is_contiguous() and rows.data_ptr() % _ALIGNMENT == 0


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """As the kernels want them; a copy where they are not."""
    return rows if _is_aligned(rows) else rows.clone(memory_format=torch.contiguous_format)


def _named(experts: range) -> str:
    every = f", one in {experts.step}" if experts.step > 1 else ""
    return f"experts {experts[0]} to {experts[-1]}{every}"


def make(
    config: MoEConfig,
    parallel: MoEParallelConfig,
    scheme: QuantScheme,
    group: Group | None,
    placement: ExpertPlacement,
    *,
    library: Library | None = None,
) -> NixlEPPrepareAndFinalize:
    """Build it for a layer: lease the buffer, which the first layer of a shape makes and connects."""
    if group is None or config.max_tokens_per_rank is None:
        raise MoEError(
            f"dispatch nixl_ep: group = {group}, max_tokens_per_rank = {config.max_tokens_per_rank}; pass both"
        )
    if library is None:
        from moe_nixl_ep import _vendor_api  # noqa: PLC0415 - the real import, only when it is used

        library = _vendor_api.library()
    experts = ExpertMapManager(config.num_experts, parallel.ep_size, parallel.ep_rank, placement)
    shape = BufferShape(
        ranks=parallel.ep_size,
        experts_per_rank=experts.num_local_experts,
        slots=slots_per_rank(config.max_tokens_per_rank, parallel.ep_size),
        hidden=wire_hidden(config.experts_hidden_size, library.limits),
    )
    lease = lease_buffer(library, group, shape, float(getattr(group, "timeout_s", _TIMEOUT_S)))
    return NixlEPPrepareAndFinalize(
        lease,
        library,
        shape,
        max_tokens=config.max_tokens_per_rank,
        hidden=config.experts_hidden_size,
        experts=experts,
    )
