"""What travels between ranks in a step, in two forms of the same exchange.

Shape letters: T tokens on this rank · H hidden · E experts, global · E_l local experts · K top-k · W ranks ·
M the largest T of any rank (`MoEConfig.max_tokens_per_rank`) · R received rows · C = M · W row capacity per local
expert · D = min(K, the largest E_l) rows that a token can make for one rank.

*Exact*: the ranks tell each other their counts, which are values on the host, and send what there is. *Fixed*: M rows
to and M · D from every rank on every step, without asking anybody for anything. A CPU takes the first, everything else
the second.

A row's ids travel with it, so the receiver needs nobody's counts to know what it got, and the sender knows without
being told in which order the rows of its choices come back: by rank, and there ascending by (token, k).
"""

from __future__ import annotations

from typing import Protocol

import attrs
import torch

from moe_batched import rows
from moe_batched.owners import Owners, first_of, is_first
from moe_core.interfaces import Group
from moe_core.types import Routing
from moe_core.wire import WireRow


@attrs.frozen(eq=False)
class Outgoing:
    """What a rank sends, and what it will get for it.

    Attributes:
        rows: uint8 `[rows to send, row_bytes]`, by rank.
        send, receive: rows of tokens to and from each rank.
        due, owed: rows of results from and to each rank.
        home: int64 `[T, K]`, where each choice's row stands among those that come back; -1 for none.
    """

    rows: torch.Tensor
    send: list[int]
    receive: list[int]
    due: list[int]
    owed: list[int]
    home: torch.Tensor


class Exchange(Protocol):
    """One of the two forms."""

    def outgoing(self, row: WireRow, hidden_states: torch.Tensor, routing: Routing) -> Outgoing:
        """What to send for `hidden_states` `[T, H]`; `row` says how a row travels."""

    def answer(self, y: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """The rows to send back, `[sum of owed, H]`.

        Args:
            y: `[E_l · C, H]`, raw rows of experts.
            place: int64 `[R, K]`, the row in `y` of each choice of the received rows, or -1.
        """


@attrs.frozen
class Fixed:
    """The most that can be, in both directions: the same on every step, and nothing on the host depends on values.

    Attributes:
        owners: which rank has which expert.
        max_tokens: M.
        most: D.
    """

    owners: Owners
    max_tokens: int
    most: int

    def outgoing(self, row: WireRow, hidden_states: torch.Tensor, routing: Routing) -> Outgoing:
        blocks, home = rows.spread(row, hidden_states, routing, self.owners, self.max_tokens, self.most)
        there, back = ([count] * self.owners.ranks for count in (self.max_tokens, self.max_tokens * self.most))
        return Outgoing(blocks, send=there, receive=there, due=back, owed=back, home=home)

    def answer(self, y: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return rows.from_slots(y, place, self.most)


@attrs.frozen
class Exact:
    """What there is. The ranks tell each other their counts, and this one waits for values on the host.

    Attributes:
        owners: which rank has which expert.
        group: the layer's ranks.
    """

    owners: Owners
    group: Group

    def outgoing(self, row: WireRow, hidden_states: torch.Tensor, routing: Routing) -> Outgoing:
        ids, ranks = routing.topk_ids, self.owners.ranks
        wants = self.owners.wants(ids)
        tokens = wants.any(dim=1)  # [T, W]
        mine = torch.stack([tokens.sum(0), wants.sum((0, 1))], dim=1)
        theirs = self.group.all_to_all(mine, [1] * ranks, [1] * ranks)
        send, due = mine.T.tolist()
        receive, owed = theirs.T.tolist()
        _, token, k = wants.permute(2, 0, 1).nonzero().unbind(1)  # as they come back
        home = torch.full(ids.shape, -1, dtype=torch.int64, device=ids.device)
        home[token, k] = torch.arange(token.shape[0], device=ids.device)
        packed = row.pack(hidden_states, routing, ids.shape[0])
        return Outgoing(
            packed.index_select(0, tokens.T.nonzero()[:, 1]),
            send=send,
            receive=receive,
            due=due,
            owed=owed,
            home=home.gather(1, first_of(ids)),
        )

    def answer(self, y: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return y.index_select(0, place[is_first(place) & (place >= 0)])
