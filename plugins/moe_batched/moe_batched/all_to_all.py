"""Tokens to the ranks of their experts, into `[E_l, C, H]`, and the experts' rows back: two all-to-alls a step.

Shape letters: T tokens on this rank · H hidden · E experts, global · E_l local experts · K top-k · W ranks ·
M the largest T of any rank (`MoEConfig.max_tokens_per_rank`) · R received rows · C = M · W row capacity per local
expert.

    prepare    row [t] with all its ids ─► each rank that has one of its experts, once  ─► [E_l, C, H]
    finalize   one raw row per choice   ◄─ weighed and summed where the token lives     ◄─ [E_l, C, H]

Equal ids in a row make one row there and one back; their weights add up at the source. Rows travel in the model dtype,
or quantized row by row where the scheme allows it; results in the model dtype. `exchange.py` says how many of them.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch

from moe_batched.exchange import Exact, Exchange, Fixed
from moe_batched.owners import Owners
from moe_batched.prepare_finalize import BatchedPrepareAndFinalize
from moe_batched.rows import weigh_and_sum
from moe_core.config import MoEConfig, MoEParallelConfig, Problem
from moe_core.errors import CapacityError, MoEError
from moe_core.interfaces import Group, PrepareAndFinalize
from moe_core.quant import UNQUANTIZED, QuantScheme
from moe_core.types import Dispatched, ExpertPlacement, Routing
from moe_core.wire import WireRow, payload_spec


@attrs.define
class ExchangeHandle:
    """One step between its two all-to-alls.

    Attributes:
        exchange: the form that its first half took.
        home: int64 `[T, K]`, the row of each choice among those that come back; -1 for none.
        place: int64 `[R, K]`, where each choice of the received rows stands in the flattened `[E_l · C, H]`, or -1.
        owed: rows to send back to each rank.
        due: rows that come back from each rank.
        consumed: `finalize` or `release` has had it.
    """

    exchange: Exchange
    home: torch.Tensor
    place: torch.Tensor
    owed: list[int]
    due: list[int]
    consumed: bool = False


class AllToAllPrepareAndFinalize(PrepareAndFinalize):
    """BATCHED format over several ranks with tokens of their own; any placement, any shares, T = 0 included.

    Both stages start their all-to-all in one half and wait for it in the other.

    Args:
        group: the layer's ranks.
        num_experts: E.
        placement: which rank holds which expert.
        num_local_experts: E_l of this rank.
        top_k: K.
        max_tokens: M.
        exact: send what there is, after telling each other the counts; None: on a CPU.
        scheme: of the layer; where the plan's payload is its name, rows are quantized before they travel.
    """

    def __init__(
        self,
        group: Group,
        *,
        num_experts: int,
        placement: ExpertPlacement,
        num_local_experts: int,
        top_k: int,
        max_tokens: int,
        exact: bool | None = None,
        scheme: QuantScheme = UNQUANTIZED,
    ) -> None:
        self.group = group
        self.max_tokens = max_tokens
        self.exact = exact
        self.scheme = scheme
        self.local = BatchedPrepareAndFinalize(num_local_experts, max_tokens=max_tokens * group.size, scheme=scheme)
        owners = Owners(num_experts, group.size, placement)
        self._exact = Exact(owners, group)
        self._fixed = Fixed(owners, max_tokens, most_rows(num_experts, top_k, group.size))

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

    def finalize(self, expert_out: torch.Tensor, handle: object, routing: Routing, out: torch.Tensor) -> None:
        """Send every choice's raw row home; there, weigh and sum in fp32, in the order of K, and round once."""
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
        """Start the exchange. Its exact form tells the counts here, before."""
        tokens, hidden = hidden_states.shape
        if tokens > self.max_tokens:
            raise CapacityError(
                f"dispatch batched, rank {self.group.rank}: T = {tokens} tokens, but max_tokens_per_rank = "
                f"{self.max_tokens} sized the buffers; raise it in MoEConfig, or pass fewer tokens a step"
            )
        spec = payload_spec(payload, self.scheme, "batched")
        row = WireRow(hidden, hidden_states.dtype, routing.topk_ids.shape[1], spec, weighted=False)
        exact = hidden_states.device.type == "cpu" if self.exact is None else self.exact
        exchange: Exchange = self._exact if exact else self._fixed
        sent = exchange.outgoing(row, hidden_states, routing)
        finish = self.group.all_to_all_start(sent.rows, sent.send, sent.receive)
        home, owed, due = sent.home, sent.owed, sent.due  # not `sent` in what follows: it would keep the rows

        def receive() -> Dispatched:
            rows = row.unpack(finish())
            dispatched = self.local.pack(rows.x, rows.x_scale, rows.topk_ids, expert_map)
            return attrs.evolve(dispatched, handle=ExchangeHandle(exchange, home, dispatched.handle.place, owed, due))

        return receive

    def finalize_start(
        self, expert_out: torch.Tensor, handle: object, routing: Routing, out: torch.Tensor
    ) -> Callable[[], None]:
        """Start to send the rows home."""
        if not isinstance(handle, ExchangeHandle) or handle.consumed:
            used = "one that was consumed" if isinstance(handle, ExchangeHandle) else repr(handle)
            raise MoEError(f"dispatch batched: finalize got {used}; it takes the handle of one prepare, exactly once")
        handle.consumed = True
        rows = handle.exchange.answer(expert_out.flatten(0, 1), handle.place)
        finish = self.group.all_to_all_start(rows, handle.owed, handle.due)

        def receive() -> None:
            weigh_and_sum(finish(), handle.home, routing.topk_weights, out)

        return receive

    def release(self, handle: object) -> None:
        """An exception came between `prepare` and `finalize`: no buffer is pooled, so only the handle is closed."""
        if isinstance(handle, ExchangeHandle):
            handle.consumed = True

    def check(self) -> None:
        """Wait for the steps under way: on NCCL they have no timeout, at least not in a graph.

        Raises:
            CollectiveError: they are not done within the group's timeout.
        """
        self.group.await_device("prepare or finalize of batched")


def make(
    config: MoEConfig,
    parallel: MoEParallelConfig,
    scheme: QuantScheme,
    group: Group | None,
    placement: ExpertPlacement,
) -> PrepareAndFinalize:
    """The form that a layer needs: without an exchange where every rank has all of its tokens already."""
    num_local_experts = Problem(config=config, parallel=parallel).num_local_experts
    most = config.max_tokens_per_rank
    if parallel.ep_size == 1 or parallel.tokens_are_replicated:
        return BatchedPrepareAndFinalize(num_local_experts, max_tokens=most, scheme=scheme)
    if group is None or most is None:
        raise MoEError(f"dispatch batched between ranks: group = {group}, max_tokens_per_rank = {most}; pass both")
    return AllToAllPrepareAndFinalize(
        group,
        num_experts=config.num_experts,
        placement=placement,
        num_local_experts=num_local_experts,
        top_k=config.top_k,
        max_tokens=most,
        scheme=scheme,
    )


def most_rows(num_experts: int, top_k: int, ranks: int) -> int:
    """D: a token makes at most one row for each of a rank's experts, and at most K."""
    return min(top_k, -(-num_experts // ranks))
