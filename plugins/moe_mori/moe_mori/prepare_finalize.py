"""Tokens to the ranks of their experts and sums of rows back, by MoRI's intra-node kernels.

Shape letters: T tokens on this rank · H hidden · E_l local experts · K top-k · W ranks · M the largest T of any rank ·
R = M · W rows, of which the first `num_rows` are there · G scales of a quantized row.

    prepare    row [t] with all its ids and weights ─► each rank that has one of its experts, once ─► [R, H]
    finalize   [T, H]  ◄─ plain sum over those ranks, in the order in which the ids name them      ◄─ [R, H]

Rounding: each rank's experts round their weighted sum for a row to the model dtype; the combine adds these in fp32 and
rounds once. A quantized payload is quantized here, by `moe_core.formats`.
"""

from __future__ import annotations

import weakref
from typing import Any

import attrs
import torch

from moe_core import formats
from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.errors import CapacityError, MoEError
from moe_core.interfaces import Group, PrepareAndFinalize
from moe_core.pool import Lease
from moe_core.quant import QuantScheme
from moe_core.types import MODEL_DTYPE_PAYLOAD, Dispatched, ExpertPlacement, Routing
from moe_mori.library import Library
from moe_mori.operators import COMBINE, DISPATCH, OperatorShape, SharedOperator, lease_operator

_TIMEOUT_S = 300.0
"""Where the group says nothing."""


@attrs.define(eq=False)
class MoriHandle:
    """One step between its dispatch and its combine.

    Attributes:
        ids: int32 `[T, K]`, what this rank dispatched. The combine goes by these and never by the ids it received.
        routing: MoRI's own routing handle, opaque; None where the version has none.
        consumed: `finalize` or `release` has had it.
    """

    ids: torch.Tensor
    routing: Any
    consumed: bool = False


class MoriPrepareAndFinalize(PrepareAndFinalize):
    """STANDARD format over the ranks of one host, with tokens of their own. One micro-batch in flight.

    Args:
        lease: of the operator.
        shape: of the operator.
        scheme: of the layer; where the plan's payload is its name, rows are quantized before they travel.
        rank: this one.
    """

    def __init__(self, lease: Lease[SharedOperator], shape: OperatorShape, *, scheme: QuantScheme, rank: int) -> None:
        self.shape = shape
        self.scheme = scheme
        self.rank = rank
        self._operator = lease.item
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
        """See `PrepareAndFinalize.prepare`; rows past `num_rows` hold what an earlier step left.

        `expert_map` is not read: ids are physical, or linear, which is the same.

        Raises:
            CapacityError: T is above M.
        """
        self._admit(hidden_states)
        rows, scales = self._quantize(hidden_states, payload)
        ids = routing.topk_ids.to(torch.int32).contiguous()
        operator = self._operator
        asked = {"return_routing": True} if operator.returns_routing else {}
        with operator.stage(DISPATCH):
            received, weights, row_scales, row_ids, total, *handles = operator.raw.dispatch(
                rows, routing.topk_weights.contiguous(), scales, ids, **asked
            )
        operator.in_flight += 1
        handle = MoriHandle(ids, handles[0] if handles else None)
        try:
            return Dispatched(
                x=_plain(received),
                x_scale=None if scales is None else row_scales,
                handle=handle,
                topk_ids=self._local(row_ids),
                topk_weights=weights,
                num_rows=total.clone(),  # MoRI's own counter, which the combine sets to 0
            )
        except BaseException:
            self.release(handle)
            raise

    def finalize(self, expert_out: torch.Tensor, handle: Any, routing: Routing, out: torch.Tensor) -> None:
        """See `PrepareAndFinalize.finalize`."""
        if not isinstance(handle, MoriHandle) or handle.consumed:
            used = "one that was consumed" if isinstance(handle, MoriHandle) else repr(handle)
            raise MoEError(f"dispatch mori: finalize got {used}; it takes the handle of one prepare, exactly once")
        handle.consumed = True
        operator = self._operator
        operator.in_flight -= 1
        given = {} if handle.routing is None else {"routing": handle.routing}
        with operator.stage(COMBINE):
            summed, _ = operator.raw.combine(expert_out.contiguous(), None, handle.ids, **given)
        out.copy_(summed[: out.shape[0]])  # MoRI's buffer, which the next step overwrites

    def release(self, handle: Any) -> None:
        """An exception came in between: MoRI's counters go back to where they were before the dispatch.

        Ranks that go on to combine wait for this one, until their watchdog ends them.
        """
        if isinstance(handle, MoriHandle) and not handle.consumed:
            handle.consumed = True
            self._operator.in_flight -= 1
            self._operator.raw.reset()

    def _admit(self, hidden_states: torch.Tensor) -> None:
        tokens = hidden_states.shape[0]
        if tokens > self.shape.max_tokens:
            raise CapacityError(
                f"dispatch mori, rank {self.rank}: T = {tokens} tokens, but max_tokens_per_rank = "
                f"{self.shape.max_tokens} sized the buffers; raise it in MoEConfig, or pass fewer tokens a step"
            )
        if self._operator.in_flight:
            raise MoEError(
                "dispatch mori: a micro-batch is in flight over the layers that share this operator, whose buffers are "
                "single; combine it before the next dispatch"
            )
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            self._keep()

    def _quantize(self, hidden_states: torch.Tensor, payload: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows that travel, `[T, H]` or packed, and their scales `[T, G]`."""
        if payload == MODEL_DTYPE_PAYLOAD:
            return hidden_states.contiguous(), None
        spec = self.scheme.activation
        if payload != self.scheme.name or spec is None or not spec.row_wise:
            raise MoEError(
                f"dispatch mori was given payload = {payload!r} in a layer of scheme {self.scheme.name!r}; it carries "
                f"{MODEL_DTYPE_PAYLOAD!r}, and the scheme's own where activations are quantized row by row"
            )
        rows, scales = formats.quantize(hidden_states, spec)
        if not scales.numel():  # MoRI takes an empty tensor for none, and would hand over nobody's scales
            scales = scales.new_ones(1, self.shape.scales)
        return _packed(rows), scales.contiguous()

    def _local(self, ids: torch.Tensor) -> torch.Tensor:
        """Local ids, -1 for other ranks' experts: the rows come with all of their ids, as they were sent."""
        local = ids - self.rank * self.shape.experts_per_rank
        return local.masked_fill((local < 0) | (local >= self.shape.experts_per_rank), -1)


def _packed(rows: torch.Tensor) -> torch.Tensor:
    """Two fp4 codes in a byte, by the dtype that MoRI knows them under; all else as it is."""
    return rows.view(torch.float4_e2m1fn_x2) if rows.dtype == torch.uint8 else rows


def _plain(rows: torch.Tensor) -> torch.Tensor:
    """The way back of `_packed`."""
    return rows.view(torch.uint8) if rows.dtype == torch.float4_e2m1fn_x2 else rows


def make(
    config: MoEConfig,
    parallel: MoEParallelConfig,
    scheme: QuantScheme,
    group: Group | None,
    placement: ExpertPlacement,
    *,
    library: Library | None = None,
) -> MoriPrepareAndFinalize:
    """Build it for a layer: lease the operator, which the first layer of a shape makes and runs once."""
    if group is None or config.max_tokens_per_rank is None:
        raise MoEError(f"dispatch mori: group = {group}, max_tokens_per_rank = {config.max_tokens_per_rank}; pass both")
    if library is None:
        from moe_mori import _vendor_api  # noqa: PLC0415 - the real import, only when it is used

        library = _vendor_api.library()
    spec = scheme.activation if scheme.activation is not None and scheme.activation.row_wise else None
    scales = 0 if spec is None else formats.scale_shape(spec.group_shape, 1, config.experts_hidden_size)[1]
    shape = OperatorShape(
        ranks=parallel.ep_size,
        experts_per_rank=config.num_experts // parallel.ep_size,
        max_tokens=config.max_tokens_per_rank,
        top_k=config.top_k,
        hidden=config.experts_hidden_size,
        dtype=config.dtype,
        scales=scales,
        scale_bytes=0 if spec is None else formats.scale_dtype(spec).itemsize,
    )
    lease = lease_operator(library, group, shape, float(getattr(group, "timeout_s", _TIMEOUT_S)))
    return MoriPrepareAndFinalize(lease, shape, scheme=scheme, rank=parallel.ep_rank)
