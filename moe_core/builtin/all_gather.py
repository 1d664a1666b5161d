"""All-gather / reduce-scatter: every rank sees every rank's tokens, runs its own experts on them, and the rows of each
rank are summed where they came from.

Shape letters: T tokens on this rank · H hidden · E experts, global · K top-k · R received rows · W ranks · M the
largest T of any rank (`MoEConfig.max_tokens_per_rank`).

Where M is known, every rank sends M rows: the step has one shape, asks the device for nothing and can be captured in a
graph. Where it is not, the ranks tell each other their T first; that is a value on the host, so only on a CPU.

Rows travel in the model dtype, or quantized row by row where the scheme allows it; sums always in the model dtype.

Rounding: each rank's experts round their sum for a row to the model dtype, and the sum over ranks is taken in it, by
the group. Besides a quantized payload nothing else rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch

from moe_core.builtin.local import local_ids
from moe_core.config import Problem
from moe_core.errors import CapacityError, MoEError
from moe_core.footprint import payload_row_bytes, quantizing_bytes
from moe_core.interfaces import Group, PrepareAndFinalize
from moe_core.quant import UNQUANTIZED, QuantScheme
from moe_core.types import Dispatched, DispatchFootprint, Routing
from moe_core.wire import WireRow, payload_spec


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

    Row, scales, ids and weights travel in one buffer of bytes, so a dispatch is one collective; so is a combine. Every
    rank enters them on every step, also with T = 0. All that a step needs stands in its handle, so any number of
    micro-batches may be in flight; both stages start in one half and wait in the other.

    Args:
        group: the layer's ranks.
        max_tokens: M; None: the ranks exchange their T (on a CPU).
        scheme: of the layer; where the plan's payload is its name, rows are quantized before they travel.
    """

    def __init__(self, group: Group, *, max_tokens: int | None = None, scheme: QuantScheme = UNQUANTIZED) -> None:
        self.group = group
        self.max_tokens = max_tokens
        self.scheme = scheme

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
        return self.prepare_start(
            hidden_states, routing, num_experts=num_experts, expert_map=expert_map, payload=payload
        )()

    def finalize(self, expert_out: torch.Tensor, handle: object, routing: Routing, out: torch.Tensor) -> None:
        """Sum `expert_out` `[R, H]` over the ranks; `out` `[T, H]` gets this rank's rows of the sum."""
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
        """Start to gather. Without `max_tokens` the ranks tell each other their T here, before."""
        spec = payload_spec(payload, self.scheme, "all_gather")
        sizes = self._sizes(hidden_states)
        row = WireRow(hidden_states.shape[1], hidden_states.dtype, routing.topk_ids.shape[1], spec, weighted=True)
        finish = self.group.all_gather_start(row.pack(hidden_states, routing, sizes[self.group.rank]), sizes)

        def receive() -> Dispatched:
            rows = row.unpack(finish())
            return Dispatched(
                x=rows.x,
                x_scale=None if rows.x_scale is None else rows.x_scale.contiguous(),
                handle=_Handle(sizes),
                topk_ids=rows.topk_ids if expert_map is None else local_ids(rows.topk_ids, expert_map),
                topk_weights=rows.topk_weights,
            )

        return receive

    def finalize_start(
        self, expert_out: torch.Tensor, handle: object, routing: Routing, out: torch.Tensor
    ) -> Callable[[], None]:
        """Start the sum over ranks."""
        if not isinstance(handle, _Handle) or handle.consumed:
            raise MoEError(
                f"dispatch all_gather: finalize got handle = {handle!r}; it takes the handle of one prepare, exactly "
                "once"
            )
        handle.consumed = True
        finish = self.group.reduce_scatter_start(expert_out, handle.sizes)

        def receive() -> None:
            out.copy_(finish()[: out.shape[0]])

        return receive

    def release(self, handle: object) -> None:
        """An exception came between `prepare` and `finalize`: no buffer is pooled, so only the handle is closed."""
        if isinstance(handle, _Handle):
            handle.consumed = True

    def check(self) -> None:
        """Wait for the steps under way: on NCCL they have no timeout, at least not in a graph.

        Raises:
            CollectiveError: they are not done within the group's timeout.
        """
        self.group.await_device("prepare or finalize of all_gather")

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


def footprint(problem: Problem, payload: str, tokens: int) -> DispatchFootprint:
    """With tokens of each rank's own. M rows of every rank are gathered, and as many sums scattered."""
    config, parallel = problem.config, problem.parallel
    ranks = max(parallel.ep_size, parallel.tp_size)
    sent = tokens if config.max_tokens_per_rank is None else config.max_tokens_per_rank
    spec, hidden = payload_spec(payload, problem.scheme, "all_gather"), config.experts_hidden_size
    row = WireRow(hidden, config.dtype, config.top_k, spec, weighted=True).row_bytes
    sums = sent * hidden * config.dtype.itemsize
    scales = ranks * sent * payload_row_bytes(problem, payload)[1]
    told = torch.int64.itemsize if config.max_tokens_per_rank is None else 0
    local = ranks * sent * config.top_k * torch.int32.itemsize if parallel.ep_size > 1 else 0
    held = ranks * sent * row + scales + local
    return DispatchFootprint(
        rows=ranks * sent,
        dispatch_wire_bytes=(ranks - 1) * (sent * row + told),
        combine_wire_bytes=(ranks - 1) * sums,
        held_bytes=held,
        scratch_bytes=max(
            sent * row + quantizing_bytes(problem, payload, tokens) - held,  # before anything of `held` is there
            sent * row + local,
            sums,
        ),
    )
