"""Launch parameters that were measured, by device, shape and scheme (`python -m benchmarks.tune_experts`).

A table covers the small T, where the best pair of kernels is hard to predict; above its last T the heuristics of
`_launch.py` hold, which were fitted to the same measurements. H hidden · I intermediate · E_l experts · K top-k.
"""

from __future__ import annotations

from moe_core.ops._launch import ExpertsPlan, ExpertsProblem, ScanConfig, SlotsConfig, TileConfig, default_plan

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


def choose_plan(problem: ExpertsProblem, device_name: str) -> tuple[ExpertsPlan, str]:
    """(plan, where it comes from) of a layer on a device: its table's ranges, then the heuristics'."""
    heuristics = default_plan(problem)
    key = (
        problem.num_experts, problem.top_k, problem.hidden_size, problem.intermediate_size, problem.w13_unit,
        problem.w2_unit,
    )  # fmt: skip
    table = TABLES.get(device_name, {}).get(key)
    if table is None or problem.itemsize != 2 or not problem.gated:
        return heuristics, "heuristics"
    last = table[-1][0]
    assert last is not None
    above = tuple((end, config) for end, config in heuristics if end is None or end > last)
    return table + above, f"table of {device_name} up to T = {last}, heuristics above"
