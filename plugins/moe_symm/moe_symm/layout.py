"""Where everything lies in a rank's symmetric memory, and the arithmetic of the protocol. Pure: no tensors, no device.

Shape letters: T tokens on this rank · M the largest T of any rank · H hidden · P pitch of a row, H rounded up to whole
16-byte pieces · E experts, global · K top-k · W ranks.

A lane is what one micro-batch in flight uses. Every rank has the same lanes at the same offsets, and writes into the
others' with plain stores:

    dispatched [W], combined [W]   int32 counters, one per source rank; only ever rise
    counts [2, W]                  int32, how many tokens each source has, by the epoch's parity
    epochs [2]                     int32, this rank's own: combines ended, dispatches begun
    fault                          int32, 0 or what `fault_code` makes, from whichever rank has waited in vain
    ids, weights [W · M, K]        int32 local ids or -1, fp32: row token · W + source, so that all ranks' first tokens
                                   come first
    num_rows                       int32, this rank's own: W · the most tokens of any rank, past which is no row
    rows [W · M, P]                the tokens' rows, in the same places; quantized ones with a pitch of their own
    scales [W · M, G]              fp32, beside quantized rows
    sums [W · M, P]                what comes back: row owner · M + token; in the exact form [M · K, P]: a row a choice
    places [W · M, K]              int32, this rank's own: where a choice stands in [E_l · C], or -1; not in the
                                   standard form

The protocol, in a step (an epoch) of a lane. Each rank writes ids, weights and rows into the memory of those that hold
a chosen expert, then adds to its counter there, and waits until every rank's counter here has reached epoch · UNITS.
Experts run. Each rank writes the experts' rows into `sums` at their sources, sets the ids it has read to -1, counts and
waits in the same way, and adds up. Every rank counts at every rank in both halves, with or without tokens. So whoever
has passed the wait of a combine knows that all have read what was dispatched, and may write the next dispatch; and
whoever has passed the wait of a dispatch knows that all have ended the combine before. Nothing is ever reset, and no
buffer is doubled but `counts`, which a program without work may read late.

With many tokens (`Layout.bulk`) a combine fetches: the experts write into `sums` of their own rank, row token · W +
source; each rank clears ids, counts and waits as before, and then reads its rows in the others' `sums`. They stay until
the experts run again, which is after the wait of the next dispatch.

In the batched and exact forms a further kernel does the wait of the dispatch, and copies each row to its place among
the rows of each of its experts: a place follows from the ids that have arrived, so that nothing more has to travel.
"""

from __future__ import annotations

import enum
import functools

import attrs

from moe_core.types import ExpertPlacement

LANES = 2
"""Micro-batches in flight."""
UNITS = 256
"""What a rank adds to a counter in one half, however many programs it runs: ranks choose their grids freely."""
MAX_RANKS = 8
"""GPUs of one host that see each other's memory over NVLink switches."""
ROW_ALIGNMENT = 16
"""Bytes: one vector store."""
BULK_FROM = 1024
"""M from which the experts' rows are fetched by the ranks of their tokens, instead of sent. On 4 H200 sending is 3 %
faster at 512 tokens, fetching 6 % at 4096."""
SCALE_GROUP = 128
"""Columns of a quantized row that share a scale."""
DISPATCH, COMBINE = 1, 2
STAGES = {DISPATCH: "dispatch", COMBINE: "combine"}
_BLOCK = 256
"""Bytes. Areas start at multiples of it; counters of different areas share no cache line."""


class Form(enum.Enum):
    """What a rank's experts get and give, and what travels back."""

    STANDARD = "standard"
    """`[W · M, H]` there and back: the experts weight and sum. One row for each (token, rank) on the wire."""
    BATCHED = "batched"
    """`[E_l, C, H]`: the combine weights and sums, at the experts' rank. The same rows on the wire."""
    EXACT = "exact"
    """`[E_l, C, H]`: the combine weights and sums at the token's rank, so a row for each choice travels back."""


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


@attrs.frozen
class Layout:
    """One lane, and the memory of one rank. Offsets and sizes are in bytes.

    Attributes:
        ranks: W.
        max_tokens: M.
        hidden: H.
        top_k: K.
        item: bytes of an element of a row in the model dtype.
        form: what the experts get and give.
    """

    ranks: int
    max_tokens: int
    hidden: int
    top_k: int
    item: int
    form: Form = Form.STANDARD

    @property
    def rows(self) -> int:
        """W · M."""
        return self.ranks * self.max_tokens

    @property
    def pitch(self) -> int:
        """P, in elements."""
        return _aligned(self.hidden * self.item, ROW_ALIGNMENT) // self.item

    @property
    def bulk(self) -> bool:
        """Sized for many tokens."""
        return self.form is Form.STANDARD and self.max_tokens >= BULK_FROM

    @property
    def quantized_pitch(self) -> int:
        """From one quantized row to the next, in bytes."""
        return _aligned(self.hidden, ROW_ALIGNMENT)

    @property
    def groups(self) -> int:
        """G."""
        return -(-self.hidden // SCALE_GROUP)

    @property
    def scale_pitch(self) -> int:
        """From one row's scales to the next row's, in scales."""
        return _aligned(self.groups * 4, ROW_ALIGNMENT) // 4

    @property
    def sums(self) -> int:
        """Rows that come back."""
        return self.max_tokens * self.top_k if self.form is Form.EXACT else self.rows

    @functools.cached_property
    def offsets(self) -> dict[str, int]:
        """Area → its offset in a lane; "end": the size of a lane."""
        choices, row = self.rows * self.top_k * 4, self.pitch * self.item
        areas = {
            "dispatched": self.ranks * 4,
            "combined": self.ranks * 4,
            "counts": 2 * self.ranks * 4,
            "epochs": 2 * 4,
            "fault": 4,
            "num_rows": 4,
            "ids": choices,
            "weights": choices,
            "rows": self.rows * row,
            "scales": self.rows * self.scale_pitch * 4,
            "sums": self.sums * row,
            "places": 0 if self.form is Form.STANDARD else choices,
        }
        offsets, end = {}, 0
        for name, size in areas.items():
            offsets[name] = end
            end += _aligned(size, _BLOCK)
        return offsets | {"end": end}

    @property
    def lane_bytes(self) -> int:
        return self.offsets["end"]

    @property
    def total_bytes(self) -> int:
        return LANES * self.lane_bytes

    def begin(self, lane: int, area: str) -> int:
        """Where an area of a lane starts in the memory."""
        return lane * self.lane_bytes + self.offsets[area]


@attrs.frozen
class Shares:
    """Which rank holds an expert, by arithmetic: a table would be one more load before a row can leave.

    LINEAR: the first `more` ranks hold `share` + 1 experts in a row, the others `share`. Else expert e is on e mod W.

    Attributes:
        ranks: W.
        share, more: E // W and E mod W.
        linear: the placement.
    """

    ranks: int
    share: int
    more: int
    linear: bool

    @classmethod
    def of(cls, num_experts: int, ranks: int, placement: ExpertPlacement) -> Shares:
        share, more = divmod(num_experts, ranks)
        return cls(ranks, share, more, placement is ExpertPlacement.LINEAR)

    def held(self, rank: int) -> int:
        """E_l."""
        return self.share + (rank < self.more)

    def place(self, expert: int) -> tuple[int, int]:
        """Global id → (rank, local id there)."""
        if not self.linear:
            return expert % self.ranks, expert // self.ranks
        split = self.more * (self.share + 1)
        if expert < split:
            return expert // (self.share + 1), expert % (self.share + 1)
        return self.more + (expert - split) // self.share, (expert - split) % self.share


def work_item(item: int, rank: int, ranks: int, programs: int) -> tuple[int, int]:
    """Item → (token, rank at the other end). Each token meets each rank once.

    Neighbouring programs serve different ranks, and one program another rank each round, so that no link is left idle
    where only some ranks have tokens.
    """
    token = item // ranks
    return token, (rank + 1 + item % ranks + token * ranks // programs) % ranks


def row_of(token: int, source: int, ranks: int) -> int:
    """Where a rank finds what a source has sent of a token."""
    return token * ranks + source


def signalling(items: int, programs: int) -> int:
    """How many programs count at the other ranks: those with work, or one."""
    return max(min(items, programs), 1)


def units(program: int, active: int) -> int:
    """What a program adds: all that count together make UNITS."""
    return UNITS - active + 1 if program == 0 else 1


def fault_code(stage: int, waiting: int, missing: int) -> int:
    """One word: rank `waiting` waited in `stage` for rank `missing` in vain."""
    return (stage << 16) | (waiting << 8) | missing


def describe_fault(code: int) -> str:
    stage, waiting, missing = code >> 16, (code >> 8) & 0xFF, code & 0xFF
    return f"rank {waiting} waited for rank {missing} in {STAGES[stage]}"
