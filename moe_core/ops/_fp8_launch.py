"""Which kernels run an FP8 experts step, and with which launch parameters: pure functions of host-known facts.

Paths as in `_launch.py`. T tokens · H hidden · I intermediate · E_l local experts · K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_core.ops._fp8_weights import Fp8Format
from moe_core.ops._launch import (
    RANGE_ENDS,
    ExpertsProblem,
    ScanConfig,
    SlotsConfig,
    TileConfig,
    distinct_experts,
)

MAX_SCAN_SLOTS = 256
"""More ids than this cost a scanning program more than the align kernel costs the step."""

SMALL_STEP = 64 << 20
"""Bytes of weights up to which a single token's step is better off with two kernels that convert weights in registers:
above, a matrix unit that reads e4m3 by itself outweighs three more launches."""

MANY_ROWS = 192
"""Mean rows per expert from which tiles of 128 rows with loading warps are the fastest; below, half of them idle."""


ROOMY = (9, 10)
"""Major compute capabilities whose programs may have 227 KiB of shared memory; the others have 99 KiB."""


@dataclass(frozen=True)
class Fp8SpecializedConfig:
    """A GEMM with loading warps (see `_kernels/fp8_specialized.py`); its tiles are 128 × 256."""

    stages: int = 4
    group: int = 4
    block_m: int = 128
    warps: int = 4


@dataclass(frozen=True)
class Fp8GroupedConfig:
    """The align kernel cuts rows into tiles of up.block_m; the down GEMM may cut these further.

    `pdl`: programmatic launch: a kernel comes beside the last programs of the one before it, or, `early`, beside its
    first ones: waiting programs hold shared memory, which many tiles need themselves.
    """

    up: TileConfig | Fp8SpecializedConfig
    down: TileConfig | Fp8SpecializedConfig
    pdl: bool = True
    early: bool = True
    path: str = "grouped"

    def __post_init__(self) -> None:
        if self.up.block_m % self.down.block_m:
            raise ValueError(
                f"Fp8GroupedConfig: down.block_m = {self.down.block_m} must divide up.block_m = {self.up.block_m}"
            )


Fp8Config = SlotsConfig | ScanConfig | Fp8GroupedConfig
Fp8Plan = tuple[tuple[int | None, Fp8Config], ...]


def fp8_config(problem: ExpertsProblem, spec: Fp8Format, num_tokens: int, plain: bool = True) -> Fp8Config:
    """Slots while tokens rarely share an expert, scan while the ids are few, grouped above.

    `plain`: silu(gate) · up of two halves, no clamp, no biases: what the specialized kernel computes.
    """
    config = _path_config(problem, spec, num_tokens, plain)
    # Programmatic launch came with Hopper.
    return config if problem.capability >= (9, 0) else replace(config, pdl=False)


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
    if num_tokens <= 8 and slots <= 1.25 * distinct_experts(problem, num_tokens):
        return by_slot_config(problem)
    # Rows of weights that do not end with a line of 128 bytes cost the scan 8 to 10 %, tensor maps nothing (gpt-oss).
    ragged = problem.hidden_size % 128 > 0 or problem.intermediate_size % 128 > 0
    if slots <= MAX_SCAN_SLOTS and rows <= 8 and not (ragged and problem.capability >= (9, 0)):
        return scan_config(problem)
    return grouped_config(problem, spec, rows, plain)


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
    down = TileConfig(64, 128, 128, 4, 3, tma=tma)
    if rows < MANY_ROWS or problem.capability[0] != 9 or not plain:
        return Fp8GroupedConfig(TileConfig(64, 128, 128, 8, 5, tma=tma), down, early=False)
    # With few tiles a group that divides the number of programs gives some of them all the short ones: at 16 tiles 4
    # took 984 us, 7 took 918 (Mixtral, 1024 tokens). At 256 tiles 4 was 3 % faster than 8 (Qwen3-30B, 4096 tokens).
    few = problem.num_experts * rows < 32 * Fp8SpecializedConfig.block_m
    wide = Fp8SpecializedConfig(group=7 if few else 4)
    # Two input scales for gate and up, should they differ, are for the plain kernel.
    up = TileConfig(128, 128, 128, 8, 3, tma=tma) if spec.activations == "static" else wide
    return Fp8GroupedConfig(up, wide, early=False)


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
