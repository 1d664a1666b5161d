"""Where everything lies in a rank's symmetric memory, and the arithmetic of the protocol. Pure: no tensors, no device.

Shape letters: T tokens on this rank · M the largest T of any rank · H hidden · P pitch of a row, H rounded up to whole
16-byte pieces · E experts, global · K top-k · W ranks.

A lane is what one micro-batch in flight uses. Every rank has the same lanes at the same offsets, and writes into the
others' with plain stores:

    dispatched [W], combined [W]   int32 counters, one per source rank; only ever rise
    counts [2, W]                  int32, how many tokens each source has, by the epoch's parity
    epochs [2]                     int32, this rank's own: combines ended, dispatches begun
    fault                          int32, 0 or what `fault_code` makes, from whichever rank has waited in vain
    ids, weights [W · M, K]        int32 local ids or -1, fp32: row source · M + token
    rows [W · M, P]                the tokens' rows, in the same places
    sums [W · M, P]                what comes back: row owner · M + token

The protocol, in a step (an epoch) of a lane. Each rank writes ids, weights and rows into the memory of those that hold
a chosen expert, then adds to its counter there, and waits until every rank's counter here has reached epoch · UNITS.
Experts run. Each rank writes the experts' rows into `sums` at their sources, sets the ids it has read to -1, counts and
waits in the same way, and adds up. Every rank counts at every rank in both halves, with or without tokens. So whoever
has passed the wait of a combine knows that all have read what was dispatched, and may write the next dispatch; and
whoever has passed the wait of a dispatch knows that all have ended the combine before. Nothing is ever reset, and no
buffer is doubled but `counts`, which a program without work may read late.
"""

from __future__ import annotations

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
DISPATCH, COMBINE = 1, 2
STAGES = {DISPATCH: "dispatch", COMBINE: "combine"}
_BLOCK = 256
"""Bytes. Areas start at multiples of it; counters of different areas share no cache line."""


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
        item: bytes of an element of a row.
    """

    ranks: int
    max_tokens: int
    hidden: int
    top_k: int
    item: int

    @property
    def rows(self) -> int:
        """W · M."""
        return self.ranks * self.max_tokens

    @property
    def pitch(self) -> int:
        """P, in elements."""
        return _aligned(self.hidden * self.item, ROW_ALIGNMENT) // self.item

    @functools.cached_property
    def offsets(self) -> dict[str, int]:
        """Area → its offset in a lane; "end": the size of a lane."""
        choices, rows = self.rows * self.top_k * 4, self.rows * self.pitch * self.item
        areas = {
            "dispatched": self.ranks * 4,
            "combined": self.ranks * 4,
            "counts": 2 * self.ranks * 4,
            "epochs": 2 * 4,
            "fault": 4,
            "ids": choices,
            "weights": choices,
            "rows": rows,
            "sums": rows,
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


def signalling(items: int, programs: int) -> int:
    """How many programs count at the other ranks: those with work, or one."""
    return max(min(items, programs), 1)


def units(program: int, active: int) -> int:
    """What a program adds: all that count together make UNITS."""
    return UNITS - active + 1 if program == 0 else 1


def dispatch_programs(tokens: int) -> int:
    """The grid of a dispatch, by T: beyond what fills the links, each program is one more count to wait for."""
    return next((programs for most, programs in ((2, 16), (16, 32), (256, 64)) if tokens <= most), 128)


def combine_programs(max_tokens: int) -> int:
    """The grid of a combine, by M, since T of the other ranks is known on the device only; idle programs just end.

    All programs that wait must run at once: 128 of 16 warps fit on every GPU that this is for.
    """
    return 64 if max_tokens <= 256 else 128


def fault_code(stage: int, waiting: int, missing: int) -> int:
    """One word: rank `waiting` waited in `stage` for rank `missing` in vain."""
    return (stage << 16) | (waiting << 8) | missing


def describe_fault(code: int) -> str:
    stage, waiting, missing = code >> 16, (code >> 8) & 0xFF, code & 0xFF
    return f"rank {waiting} waited for rank {missing} in {STAGES[stage]}"
