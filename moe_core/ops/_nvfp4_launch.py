"""Which NVFP4 kernels run an experts step, and with which launch parameters: pure functions of host-known facts.

T tokens · H hidden · I intermediate · E_l local experts · K top-k; slot s = t * K + k. A block is 16 rows of weights by
256 columns, 2 KiB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_core.ops._launch import MAX_BY_SLOT, RANGE_ENDS, ExpertsProblem, distinct_experts

COLUMNS_PER_BLOCK = 256
MAX_LIST_SLOTS = 512


@dataclass(frozen=True)
class WarpsConfig:
    """One product's program.

    Attributes:
        rows: warps side by side, on 16 rows of weights each.
        along_k: warps that share a dot product.
        depth: blocks that a warp asks for ahead; of slots.
        tiles: rows of tiles that a warp walks in turn; of rows.
        registers: the most that a thread may hold, so that more warps fit; 0: what the compiler likes.
    """

    rows: int
    along_k: int
    depth: int = 1
    tiles: int = 1
    registers: int = 0
    fence: bool = True
    maskx: bool = True


@dataclass(frozen=True)
class Nvfp4SlotsConfig:
    """Two kernels: each (token, choice) slot reads its own expert, then each token sums its choices."""

    up: WarpsConfig
    down: WarpsConfig
    pdl: bool = True
    path: str = "slots"


@dataclass(frozen=True)
class Nvfp4RowsConfig:
    """Both products over each expert's rows, then reduce.

    Attributes:
        eights: 8 rows each, that a program multiplies at once.
    """

    up: WarpsConfig
    down: WarpsConfig
    eights: int
    pdl: bool = True
    path: str = "rows"


@dataclass(frozen=True)
class GemmTile:
    """One product's program: 128 rows of weights by `block_n` activation rows, `stages` buffers, `group` as in
    `TileConfig`."""

    block_n: int
    stages: int
    group: int = 8
    sync: int = 1


@dataclass(frozen=True)
class Nvfp4GemmConfig:
    """Five kernels: permute x, align, both products, reduce. Hopper only."""

    up: GemmTile
    down: GemmTile
    path: str = "gemm"

    def __post_init__(self) -> None:
        if self.up.block_n % self.down.block_n:
            raise ValueError(
                f"up.block_n = {self.up.block_n}, down.block_n = {self.down.block_n}; the second must divide the first"
            )


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
    """Slots while tokens rarely share an expert, rows above."""
    slots = num_tokens * problem.top_k
    config: Nvfp4Config
    if num_tokens == 1 or (num_tokens <= MAX_BY_SLOT and slots <= 1.25 * distinct_experts(problem, num_tokens)):
        config = _slots_config(problem)
    else:
        config = _rows_config(problem, slots / problem.num_experts)
    # Programmatic launch came with Hopper.
    return config if problem.capability >= (9, 0) else replace(config, pdl=False)


def nvfp4_batched_config(problem: ExpertsProblem, capacity: int) -> Nvfp4RowsConfig:
    """Rows per expert are known on the device only."""
    config = _rows_config(problem, min(capacity, 24))
    return config if problem.capability >= (9, 0) else replace(config, pdl=False)


def _slots_config(problem: ExpertsProblem) -> Nvfp4SlotsConfig:
    up_blocks = -(-problem.hidden_size // COLUMNS_PER_BLOCK)
    up_k = 4 if up_blocks <= 16 else 8
    down_blocks = -(-problem.intermediate_size // COLUMNS_PER_BLOCK) * problem.top_k
    return Nvfp4SlotsConfig(
        WarpsConfig(1, up_k, depth=min(4, -(-up_blocks // up_k))),
        WarpsConfig(1, 8, depth=min(3, -(-down_blocks // 8))),
    )


def _rows_config(problem: ExpertsProblem, rows: float) -> Nvfp4RowsConfig:
    """`rows`: mean rows per expert."""
    eights = 1 if rows <= 4 else 2 if rows <= 10 else 3
    return Nvfp4RowsConfig(
        WarpsConfig(4, 1), WarpsConfig(4, 1, tiles=4 if problem.intermediate_size < 512 else 1), eights
    )
