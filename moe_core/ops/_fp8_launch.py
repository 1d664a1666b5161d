"""Which kernels run an FP8 experts step, and with which launch parameters: pure functions of host-known facts.

Paths as in `_launch.py`. T tokens · H hidden · I intermediate · E_l local experts · K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_core.ops._fp8_weights import FP8_GROUP, Fp8Format
from moe_core.ops._launch import (
    MAX_ALTERNATING,
    MAX_SCAN_SLOTS,
    RANGE_ENDS,
    AlternatingConfig,
    ExpertsProblem,
    ScanConfig,
    SlotsConfig,
    TileConfig,
    distinct_experts,
)

SMALL_STEP = 64 << 20
"""Bytes of weights up to which a single token's step is better off with two kernels that convert weights in registers:
above, a matrix unit that reads e4m3 by itself outweighs three more launches."""

STREAM_TOKENS = 8
"""Tokens of a step that the stream path takes: the columns of its matrix products."""

MAX_STREAM_SLOTS = 128
"""Ids of a step that it takes: every program compares each with each."""

MAX_STREAM_PROGRAMS = 144
"""Its programs at most: as many as the largest Hopper chip has multiprocessors. Scratch is for them, on any device."""

STREAM_STEP = 80 << 20
"""Bytes of weights from which a step is better off on the stream path than by slot: 74 MB took 8 % longer (Qwen3-30B, 2
tokens), 87 MB 5 % less (DeepSeek-V3, TP 8, 2), 136 MB 1 to 2 % less (Qwen3, 4), 244 MB 13 to 16 % less (Qwen3, 8)."""

TALL_ROWS = 96
"""Mean rows per expert from which tiles of 128 rows are faster than tiles of 64: −2 % at 64, +1 % at 128."""

MANY_ROWS = 192
"""Mean rows per expert from which loading warps are the fastest for any format and I; for blocks and I below 2048 they
are from 24 on. Mixtral's I = 14336 at 64 rows took 495 us in turns, 423 without loading warps."""

MAX_TABLES = 1024
"""Most experts whose tiles loading warps find by themselves: two tables of them are in shared memory."""

ROOMY = (9, 10)
"""Major compute capabilities whose programs may have 227 KiB of shared memory; the others have 99 KiB."""


@dataclass(frozen=True)
class Fp8SpecializedConfig:
    """A GEMM with loading warps (see `_kernels/fp8_specialized.py`); block_m is 128, or 64 for tiles taken in turns.

    `halves`: each group of warps takes half of every tile of 64 rows (see `_kernels/fp8_halves.py`).
    """

    stages: int = 4
    group: int = 4
    block_m: int = 128
    halves: bool = False

    def __post_init__(self) -> None:
        if self.halves and self.block_m != 64:
            raise ValueError(f"{self}: halves are those of a tile of 64 rows")
        if self.block_m not in (64, 128):
            raise ValueError(f"{self}: two groups of warps share a tile of 128 rows, or take a tile of 64 in turns")


@dataclass(frozen=True)
class Fp8GroupedConfig:
    """The align kernel cuts rows into tiles of up.block_m; the down GEMM may cut these further, or go by experts.

    `pdl`: programmatic launch: a kernel comes beside the last programs of the one before it, or, `early`, beside its
    first ones: waiting programs hold shared memory, which many tiles need themselves. GEMMs whose programs fill their
    multiprocessors, with loading warps or in turns, know only `early`: they come as each of those before them goes.
    """

    up: TileConfig | Fp8SpecializedConfig
    down: TileConfig | Fp8SpecializedConfig | AlternatingConfig
    pdl: bool = True
    early: bool = True
    path: str = "grouped"

    def __post_init__(self) -> None:
        if self.up.block_m % self.down_m:
            raise ValueError(
                f"Fp8GroupedConfig: down.block_m = {self.down_m} must divide up.block_m = {self.up.block_m}"
            )

    @property
    def down_m(self) -> int:
        """Rows of the down GEMM's tiles."""
        return self.up.block_m if isinstance(self.down, AlternatingConfig) else self.down.block_m


@dataclass(frozen=True)
class Fp8StreamConfig:
    """Two kernels that weights stream through, a program on each multiprocessor (see `_kernels/fp8_stream.py`).

    Buffers hold 16 KiB of weights and come in pairs.
    """

    up_buffers: int = 6
    down_buffers: int = 6
    path: str = "stream"

    def __post_init__(self) -> None:
        if self.up_buffers % 2 or self.down_buffers % 2:
            raise ValueError(f"{self!r}: buffers come in pairs")


Fp8Config = SlotsConfig | ScanConfig | Fp8GroupedConfig | Fp8StreamConfig
Fp8Plan = tuple[tuple[int | None, Fp8Config], ...]


def fp8_config(problem: ExpertsProblem, spec: Fp8Format, num_tokens: int, plain: bool = True) -> Fp8Config:
    """Slots for one token, stream for few that touch many weights, scan while the ids are few, grouped above.

    `plain`: silu(gate) · up of two halves, no clamp, no biases: what the specialized kernel computes.
    """
    config = _path_config(problem, spec, num_tokens, plain)
    if problem.capability >= (9, 0) or isinstance(config, Fp8StreamConfig):
        return config
    return replace(config, pdl=False)  # programmatic launch came with Hopper


def fp8_plan(problem: ExpertsProblem, spec: Fp8Format, plain: bool = True) -> Fp8Plan:
    """`fp8_config` for every range of T, equal neighbours merged; for people, who ask which kernels run."""
    ranges: list[tuple[int | None, Fp8Config]] = []
    for end in (*RANGE_ENDS, None):
        config = fp8_config(problem, spec, 4 * RANGE_ENDS[-1] if end is None else end, plain)
        if ranges and ranges[-1][1] == config:
            ranges.pop()
        ranges.append((end, config))
    return tuple(ranges)


def _path_config(problem: ExpertsProblem, spec: Fp8Format, num_tokens: int, plain: bool) -> Fp8Config:
    slots = num_tokens * problem.top_k
    rows = slots / problem.num_experts
    weights = problem.top_k * (3 if problem.gated else 2) * problem.hidden_size * problem.intermediate_size
    if num_tokens == 1 and (weights <= SMALL_STEP or spec.activations == "tensor"):
        return slots_config(problem)
    if spec.activations == "tensor":  # the scale of an expert's input needs all of its rows
        return grouped_config(problem, spec, rows, plain)
    touched = distinct_experts(problem, num_tokens) * weights / problem.top_k
    if touched >= STREAM_STEP and _streams(problem, spec, num_tokens, plain):
        return Fp8StreamConfig()
    if num_tokens <= 8 and slots <= 1.25 * distinct_experts(problem, num_tokens):
        return by_slot_config(problem)
    # Rows of weights that do not end with a line of 128 bytes cost the scan 8 to 10 %, tensor maps nothing (gpt-oss).
    ragged = problem.hidden_size % 128 > 0 or problem.intermediate_size % 128 > 0
    if slots <= MAX_SCAN_SLOTS and rows <= 8 and not (ragged and problem.capability >= (9, 0)):
        return scan_config(problem)
    return grouped_config(problem, spec, rows, plain)


def _streams(problem: ExpertsProblem, spec: Fp8Format, num_tokens: int, plain: bool) -> bool:
    """Whether the stream path can be used."""
    few = num_tokens <= STREAM_TOKENS and num_tokens * problem.top_k <= MAX_STREAM_SLOTS
    return few and plain and problem.capability[0] == 9 and spec.activations in ("group", "row", "static")


def slots_config(problem: ExpertsProblem) -> SlotsConfig:
    """Enough programs to fill the chip, 16-byte loads; blocks are whole groups of 128 columns."""
    up_k = min(1024, max(128, _power_of_2(problem.hidden_size)))
    up_n = 4 if problem.hidden_size >= 4096 else 2
    down_n = max(1, min(16, 64 // _power_of_2(problem.top_k)))
    return SlotsConfig(up_n, up_k, 2, down_n, 128, 4)


def by_slot_config(problem: ExpertsProblem) -> ScanConfig:
    """One row in a tile of 16: what counts is how many bytes of weights are on their way."""
    up = TileConfig(16, 64, 128, 4, 4)
    if problem.hidden_size > 2048:
        # The fastest at I = 256, 2880 and 14336; 8 against 6 won 5 % at the second, 6 against 5 won 5 % at the third.
        stages = 5 if problem.intermediate_size < 512 else 8 if problem.intermediate_size < 8192 else 6
        up = TileConfig(16, 32, 128, 4, stages)
    down = TileConfig(16, 32, 128, 2, 6) if problem.intermediate_size >= 2048 else TileConfig(16, 64, 128, 2, 3)
    return ScanConfig(up, down, by_slot=True)


def scan_config(problem: ExpertsProblem) -> ScanConfig:
    """16 rows at a time: an expert with more reads its weights from L2 again."""
    stages = 3 if problem.intermediate_size < 512 else 4
    return ScanConfig(TileConfig(16, 32, 128, 4, 5), TileConfig(16, 128, 128, 4, stages))


def grouped_config(problem: ExpertsProblem, spec: Fp8Format, rows: float, plain: bool) -> Fp8GroupedConfig:
    """`rows`: mean rows per expert; `plain` as for `fp8_config`."""
    tma = problem.capability >= (9, 0)
    early = rows <= 24
    warps_fit = plain and problem.capability[0] == 9 and problem.num_experts <= MAX_TABLES
    shared = problem.all_experts > problem.num_experts and problem.intermediate_size <= 2048  # larger: not measured
    if warps_fit and spec.activations == "group" and shared:
        return _shared_rows_config(problem, spec, rows * problem.num_experts / problem.all_experts)
    if spec.activations is None:
        tile = TileConfig(16 if rows <= 12 else 64, 64, 128, 4, 3, tma=tma)
        return Fp8GroupedConfig(tile, replace(tile, block_n=128), early=early)
    if problem.capability[0] not in ROOMY:
        tile = TileConfig(32 if rows <= 24 else 64, 64, 128, 4, 3, tma=tma)
        return Fp8GroupedConfig(tile, tile, early=early)
    if rows <= 8:
        return _low_tiles(problem, tma)
    if rows <= 24:
        tile = TileConfig(32, 64, 128, 4, 5, tma=tma)
        if problem.intermediate_size < 2048:
            tile = TileConfig(32, 128, 128, 4, 3, small_m=16, tma=tma)
        return Fp8GroupedConfig(tile, tile)
    # From here on one height of tiles: a kernel with two of them lost more registers than the smaller tiles saved.
    few_rows_fit = spec.activations == "group" and problem.intermediate_size < 2048
    if not warps_fit or (rows < MANY_ROWS and not few_rows_fit):
        down = TileConfig(64, 128, 128, 4, 3, tma=tma)
        return Fp8GroupedConfig(TileConfig(64, 128, 128, 8, 5, tma=tma), down, early=False)
    return _loading_warps(problem, spec, rows)


def _loading_warps(problem: ExpertsProblem, spec: Fp8Format, rows: float) -> Fp8GroupedConfig:
    """GEMMs whose programs find their tiles themselves; the down GEMM in turns where I is short."""
    wide = _wide_tiles(problem, rows)
    # Two input scales for gate and up, should they differ, are for the plain kernel.
    up = TileConfig(128, 128, 128, 8, 3) if spec.activations == "static" else wide
    if _alternating_fits(problem, spec):
        # 11 % of the GEMM at 32 rows an expert, 28 % at 128 (DeepSeek-V3, TP 8).
        return Fp8GroupedConfig(up, AlternatingConfig(*((128, 3, 4) if rows < 64 else (256, 2, 4))), early=False)
    return Fp8GroupedConfig(up, wide, early=False)


def _shared_rows_config(problem: ExpertsProblem, spec: Fp8Format, rows: float) -> Fp8GroupedConfig:
    """Of rows that ranks share few ids are here, and how many rows have come the device alone knows.

    So programs find their tiles, of which they have few. Against plain tiles by the bound of rows a layer's step took 2
    to 10 % less at I = 2048 and 4 to 21 % less at 256 (DeepSeek-V3 on 4 ranks, 1 to 128 tokens each).
    """
    config = _loading_warps(problem, spec, rows)
    if rows >= TALL_ROWS:
        return config
    # Sums that go from group to group take one stage's room.
    down = config.down if isinstance(config.down, AlternatingConfig) else Fp8SpecializedConfig(5, 1, 64, halves=True)
    return replace(config, up=Fp8SpecializedConfig(4, 1, 64, halves=True), down=down, early=True)


def _wide_tiles(problem: ExpertsProblem, rows: float) -> Fp8SpecializedConfig:
    if rows < TALL_ROWS:
        # Neighbouring programs share rows: 1 % faster than groups of 4 (Qwen3-30B, DeepSeek-V3, 1024 tokens).
        return Fp8SpecializedConfig(5, 1, 64)
    # With few tiles a group that divides the number of programs gives some of them all the short ones: at 16 tiles 4
    # took 922 us, 7 took 869 (Mixtral, 1024 tokens). Beyond, 2 % for 2 against 4 (Qwen3-30B, DeepSeek-V3, 4096).
    few = problem.num_experts * rows < 32 * 128
    return Fp8SpecializedConfig(group=7 if few else 2 if rows < 384 else 4)


def _alternating_fits(problem: ExpertsProblem, spec: Fp8Format) -> bool:
    """Whether the down GEMM of two warpgroups in turns, Hopper's own, can be used and has enough to do."""
    blocks = problem.num_experts * -(-problem.hidden_size // FP8_GROUP)
    return (
        problem.capability[0] == 9
        and spec.activations == "group"
        and problem.intermediate_size <= MAX_ALTERNATING
        and blocks >= 4 * problem.num_sms
    )


def _low_tiles(problem: ExpertsProblem, tma: bool) -> Fp8GroupedConfig:
    """16 rows: 2 % less time than with 32 at 2 rows an expert (DeepSeek-V3, TP 8, 64 tokens), nothing at 4 (Qwen3)."""
    if problem.intermediate_size >= 2048:
        return Fp8GroupedConfig(TileConfig(16, 32, 128, 4, 6, tma=tma), TileConfig(16, 64, 128, 4, 5, tma=tma))
    stages = 3 if problem.intermediate_size < 512 else 4
    return Fp8GroupedConfig(TileConfig(16, 64, 128, 4, 5, tma=tma), TileConfig(16, 128, 128, 4, stages, tma=tma))


def fp8_batched_config(problem: ExpertsProblem, spec: Fp8Format, capacity: int) -> Fp8GroupedConfig:
    """Rows per expert are known on the device only: programs walk a list of tiles, so idle capacity costs nothing."""
    config = grouped_config(problem, spec, min(capacity, MANY_ROWS - 1), plain=False)
    assert isinstance(config.up, TileConfig) and isinstance(config.down, TileConfig)
    up = replace(config.up, persistent=1 if config.up.warps == 8 else 2)
    return Fp8GroupedConfig(
        up, replace(config.down, persistent=2), pdl=problem.capability >= (9, 0), early=config.early
    )


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
