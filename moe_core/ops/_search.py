"""Which launch parameters are worth a measurement, in which order: what `moe-core tune` runs for the Triton experts.

One GEMM after the other: the candidates of the first with the second as it is, then those of the second with the best
of the first. T tokens · H hidden · I intermediate · E_l experts · K top-k.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

from moe_core.ops._launch import (
    MAX_ALTERNATING,
    AlternatingConfig,
    ExpertsConfig,
    ExpertsProblem,
    GroupedConfig,
    ScanConfig,
    SlotsConfig,
    TileConfig,
    config_for,
    tensor_map_takes_pairs,
)
from moe_core.ops._tuned import choose_plan

Search = Generator[Sequence[ExpertsConfig], Sequence[float], None]
"""Yields configurations to be measured; is sent their times, infinity for what failed."""

MAX_SLOTS_TOKENS = 8  # above, slots read their experts too often
MAX_BY_SLOT_TOKENS = 4  # a by-slot scan serves twice as many at most: see `MAX_BY_SLOT`
MAX_SCAN_IDS = 512
MIN_GROUPED_TOKENS = 16
MIN_TALL_ROWS = 80  # of an expert: with fewer, hardly one has more than a tile holds

_DOWN_KINDS = {"tile": TileConfig, "alternating": AlternatingConfig}


def search_launch(problem: ExpertsProblem, tokens: int, device_name: str) -> Search:
    """The best configuration of every path that may be the fastest at T = `tokens`; what holds now comes first."""
    now = config_for(choose_plan(problem, device_name)[0], tokens)
    yield [now]
    if tokens <= MAX_SLOTS_TOKENS and problem.w13_unit == problem.w2_unit == "k":
        yield from _search_slots(problem)
    if tokens * problem.top_k <= MAX_SCAN_IDS and (tokens > 1 or problem.w13_unit == "n"):
        yield from _search_scan(problem, tokens)
    if tokens >= MIN_GROUPED_TOKENS:
        yield from _search_grouped(problem, tokens)


def config_to_json(config: ExpertsConfig, problem: ExpertsProblem) -> dict[str, Any]:
    """A configuration and the strides that it was found for, as JSON."""
    stored = asdict(config)
    if isinstance(config, GroupedConfig):
        stored["down"]["kind"] = next(kind for kind, type_ in _DOWN_KINDS.items() if type(config.down) is type_)
    return {"w13_unit": problem.w13_unit, "w2_unit": problem.w2_unit, **stored}


def config_from_json(stored: Any, problem: ExpertsProblem) -> ExpertsConfig | None:
    """The configuration; None: it is for weights with other strides, or of a version that knew other parameters."""
    try:
        fields = dict(stored)
        units, path = (fields.pop("w13_unit"), fields.pop("w2_unit")), fields["path"]
        if units != (problem.w13_unit, problem.w2_unit):
            return None
        if path == "slots":
            return SlotsConfig(**fields)
        up, down = TileConfig(**fields.pop("up")), dict(fields.pop("down"))
        if path == "scan":
            return ScanConfig(up, TileConfig(**down), **fields)
        return GroupedConfig(up, _DOWN_KINDS[down.pop("kind")](**down), **fields)
    except (KeyError, TypeError, ValueError):
        return None


def _search_slots(problem: ExpertsProblem) -> Search:
    """The second kernel starts inside the first one, so some of each are tried together."""
    base = SlotsConfig(2, 1024, 4, 4, 256, 4, 1)
    ups = [
        replace(base, up_n=n, up_k=k, up_warps=warps)
        for n, k, warps in (
            (1, 1024, 2), (1, 2048, 4), (2, 512, 2), (2, 1024, 2), (2, 1024, 4), (2, 2048, 4), (4, 512, 2), (4, 512, 4),
            (4, 256, 4), (4, 1024, 4), (8, 512, 8),
        )
    ]  # fmt: skip
    best_ups = _best(ups, (yield ups), 3)
    if not best_ups:
        return
    downs = list(_slots_downs(problem, best_ups[0]))
    best_downs = _best(downs, (yield downs), 6)
    yield [
        replace(up, down_n=down.down_n, down_k=down.down_k, down_warps=down.down_warps, preload=down.preload)
        for up, down in product(best_ups[1:], best_downs)
    ]


def _slots_downs(problem: ExpertsProblem, base: SlotsConfig) -> Iterator[SlotsConfig]:
    for n, k, warps, preload in product((1, 2, 4, 8), (128, 256, 512), (2, 4, 8), (0, 1, 3)):
        values, threads = n * problem.top_k * k, 32 * warps
        # Enough work for every thread, and not more values than its registers hold.
        if values >= 8 * threads and 2048 <= values * max(1, preload) <= 96 * threads:
            yield replace(base, down_n=n, down_k=k, down_warps=warps, preload=preload)


def _search_scan(problem: ExpertsProblem, tokens: int) -> Search:
    by_slot = problem.w13_unit == "n" and tokens <= MAX_BY_SLOT_TOKENS and problem.itemsize == 2
    heights: tuple[int, ...]
    ups: tuple[tuple[int, int, int, int], ...]
    downs: tuple[tuple[int, int, int, int], ...]
    if by_slot:
        heights = (16,)
        ups = ((32, 64, 4, 5), (32, 128, 4, 4), (16, 128, 4, 5), (32, 128, 8, 4), (16, 256, 4, 3))
        downs = ((64, 128, 4, 4), (32, 128, 4, 5), (64, 128, 4, 5), (32, 256, 4, 4), (64, 64, 4, 6), (128, 64, 4, 5))
    else:
        rows = problem.rows_per_expert(tokens)
        heights = (16,) if rows < 6 else (16, 32) if rows < 14 else (32,)
        ups = ((32, 256, 4, 3), (32, 128, 4, 4), (64, 128, 4, 4), (32, 128, 4, 5), (64, 64, 4, 5), (16, 256, 4, 4))
        downs = (
            (32, 256, 4, 3), (64, 128, 4, 4), (64, 256, 4, 2), (64, 256, 4, 3), (128, 128, 4, 3), (128, 64, 4, 4),
            (64, 64, 4, 5), (32, 128, 4, 5),
        )  # fmt: skip
    for height in heights:
        base = ScanConfig(TileConfig(height, 32, 128, 4, 4), TileConfig(height, 64, 128, 4, 3), by_slot=by_slot)
        tried = [replace(base, up=TileConfig(height, *tile)) for tile in ups]
        best = _best(tried, (yield tried), 2)
        for up in best:
            yield [replace(up, down=TileConfig(height, *tile)) for tile in downs]


def _search_grouped(problem: ExpertsProblem, tokens: int) -> Search:
    rows = problem.rows_per_expert(tokens)
    hopper = problem.capability >= (9, 0)
    up_tma = hopper and problem.w13_tma and tensor_map_takes_pairs(problem)
    down_tma = hopper and problem.w2_tma
    # Without a tensor map two halves fill the accumulators that a tall tile would need.
    ups = [replace(tile, tma=up_tma) for tile in _grouped_ups(rows) if up_tma or not tile.tall]
    downs = [replace(tile, tma=down_tma) for tile in _grouped_downs(rows) if down_tma or not tile.tall]
    tried = [GroupedConfig(up, _plain_down(up)) for up in ups]
    found: list[tuple[float, GroupedConfig]] = []
    for config in _best(tried, (yield tried), 2):
        both = [replace(config, down=down) for down in downs if config.up.block_m % down.block_m == 0]
        both += [replace(config, down=down) for down in _special_downs(problem, rows, config.up, down_tma)]
        found += zip((yield both), both, strict=True)
    best = _best([config for _, config in found], [time for time, _ in found], 1)
    yield [replace(config, pdl=not config.pdl) for config in best] + [replace(config, keep_x=hopper) for config in best]


def _plain_down(up: TileConfig) -> TileConfig:
    return TileConfig(up.block_m, 128, 64, 8, 3, tma=False)


def _grouped_ups(rows: float) -> Iterator[TileConfig]:
    for height, small in _heights(rows):
        for n, k, warps, stages in (
            (64, 64, 4, 4), (64, 64, 4, 3), (128, 64, 8, 4), (32, 128, 4, 4), (64, 128, 4, 3),
        ):  # fmt: skip
            yield TileConfig(height, n, k, warps, stages, small)
    if rows >= 24:
        yield from (TileConfig(128, 128, 64, 8, 4, 64, group) for group in (2, 4, 8, 16))
        yield TileConfig(128, 128, 64, 8, 3, 64)
        yield TileConfig(128, 64, 64, 4, 3, 64)
        yield TileConfig(128, 128, 128, 8, 2, 64)
        yield TileConfig(128, 128, 32, 8, 8, 64)
    if rows >= MIN_TALL_ROWS:
        yield from (TileConfig(128, 128, 64, 8, 4, 64, group, tall=True) for group in (1, 2, 4, 8))


def _grouped_downs(rows: float) -> Iterator[TileConfig]:
    for height, small in _heights(rows):
        for n, k, warps, stages in (
            (128, 64, 4, 4), (128, 64, 4, 3), (256, 64, 8, 4), (64, 128, 4, 4), (128, 128, 4, 3), (64, 64, 4, 4),
        ):  # fmt: skip
            yield TileConfig(height, n, k, warps, stages, small)
    if rows >= 24:
        yield from (TileConfig(128, 256, 64, 8, 4, 64, group) for group in (4, 8, 16))
        yield TileConfig(128, 128, 64, 4, 2, 64)
        yield TileConfig(128, 64, 64, 4, 3, 64)
        yield TileConfig(128, 128, 64, 4, 3, 64)
        yield TileConfig(128, 128, 64, 8, 4, 64)
        for n, k, warps, stages in (
            (128, 64, 4, 3),
            (128, 64, 4, 2),
            (256, 64, 8, 3),
            (256, 64, 4, 3),
            (128, 128, 4, 2),
        ):
            yield TileConfig(64, n, k, warps, stages)
    if rows >= MIN_TALL_ROWS:
        yield from (TileConfig(128, 256, 64, 8, 4, 64, group, tall=True) for group in (2, 4, 8))


def _heights(rows: float) -> Iterator[tuple[int, int]]:
    """(block_m, small_m) of the tiles for few rows an expert."""
    if rows > 80:
        return
    for height, small in ((32, 0), (32, 16), (64, 0), (64, 32)):
        if (height == 32 and rows <= 40) or (height == 64 and rows >= 12):
            yield height, small


def _special_downs(problem: ExpertsProblem, rows: float, up: TileConfig, down_tma: bool) -> Iterator[AlternatingConfig]:
    if rows < 24 or problem.itemsize != 2 or not down_tma:
        return
    if problem.w2_unit != "k" or up.block_m != 128 or problem.capability[0] != 9:
        return
    if problem.intermediate_size <= MAX_ALTERNATING:
        yield from (AlternatingConfig(*sizes) for sizes in ((128, 2, 2), (256, 1, 2), (64, 2, 4)))


def _best(configs: Sequence[Any], times: Iterable[float], count: int) -> list[Any]:
    """The `count` fastest, without those that failed."""
    order = sorted(zip(times, range(len(configs)), strict=True))
    return [configs[i] for time, i in order[:count] if time < float("inf")]
