"""Tokens to the ranks of their experts, into `[E_l, C, H]`, and the experts' rows back: two all-to-alls a step.

Shape letters: T tokens on this rank · H hidden · E experts, global · E_l local experts · K top-k · W ranks ·
M the largest T of any rank (`MoEConfig.max_tokens_per_rank`) · R received rows · C = M · W row capacity per local
expert · D = M · min(K, the largest E_l) rows that a rank can owe another one.

    prepare    row [t] with all its ids ─► each rank that has one of its experts, once  ─► [E_l, C, H]
    finalize   one raw row per choice   ◄─ weighed and summed where the token lives     ◄─ [E_l, C, H]

The ids travel with the row, so the receiver needs nobody's counts to know what it got, and the sender knows without
being told in which order the rows of its choices come back: ascending (token, k), per rank. Equal ids in a row make
one row there and one back; their weights add up at the source.

Rows travel in the model dtype, or quantized row by row where the scheme allows it; results in the model dtype.

Two forms of the same exchange. *Exact*: the ranks tell each other their counts first, which are values on the host, and
send what there is. *Fixed*: M rows to and D rows from every rank on every step, without asking the device for
anything. A CPU takes the first, everything else the second.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch

from moe_batched.prepare_finalize import BatchedHandle, BatchedPrepareAndFinalize, weigh_and_sum
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
        place: int64 `[T, K]`, the row of each choice among those that come back.
        kept: bool `[T, K]`, the choice has an expert.
        back: int64 `[rows to send back]`, where in the flattened `[E_l · C, H]` each of them stands.
        owed: rows to send back to each rank.
        due: rows that come back from each rank.
        consumed: `finalize` or `release` has had it.
    """

    place: torch.Tensor
    kept: torch.Tensor
    back: torch.Tensor
    owed: list[int]
    due: list[int]
    consumed: bool = False


@attrs.frozen(eq=False)
class _Traffic:
    """How many rows go where in one step. Lists are for the collectives, tensors for the arithmetic on the device.

    Attributes:
        send, receive: rows of tokens to and from each rank.
        due, owed: rows of results from and to each rank.
        send_starts, due_starts, owed_starts: int64 `[W]`, exclusive sums.
        source: int64 `[R]`, the rank that each received row is from.
    """

    send: list[int]
    receive: list[int]
    due: list[int]
    owed: list[int]
    send_starts: torch.Tensor
    due_starts: torch.Tensor
    owed_starts: torch.Tensor
    source: torch.Tensor


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
        self.num_experts = num_experts
        self.placement = placement
        self.max_tokens = max_tokens
        self.exact = exact
        self.scheme = scheme
        self.local = BatchedPrepareAndFinalize(num_local_experts, max_tokens=max_tokens * group.size, scheme=scheme)
        self._most_owed = most_owed(num_experts, top_k, max_tokens, group.size)

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
        tokens, size, top_k = hidden_states.shape[0], self.group.size, routing.topk_ids.shape[1]
        if tokens > self.max_tokens:
            raise CapacityError(
                f"dispatch batched, rank {self.group.rank}: T = {tokens} tokens, but max_tokens_per_rank = "
                f"{self.max_tokens} sized the buffers; raise it in MoEConfig, or pass fewer tokens a step"
            )
        spec = payload_spec(payload, self.scheme, "batched")
        row = WireRow(hidden_states.shape[1], hidden_states.dtype, top_k, spec, weighted=False)
        choices = _Choices.of(routing.topk_ids, self.owner(routing.topk_ids), size)
        exact = hidden_states.device.type == "cpu" if self.exact is None else self.exact
        traffic = self._counted(choices) if exact else self._fixed(hidden_states.device)
        sent = _rows_to_send(row.pack(hidden_states, routing, tokens + 1), choices, traffic)
        finish = self.group.all_to_all_start(sent, traffic.send, traffic.receive)

        def receive() -> Dispatched:
            rows = row.unpack(finish())
            dispatched = self.local.pack(rows.x, rows.x_scale, rows.topk_ids, expert_map)
            back = self._back(rows.topk_ids, dispatched.handle, traffic)
            place = choices.places(traffic.due_starts, 0)
            return attrs.evolve(dispatched, handle=ExchangeHandle(place, choices.kept, back, traffic.owed, traffic.due))

        return receive

    def finalize_start(
        self, expert_out: torch.Tensor, handle: object, routing: Routing, out: torch.Tensor
    ) -> Callable[[], None]:
        """Start to send the rows home."""
        if not isinstance(handle, ExchangeHandle) or handle.consumed:
            used = "one that was consumed" if isinstance(handle, ExchangeHandle) else repr(handle)
            raise MoEError(f"dispatch batched: finalize got {used}; it takes the handle of one prepare, exactly once")
        handle.consumed = True
        rows = expert_out.flatten(0, 1).index_select(0, handle.back)
        finish = self.group.all_to_all_start(rows, handle.owed, handle.due)

        def receive() -> None:
            weigh_and_sum(finish(), handle.place, handle.kept, routing.topk_weights, out)

        return receive

    def release(self, handle: object) -> None:
        """An exception came between `prepare` and `finalize`: no buffer is pooled, so only the handle is closed."""
        if isinstance(handle, ExchangeHandle):
            handle.consumed = True

    def owner(self, ids: torch.Tensor) -> torch.Tensor:
        """The rank of each expert, int64 like `ids` `[T, K]`; W where the id is -1.

        Arithmetic and not a table, so that nothing has to be copied to a device in a first step, which may be a graph
        capture. It is `ExpertMapManager`'s placement, and a test holds it to that.
        """
        ids, size = ids.long(), self.group.size
        if self.placement is ExpertPlacement.ROUND_ROBIN:
            rank = ids % size
        else:
            share, remainder = divmod(self.num_experts, size)
            first_short = remainder * (share + 1)  # from here on ranks hold `share` experts, before it one more
            rank = torch.where(ids < first_short, ids // (share + 1), remainder + (ids - first_short) // share)
        return torch.where(ids < 0, size, rank)

    def _fixed(self, device: torch.device) -> _Traffic:
        """The most that can be, in both directions: the same on every step, known without asking anybody."""
        size, tokens, rows = self.group.size, self.max_tokens, self._most_owed
        ranks = torch.arange(size, device=device)
        return _Traffic(
            send=[tokens] * size,
            receive=[tokens] * size,
            due=[rows] * size,
            owed=[rows] * size,
            send_starts=ranks * tokens,
            due_starts=ranks * rows,
            owed_starts=ranks * rows,
            source=torch.arange(size * tokens, device=device) // tokens,
        )

    def _counted(self, choices: _Choices) -> _Traffic:
        """What there is. The ranks tell each other, which waits for values on the host."""
        size = self.group.size
        mine = torch.stack([choices.wanted.sum(0), choices.rows.sum(0)], dim=1)
        theirs = self.group.all_to_all(mine, [1] * size, [1] * size)
        send, due = mine.T.tolist()
        receive, owed = theirs.T.tolist()
        return _Traffic(
            send=send,
            receive=receive,
            due=due,
            owed=owed,
            send_starts=mine[:, 0].cumsum(0) - mine[:, 0],
            due_starts=mine[:, 1].cumsum(0) - mine[:, 1],
            owed_starts=theirs[:, 1].cumsum(0) - theirs[:, 1],
            source=torch.repeat_interleave(theirs[:, 0]),
        )

    def _back(self, ids: torch.Tensor, handed: BatchedHandle, traffic: _Traffic) -> torch.Tensor:
        """int64 `[rows to send back]`: where in `[E_l · C, H]` each stands, in the order in which it was asked for."""
        size, total = self.group.size, sum(traffic.owed)
        asked = _Choices.of(ids, torch.where(handed.kept, traffic.source.unsqueeze(1), size), size)
        # What a slot that nobody asked for sends is never read, so any row will do: row 0.
        back = torch.zeros(total + 1, dtype=torch.int64, device=ids.device)
        back.scatter_(0, asked.places(traffic.owed_starts, total).flatten(), handed.place.flatten())
        return back[:-1]


def _rows_to_send(packed: torch.Tensor, choices: _Choices, traffic: _Traffic) -> torch.Tensor:
    """uint8 `[rows to send, …]`, by rank and ascending by token.

    Args:
        packed: uint8 `[T + 1, …]`, every row once; the last fills a fixed-size block up.
    """
    tokens, size = choices.wanted.shape
    total = sum(traffic.send)
    slot = choices.wanted.cumsum(0) - 1 + traffic.send_starts
    token_of = torch.full((total + 1,), tokens, dtype=torch.int64, device=packed.device)
    every = torch.arange(tokens, device=packed.device).unsqueeze(1).expand(tokens, size)
    token_of.scatter_(0, slot.masked_fill(~choices.wanted, total).flatten(), every.flatten())
    return packed.index_select(0, token_of[:-1])


@attrs.frozen(eq=False)
class _Choices:
    """Which rank each choice of some rows belongs to, equal ids of a row taken as one.

    Attributes:
        owner: int64 `[N, K]`, the rank; W for none.
        first: int64 `[N, K]`, the first k of the row with the same id.
        rows: bool `[N · K, W]`, the choice is the first of its id, and that rank's.
    """

    owner: torch.Tensor
    first: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, owner: torch.Tensor, size: int) -> _Choices:
        first = (ids.unsqueeze(2) == ids.unsqueeze(1)).to(torch.int8).argmax(dim=2)
        alone = first == torch.arange(ids.shape[1], device=ids.device)
        ranks = torch.arange(size, device=ids.device)
        rows = (owner.masked_fill(~alone, size).unsqueeze(2) == ranks).flatten(0, 1)
        return cls(owner, first, rows)

    @property
    def kept(self) -> torch.Tensor:
        """bool `[N, K]`: the choice belongs to a rank."""
        return self.owner < self.rows.shape[1]

    @property
    def wanted(self) -> torch.Tensor:
        """bool `[N, W]`: the row has a choice of that rank's."""
        return self.rows.view(*self.owner.shape, self.rows.shape[1]).any(dim=1)

    def places(self, starts: torch.Tensor, nowhere: int) -> torch.Tensor:
        """int64 `[N, K]`: the place of each choice when rows are grouped by rank and ascend by (row, k) in a group.

        Args:
            starts: int64 `[W]`, where each rank's group begins.
            nowhere: stands for choices of no rank.
        """
        slot = self.rows.cumsum(0) - 1 + starts
        rank = self.owner.clamp(max=self.rows.shape[1] - 1)
        slot = slot.view(*self.owner.shape, self.rows.shape[1]).gather(2, rank.unsqueeze(2)).squeeze(2)
        return slot.gather(1, self.first).masked_fill(~self.kept, nowhere)


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


def most_owed(num_experts: int, top_k: int, max_tokens: int, ranks: int) -> int:
    """D: a token makes at most one row for each of a rank's experts, and at most K."""
    return max_tokens * min(top_k, -(-num_experts // ranks))
