"""Launch parameters that were measured, by device, shape and scheme (`moe-core tune … --json` finds them).

A table covers the small T, where the best pair of kernels is hard to predict; above its last T the heuristics of
`_launch.py` hold, which were fitted to the same measurements. What a user's own `moe-core tune` found is handed in by
the caller and comes before both. H hidden · I intermediate · E_l experts · K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_core.ops._launch import (
    ExpertsConfig,
    ExpertsPlan,
    ExpertsProblem,
    ScanConfig,
    SlotsConfig,
    TileConfig,
    default_plan,
)

ShapeKey = tuple[int, int, int, int, str, str]
"""(E_l, K, H, I, unit dim of w13, unit dim of w2), of 16-bit gated weights."""


def _tile(block_n: int, block_k: int, stages: int) -> TileConfig:
    return TileConfig(16, block_n, block_k, warps=4, stages=stages)


# Measured with torch 2.11, triton 3.6, as complete steps in CUDA graphs over 8 input sets.
_H200: dict[ShapeKey, ExpertsPlan] = {
    (128, 8, 2048, 768, "k", "k"): (  # Qwen3-30B-A3B
        (1, SlotsConfig(1, 1024, 2, 8, 256, 8, preload=1)),
        (6, SlotsConfig(1, 1024, 2, 2, 256, 4, preload=1)),
        (32, ScanConfig(_tile(32, 128, 5), _tile(64, 128, 4))),
        (64, ScanConfig(_tile(64, 64, 5), _tile(128, 128, 3))),
    ),
    (256, 8, 7168, 256, "k", "k"): (  # DeepSeek-V3, TP 8
        (1, SlotsConfig(1, 1024, 2, 2, 128, 4, preload=1)),
        (6, SlotsConfig(1, 1024, 2, 2, 128, 2, preload=1)),
        (32, ScanConfig(_tile(32, 128, 5), _tile(128, 64, 4))),
    ),
    (128, 4, 2880, 2880, "k", "k"): (  # gpt-oss-120b's sizes
        (1, SlotsConfig(2, 1024, 4, 1, 256, 2, preload=3)),
        (8, SlotsConfig(2, 512, 2, 1, 256, 2, preload=3)),
        (32, ScanConfig(_tile(32, 128, 4), _tile(64, 128, 4))),
        (64, ScanConfig(_tile(32, 128, 5), _tile(128, 128, 3))),
    ),
    (128, 4, 2880, 2880, "n", "n"): (  # gpt-oss-120b, weights as its checkpoint has them
        (1, ScanConfig(_tile(32, 64, 5), _tile(64, 64, 6), by_slot=True)),
        (8, ScanConfig(_tile(64, 128, 4), _tile(128, 128, 3))),
        (64, ScanConfig(_tile(64, 64, 5), _tile(128, 128, 3))),
    ),
    (8, 2, 4096, 14336, "k", "k"): (  # Mixtral-8x7B
        (1, SlotsConfig(1, 2048, 4, 2, 512, 2, preload=3)),
        (6, ScanConfig(_tile(32, 128, 4), _tile(32, 256, 3))),
        (24, ScanConfig(_tile(32, 128, 4), _tile(64, 256, 3))),
    ),
}

TABLES: dict[str, dict[ShapeKey, ExpertsPlan]] = {"NVIDIA H200": _H200}
"""By the device's name, as the driver gives it."""


SourcedPlan = tuple[tuple[int | None, ExpertsConfig, str], ...]
"""An `ExpertsPlan` with, for each range, where its configuration comes from."""

MeasuredConfigs = Sequence[tuple[int, ExpertsConfig]]
"""(T at which it was measured, the best configuration there), rising."""

HEURISTICS = "heuristics"
MEASURED = "measured here"


def choose_plan(problem: ExpertsProblem, device_name: str) -> tuple[ExpertsPlan, str]:
    """(plan, where it comes from) of a layer on a device: its table's ranges, then the heuristics'."""
    sourced = sourced_plan(problem, device_name)
    tabled = [end for end, _, source in sourced if source != HEURISTICS]
    source = f"table of {device_name} up to T = {tabled[-1]}, heuristics above" if tabled else HEURISTICS
    return tuple((end, config) for end, config, _ in sourced), source


def sourced_plan(problem: ExpertsProblem, device_name: str, measured: MeasuredConfigs = ()) -> SourcedPlan:
    """The plan of a layer on a device: what was measured here, then the device's table, then the heuristics."""
    heuristics: SourcedPlan = tuple((end, config, HEURISTICS) for end, config in default_plan(problem))
    key = (
        problem.num_experts, problem.top_k, problem.hidden_size, problem.intermediate_size, problem.w13_unit,
        problem.w2_unit,
    )  # fmt: skip
    table = TABLES.get(device_name, {}).get(key)
    plan = heuristics
    # Measured with all experts here: of E experts over ranks, each gets fewer rows at the same T.
    alone = problem.all_experts in (0, problem.num_experts)
    if table is not None and problem.itemsize == 2 and problem.gated and alone:
        last = table[-1][0]
        assert last is not None
        named = tuple((end, config, f"table of {device_name}") for end, config in table)
        plan = named + _after(heuristics, last)
    return _overlay(plan, measured)


def measured_plan(plan: ExpertsPlan, measured: MeasuredConfigs) -> ExpertsPlan:
    """The plan with what was measured in the place of what it had."""
    overlaid = _overlay(tuple((end, config, "") for end, config in plan), measured)
    return tuple((end, config) for end, config, _ in overlaid)


def _overlay(plan: SourcedPlan, measured: MeasuredConfigs) -> SourcedPlan:
    """Each measured configuration holds around its T: to the geometric mean with its neighbour, and to at most 2 T.

    No further, because a configuration may only be as large as its T is small (a by-slot scan, say).
    """
    result: list[tuple[int | None, ExpertsConfig, str]] = []
    covered = 0  # the plan up to here is decided
    for i, (tokens, config) in enumerate(measured):
        first = max(tokens // 2, covered) + 1
        last = 2 * tokens
        if i + 1 < len(measured):
            last = min(last, math.isqrt(tokens * measured[i + 1][0]))
        if first - 1 > covered:
            result += _between(plan, covered, first - 1)
        result.append((last, config, MEASURED))
        covered = last
    return (*result, *_after(plan, covered)) if measured else plan


def _between(plan: SourcedPlan, after: int, last: int) -> list[tuple[int | None, ExpertsConfig, str]]:
    """The part of a plan for `after` < T <= `last`."""
    found: list[tuple[int | None, ExpertsConfig, str]] = []
    for end, config, source in _after(plan, after):
        if end is None or end >= last:
            return [*found, (last, config, source)]
        found.append((end, config, source))
    raise AssertionError("a plan's last range has no end")


def _after(plan: SourcedPlan, last: int) -> SourcedPlan:
    """The part of a plan for T > `last`."""
    return tuple(item for item in plan if item[0] is None or item[0] > last)
