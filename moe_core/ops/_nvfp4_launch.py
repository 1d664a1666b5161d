"""Which NVFP4 kernels run an experts step, and with which launch parameters: pure functions of host-known facts.

T tokens · H hidden · I intermediate · E_l local experts · K top-k; slot s = t * K + k. A block is 16 rows of weights by
256 columns, 2 KiB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_core.ops._launch import (
    MAX_ALTERNATING,
    MAX_BY_SLOT,
    RANGE_ENDS,
    AlternatingConfig,
    ExpertsProblem,
    distinct_experts,
)

COLUMNS_PER_BLOCK = 256

MOST_ROWS = 12
"""With more rows per expert, on average, the GEMMs are faster (Qwen3-30B at 16: 158 us, and 192)."""

SHORTEST = 256
"""The least H and I of the GEMMs, whose buffers a shorter dot product would not fill."""

STEPS_PER_TURN = 8
"""Steps of the GEMMs' loops: where one starts again no product is under way, but code must stay short."""

MAX_LIST_SLOTS = 512
"""Up to so many ids each expert's program looks at all of them in one go; the align kernel takes more."""


@dataclass(frozen=True)
class WarpsConfig:
    """One product's program.

    Attributes:
        rows: warps side by side, on 16 rows of weights each.
        along_k: warps that share a dot product.
        depth: blocks that a warp asks for ahead; of slots.
        tiles: rows of tiles that a warp walks in turn; of rows.
        registers: the most that a thread may hold, so that more warps fit; 0: what the compiler likes.
        fenced: the loads of the next block stay in front of this block's products; of rows.
        together: a block's activations are asked for at once, and all blocks' where they are asked for ahead; of slots.
    """

    rows: int
    along_k: int
    depth: int = 1
    tiles: int = 1
    registers: int = 0
    together: bool = False
    fenced: bool = False


@dataclass(frozen=True)
class Nvfp4SlotsConfig:
    """Two kernels: each (token, choice) slot reads its own expert, then each token sums its choices."""

    up: WarpsConfig
    down: WarpsConfig
    pdl: bool = True
    path: str = "slots"


@dataclass(frozen=True)
class Nvfp4RowsConfig:
    """Four kernels: list the rows of each expert, both products over them, reduce. `eights`: 8 rows each, at once."""

    up: WarpsConfig
    down: WarpsConfig
    eights: int
    pdl: bool = True
    path: str = "rows"


@dataclass(frozen=True)
class GemmTile:
    """One product's program: 128 rows of weights by `block_n` activation rows; the rest as in `TileConfig`.

    `registers` as in `WarpsConfig`: 128 lets two programs share a multiprocessor.
    """

    block_n: int
    stages: int = 4
    group: int = 8
    registers: int = 128

    def __post_init__(self) -> None:
        if self.stages < 4 or STEPS_PER_TURN % self.stages:
            raise ValueError(
                f"GemmTile: stages = {self.stages}; the buffers take turns in loops of {STEPS_PER_TURN} steps, so 4 or "
                f"{STEPS_PER_TURN} are possible"
            )


@dataclass(frozen=True)
class Nvfp4GemmConfig:
    """Five kernels: permute x, align, both products, reduce. Hopper only."""

    up: GemmTile
    down: GemmTile | AlternatingConfig
    path: str = "gemm"

    def __post_init__(self) -> None:
        if isinstance(self.down, GemmTile) and self.up.block_n % self.down.block_n:
            raise ValueError(
                f"Nvfp4GemmConfig: up.block_n = {self.up.block_n}, down.block_n = {self.down.block_n}; the second must "
                "divide the first"
            )


@dataclass(frozen=True)
class Nvfp4BatchedConfig:
    """BATCHED: experts of up to `few` rows by `rows`, two kernels; the others, if `tile` is there, by four more.

    Rows are counted on the device, each expert's programs decide: list tiles, permute x, both products.
    """

    rows: Nvfp4RowsConfig
    tile: GemmTile | None = None
    few: int = 0


Nvfp4Config = Nvfp4SlotsConfig | Nvfp4RowsConfig | Nvfp4GemmConfig
Nvfp4Plan = tuple[tuple[int | None, Nvfp4Config], ...]


def nvfp4_config_for(plan: Nvfp4Plan, num_tokens: int) -> Nvfp4Config:
    """The configuration of the range that holds `num_tokens`."""
    for end, config in plan:
        if end is None or num_tokens <= end:
            return config
    raise ValueError(f"plan ends at T = {plan[-1][0]}, asked for T = {num_tokens}; its last range must end with None")


def default_nvfp4_plan(problem: ExpertsProblem) -> Nvfp4Plan:
    """The heuristics for every range, equal neighbours merged."""
    ranges: list[tuple[int | None, Nvfp4Config]] = []
    for end in (*RANGE_ENDS, None):
        config = default_nvfp4_config(problem, end if end is not None else 4 * RANGE_ENDS[-1])
        if ranges and ranges[-1][1] == config:
            ranges[-1] = (end, config)
        else:
            ranges.append((end, config))
    return tuple(ranges)


def default_nvfp4_config(problem: ExpertsProblem, num_tokens: int) -> Nvfp4Config:
    """Slots while tokens rarely share an expert, then rows, and GEMMs where weights no longer bind."""
    slots = num_tokens * problem.top_k
    rows = problem.rows_per_expert(num_tokens)
    config: Nvfp4SlotsConfig | Nvfp4RowsConfig
    if num_tokens == 1 or (num_tokens <= MAX_BY_SLOT and slots <= 1.25 * distinct_experts(problem, num_tokens)):
        config = _slots_config(problem, num_tokens)
    elif rows > _most_rows(problem) and _gemms_fit(problem):
        return _gemm_config(problem, rows)
    else:
        config = _rows_config(problem, rows)
    # Programmatic launch came with Hopper.
    return config if problem.capability >= (9, 0) else replace(config, pdl=False)


def nvfp4_batched_config(problem: ExpertsProblem, capacity: int) -> Nvfp4BatchedConfig:
    """Rows per expert are known on the device only, so they choose there: up to 8 are one pass of the first kernels."""
    if _gemms_fit(problem):
        rows = _rows_config(problem, min(capacity, 4.5))
        few = 8 * rows.eights
        if capacity > few:
            return Nvfp4BatchedConfig(rows, GemmTile(64 if capacity <= 64 else 128), few)
    else:
        rows = _rows_config(problem, min(capacity, _most_rows(problem)))
    return Nvfp4BatchedConfig(rows if problem.capability >= (9, 0) else replace(rows, pdl=False))


def _slots_config(problem: ExpertsProblem, num_tokens: int) -> Nvfp4SlotsConfig:
    """One token has few programs, so a warp asks for its blocks ahead where it has some; more tokens bring more warps.

    Both kernels were searched together: the second one's programs wait beside the first one's.
    """
    up, down = _blocks(problem.hidden_size), _blocks(problem.intermediate_size) * problem.top_k
    if num_tokens > 1:
        first = WarpsConfig(1, 4 if up > 16 else 2, registers=64)
        second = WarpsConfig(1, 4 if down <= 8 else 8, registers=64)
        if up <= 8:
            first = WarpsConfig(1, 2, registers=80, together=True)
        if 24 < down <= 48:
            second = WarpsConfig(1, 4, registers=80, together=True)
        return Nvfp4SlotsConfig(first, second)
    along_k = 8 if up > 16 else 4
    steps = -(-up // along_k)
    if up <= 12:
        first = WarpsConfig(1, 2, registers=64) if up <= 8 else WarpsConfig(1, 2, registers=80, together=True)
    elif steps <= 4 and problem.hidden_size % COLUMNS_PER_BLOCK == 0:
        first = WarpsConfig(1, along_k, depth=steps, together=up > 16)
    else:
        first = WarpsConfig(1, along_k, registers=64)
    if down <= 8:
        return Nvfp4SlotsConfig(first, WarpsConfig(1, 2, depth=4, together=True))
    if down <= 24:
        return Nvfp4SlotsConfig(first, WarpsConfig(1, 8, registers=64))
    if down <= 48:
        return Nvfp4SlotsConfig(first, WarpsConfig(1, 16, registers=64, together=True))
    return Nvfp4SlotsConfig(first, WarpsConfig(1, 8, depth=2))


def _rows_config(problem: ExpertsProblem, rows: float) -> Nvfp4RowsConfig:
    """`rows`: mean rows per expert. The fewer registers a thread holds, the more warps hide each other's loads."""
    eights = 1 if rows <= 4.5 else 2 if rows <= MOST_ROWS else 3
    inner = problem.intermediate_size
    if eights == 3:
        return Nvfp4RowsConfig(WarpsConfig(8, 1, registers=128), WarpsConfig(2, 2, registers=128), eights)
    if eights == 2:
        tiles = 4 if inner < 512 else 2 if inner < 8192 else 1
        return Nvfp4RowsConfig(WarpsConfig(4, 1, registers=128), WarpsConfig(4, 1, tiles=tiles, registers=128), eights)
    if inner >= 8192:
        return Nvfp4RowsConfig(
            WarpsConfig(4, 1, registers=80 if rows > 2 else 96),
            WarpsConfig(2, 2, registers=128, fenced=True) if rows > 2 else WarpsConfig(2, 2, registers=80),
            eights,
        )
    up = WarpsConfig(4, 1, registers=64 if problem.hidden_size <= 2048 else 72)
    # A short dot product has few blocks: then a warp walks several rows of tiles, the next one's blocks under way.
    if inner < 512:
        return Nvfp4RowsConfig(up, WarpsConfig(4, 1, tiles=4, registers=64), eights)
    return Nvfp4RowsConfig(up, WarpsConfig(4, 1, tiles=2 if inner < 2048 or rows > 2 else 1, registers=80), eights)


def _gemm_config(problem: ExpertsProblem, rows: float) -> Nvfp4GemmConfig:
    """`rows`: mean rows per expert."""
    tile = GemmTile(64 if rows <= 96 else 128)
    blocks = problem.num_experts * -(-problem.hidden_size // 128)
    if rows > 96 and alternating_fits(problem) and blocks >= 4 * problem.num_sms:
        # 3 % of the step with 128 rows an expert, 9 % with 512.
        return Nvfp4GemmConfig(tile, AlternatingConfig(128, 2, 2) if rows < 256 else AlternatingConfig(256, 1, 2))
    if rows >= 384:
        # A weight is expanded half as often: 3 to 5 % of the step with 512 and more rows an expert, -2 % with 256.
        return Nvfp4GemmConfig(GemmTile(256, registers=0), tile)
    return Nvfp4GemmConfig(tile, tile)


def _most_rows(problem: ExpertsProblem) -> int:
    return 20 if problem.intermediate_size >= 8192 else MOST_ROWS


def alternating_fits(problem: ExpertsProblem) -> bool:
    """Whether blocks of w2 fill rows of shared memory: I a power of 2, and short."""
    inner = problem.intermediate_size
    return inner & (inner - 1) == 0 and inner <= MAX_ALTERNATING


def _gemms_fit(problem: ExpertsProblem) -> bool:
    return problem.capability[0] == 9 and min(problem.hidden_size, problem.intermediate_size) >= SHORTEST


def _blocks(length: int) -> int:
    return max(1, length // COLUMNS_PER_BLOCK)
