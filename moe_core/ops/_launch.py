"""Which kernels run an experts step, and with which launch parameters: pure functions of host-known facts.

T tokens · H hidden · I intermediate · E_l local experts · K top-k.

A plan is a tuple of (largest T of the range, configuration), in rising order; the last range has no end. Three paths:
`SlotsConfig` (two kernels, each (token, choice) slot reads its own expert), `ScanConfig` (three kernels, each program
finds its expert's rows among all ids) and `GroupedConfig` (four kernels: align, two grouped GEMMs, reduce).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

RANGE_ENDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Ends of the ranges that the heuristics look at; a layer's plan merges equal neighbours."""

MIN_BLOCK_M = 16
"""The smallest tile: matrix instructions take no fewer rows."""

MAX_BY_SLOT = 8
"""Most tokens that a by-slot scan may serve: its counters are sized for them."""

MAX_ALTERNATING = 256
"""Up to this I two blocks of w2 and two of rows fit into shared memory at once."""

MAX_SCAN_SLOTS = 256
"""More ids than this cost a scanning program more than the align kernel costs the step."""


@dataclass(frozen=True)
class ExpertsProblem:
    """What a launch choice may depend on.

    Attributes:
        num_experts, top_k, hidden_size, intermediate_size: E_l, K, H, I.
        itemsize: bytes of one element of weights and activations.
        gated, interleaved: w13 holds gate and up rows; they alternate.
        w13_unit, w2_unit: which of the weights' last two dims is contiguous, "k" (the length of the dot products) or
            "n" (the output columns: transposed checkpoints).
        w13_tma, w2_tma: strides and address suit a tensor map.
        capability: compute capability, as (9, 0).
        num_sms: multiprocessors of the device.
        all_experts: E. Rows that other ranks share have ids of all experts, those of other ranks' -1 here. 0: E_l.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    itemsize: int = 2
    gated: bool = True
    interleaved: bool = False
    w13_unit: str = "k"
    w2_unit: str = "k"
    w13_tma: bool = True
    w2_tma: bool = True
    capability: tuple[int, int] = (9, 0)
    num_sms: int = 132
    all_experts: int = 0

    def rows_per_expert(self, num_tokens: int) -> float:
        """Mean number of rows that an expert gets from T tokens under uniform routing."""
        return num_tokens * self.top_k / (self.all_experts or self.num_experts)


@dataclass(frozen=True)
class SlotsConfig:
    """`up_*`: a program owns block_n columns of act of one slot; `down_*`: block_n columns of out of one token."""

    up_n: int
    up_k: int
    up_warps: int
    down_n: int
    down_k: int
    down_warps: int
    preload: int = 1  # blocks of w2 that are requested before the first kernel has ended
    pdl: bool = True
    path: str = "slots"


@dataclass(frozen=True)
class TileConfig:
    """One GEMM's tiles. `small_m` < block_m: an expert's last rows take a tile of that height where they fit; `tall`:
    together with the tile before them, whose weights they share."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    small_m: int = 0
    group: int = 8
    tma: bool = True
    tall: bool = False
    persistent: int = 0  # programs per multiprocessor that walk the tiles; 0: one program per tile

    def __post_init__(self) -> None:
        if self.tall and not 0 < self.small_m < self.block_m:
            raise ValueError(
                f"TileConfig: tall with small_m = {self.small_m}, block_m = {self.block_m}; the tile that goes along "
                f"needs a height of its own, below block_m"
            )


@dataclass(frozen=True)
class ScanConfig:
    """block_m rows at a time of each expert, no row tiles in the grid; by_slot: one row, see `_kernels/scan.py`."""

    up: TileConfig
    down: TileConfig
    by_slot: bool = False
    pdl: bool = True
    path: str = "scan"


@dataclass(frozen=True)
class AlternatingConfig:
    """The down GEMM where I is short, two warpgroups in turns (see `_kernels/alternating.py`).

    `weight_stages` blocks of w2, [block_n, I], and `row_stages` tiles of 64 rows are in shared memory.
    """

    block_n: int
    weight_stages: int
    row_stages: int

    def __post_init__(self) -> None:
        # A buffer must always serve the same warpgroup: one that waits for its next use but one would not wait.
        if self.row_stages % 2:
            raise ValueError(f"AlternatingConfig: row_stages = {self.row_stages}; two warpgroups need an even number")


@dataclass(frozen=True)
class GroupedConfig:
    """The align kernel cuts rows into tiles of up.block_m; the down GEMM may cut these further. `keep_x`: the align
    kernel asks for x into L2, to be evicted last."""

    up: TileConfig
    down: TileConfig | AlternatingConfig
    pdl: bool = True
    keep_x: bool = False
    path: str = "grouped"

    def __post_init__(self) -> None:
        if isinstance(self.down, TileConfig) and self.up.block_m % self.down.block_m:
            raise ValueError(
                f"GroupedConfig: up.block_m = {self.up.block_m}, down.block_m = {self.down.block_m}; the second must "
                f"divide the first"
            )


ExpertsConfig = SlotsConfig | ScanConfig | GroupedConfig
ExpertsPlan = tuple[tuple[int | None, ExpertsConfig], ...]


def distinct_experts(problem: ExpertsProblem, num_tokens: int) -> float:
    """Mean number of experts that T tokens touch under uniform random routing, if all of theirs are here."""
    share = min(problem.top_k / problem.num_experts, 1.0)
    return problem.num_experts * (1.0 - (1.0 - share) ** num_tokens)


def config_for(plan: ExpertsPlan, num_tokens: int) -> ExpertsConfig:
    """The configuration of the range that holds `num_tokens`."""
    for end, config in plan:
        if end is None or num_tokens <= end:
            return config
    raise ValueError(f"plan ends at T = {plan[-1][0]}, asked for T = {num_tokens}; its last range must end with None")


def default_plan(problem: ExpertsProblem) -> ExpertsPlan:
    """The heuristics for every range, equal neighbours merged."""
    ranges: list[tuple[int | None, ExpertsConfig]] = []
    for end in (*RANGE_ENDS, None):
        config = default_config(problem, end if end is not None else 4 * RANGE_ENDS[-1])
        if ranges and ranges[-1][1] == config:
            ranges[-1] = (end, config)
        else:
            ranges.append((end, config))
    return tuple(ranges)


def default_config(problem: ExpertsProblem, num_tokens: int) -> ExpertsConfig:
    """Slots while tokens rarely share an expert, scan while the ids are few, grouped above."""
    config = _path_config(problem, num_tokens)
    # Programmatic launch came with Hopper.
    return config if problem.capability >= (9, 0) else replace(config, pdl=False)


def _path_config(problem: ExpertsProblem, num_tokens: int) -> ExpertsConfig:
    slots = num_tokens * problem.top_k
    rows = problem.rows_per_expert(num_tokens)
    # Slots read an expert once per slot: worth it while duplicates are few.
    if num_tokens == 1 or (num_tokens <= 8 and slots <= 1.25 * distinct_experts(problem, num_tokens)):
        return slots_config(problem, num_tokens)
    # Every scanning program looks at every id; at 512 slots grouping was as fast or faster on all shapes measured.
    if slots <= MAX_SCAN_SLOTS and rows <= 8:
        return scan_config(problem, rows)
    return grouped_config(problem, rows)


def slots_config(problem: ExpertsProblem, num_tokens: int = 1) -> SlotsConfig | ScanConfig:
    """Enough programs to fill the chip, 16-byte loads, as few idle lanes as the sizes allow."""
    if "n" in (problem.w13_unit, problem.w2_unit):
        # A dot product per output row would read transposed weights in pieces of a line: 1.3 times slower at T = 1.
        if problem.itemsize > 2 or num_tokens > 1:
            return scan_config(problem, 1.0)
        return ScanConfig(TileConfig(16, 32, 64, 4, 5), TileConfig(16, 64, 64, 4, 6), by_slot=True)
    up_n, up_k, up_warps = (1, 1024, 2) if problem.hidden_size % 1024 == 0 else (2, 1024, 4)
    up_k = min(up_k, max(64, _power_of_2(problem.hidden_size)))
    choices = _power_of_2(problem.top_k)
    down_k = 128 if problem.intermediate_size < 512 else 256 if problem.intermediate_size < 8192 else 512
    down_warps = 4 if choices >= 8 else 2
    # 32 values a thread and block; 16 where a block is short, for more programs.
    values = (16 if down_k == 128 else 32) * 32 * down_warps
    down_n = max(1, min(16, values // (choices * down_k)))
    preload = 1 if problem.intermediate_size <= 1024 else 3
    if choices >= 8 and down_k >= 256 and num_tokens * problem.hidden_size <= 4096:
        # All programs of the second kernel are then resident while the first one runs: 14 % at T = 1 of Qwen3-30B.
        down_n, down_warps = 64 // choices, 8
    return SlotsConfig(up_n, up_k, up_warps, down_n, down_k, down_warps, preload)


def scan_config(problem: ExpertsProblem, rows: float) -> ScanConfig:
    """`rows`: mean rows per expert. 16 rows at a time: an expert with more reads its weights from L2 again."""
    scale = problem.itemsize // 2
    # Both leave room for two programs a multiprocessor; wider ones were 8 % slower on some machines.
    up_n, up_k = (64, 64) if problem.w13_unit == "n" else (32, 128)
    up = TileConfig(16, up_n, up_k // scale, 4, 5)
    down = TileConfig(16, 128, 128 // scale, 4, 3)
    if problem.intermediate_size < 512:
        down = TileConfig(16, 128, 64 // scale, 4, 4)
    return ScanConfig(up, down)


def grouped_config(problem: ExpertsProblem, rows: float) -> GroupedConfig:
    """`rows`: mean rows per expert."""
    config = tiled_config(problem, rows)
    # 1 % of the step with 64 rows (Qwen3-30B) and with 128 (DeepSeek-V3), where weights from memory set the pace; with
    # 256 the products do, and it costs 0.4 %.
    config = replace(config, keep_x=48 < rows < 192 and problem.itemsize == 2 and problem.capability >= (9, 0))
    if not _alternating_fits(problem, rows):
        return config
    if rows < 256:
        # 17 % of the GEMM at 128 rows, with the next block of weights on its way.
        return replace(config, down=AlternatingConfig(128, 2, 2), pdl=False)
    # 17 % at 512 rows. There tall tiles of the up GEMM gain less than the order that they ask for costs.
    up = replace(config.up, tall=config.up.tall and rows < 384)
    return replace(config, up=up, down=AlternatingConfig(256, 1, 2), pdl=False)


def _alternating_fits(problem: ExpertsProblem, rows: float) -> bool:
    """Whether the down GEMM of two warpgroups in turns, Hopper's own, can be used and has enough to do."""
    blocks = problem.num_experts * -(-problem.hidden_size // 128)
    rows_fit = problem.w2_tma and problem.w2_unit == "k" and problem.intermediate_size * problem.itemsize % 16 == 0
    return (
        rows > 48
        and problem.capability[0] == 9
        and problem.itemsize == 2
        and rows_fit
        and problem.intermediate_size <= MAX_ALTERNATING
        and blocks >= 4 * problem.num_sms
    )


def tiled_config(problem: ExpertsProblem, rows: float) -> GroupedConfig:
    """Tiles for both GEMMs."""
    if problem.itemsize > 2:
        tile = TileConfig(64, 64, 32, 4, 2, tma=False)
        return GroupedConfig(tile, tile)
    tma = problem.capability >= (9, 0)
    up_tma = tma and problem.w13_tma and tensor_map_takes_pairs(problem)
    down_tma = tma and problem.w2_tma
    short = problem.intermediate_size < 512
    # Programmatic launch loses 1-3 % once a GEMM fills the chip several times: waiting programs hold shared memory.
    pdl = rows <= 24
    if rows <= 24:
        up = TileConfig(32, 64, 128, 4, 3, small_m=16, tma=up_tma)
        down = TileConfig(32, 128, 64 if short else 128, 4, 3, small_m=16, tma=down_tma)
    elif rows <= 48:
        up = TileConfig(64, 128, 64, 8, 4, small_m=32, tma=up_tma)
        down = TileConfig(64, 128, 64, 4, 3 if short else 4, tma=down_tma)
    else:
        # Tall tiles: 3 % of the step with 256 rows an expert, 7 % with 128; with 64 few experts fill one.
        tall = rows >= 96
        group = 1 if problem.intermediate_size < 1024 else 4 if rows < 512 else 8
        up = TileConfig(128, 128, 64, 8, 4, small_m=64, tall=tall and up_tma, group=group, tma=up_tma)
        down = TileConfig(128, 256, 64, 8, 4, small_m=64, tall=tall and down_tma, group=4, tma=down_tma)
        if short:
            down = TileConfig(128, 128, 64, 4, 3, small_m=64, tma=down_tma)
    if not up.tma:
        up = replace(up, block_n=up.block_n // 2 if problem.gated else up.block_n, block_k=64, stages=3)
    if not down.tma:
        down = replace(down, block_n=128, block_k=64, stages=3)
    return GroupedConfig(up, down, pdl=pdl)


def batched_config(problem: ExpertsProblem, capacity: int) -> GroupedConfig:
    """Rows per expert are known on the device only: programs walk a list of tiles, so idle capacity costs nothing."""
    config = tiled_config(problem, min(capacity, 65))
    assert isinstance(config.down, TileConfig)
    per_sm = 1 if config.up.block_m >= 64 else 2
    return GroupedConfig(
        replace(config.up, persistent=per_sm),
        replace(config.down, persistent=per_sm),
        pdl=config.pdl and problem.capability >= (9, 0),
    )


def tensor_map_takes_pairs(problem: ExpertsProblem) -> bool:
    """Whether one box of a tensor map can hold the gate and the up columns of a tile.

    Halves with contiguous output columns would need a box whose two parts are not neighbours in its last dim.
    """
    return not problem.gated or problem.interleaved or problem.w13_unit == "k"


def align_tiles(num_slots: int, num_experts: int, block_m: int) -> int:
    """Upper bound of the number of row tiles (see `_kernels/align.py`)."""
    return num_slots // block_m + num_experts


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
