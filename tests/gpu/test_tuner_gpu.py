"""`moe-core tune` on a GPU: what it finds is right, stored, and used by the layers that are built afterwards."""

import pytest
import torch

import moe_core
from moe_core import MoEConfig, ops, tuned
from moe_core.ops import ScanConfig, TileConfig
from moe_core.tuner import Tuner

CONFIG = MoEConfig(num_experts=16, top_k=2, hidden_size=256, intermediate_size=128, dtype=torch.bfloat16)
GOOD = ScanConfig(TileConfig(16, 32, 64, 4, 3), TileConfig(16, 64, 64, 4, 3))
TOO_LARGE = ScanConfig(TileConfig(16, 64, 256, 4, 16), TileConfig(16, 64, 64, 4, 3))


@pytest.fixture
def few_candidates(monkeypatch, tmp_path):
    def search(problem, tokens, device_name):
        times = yield [GOOD, TOO_LARGE]
        assert times[0] < float("inf"), "it runs"
        assert times[1] == float("inf"), "no multiprocessor has room for it"

    monkeypatch.setattr(tuned, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(ops, "search_launch", search)


@pytest.mark.usefixtures("few_candidates")
def test_found_stored_and_used():
    plan = moe_core.plan(CONFIG, device="cuda")
    assert plan.ranges_by.startswith("declared priorities")
    found = Tuner(plan, torch.device("cuda"), processes=1).run([4, 64]).of(plan.activation_format)
    assert [point.rows for point in found.points] == [4, 64]
    for point in found.points:
        assert {label.split()[0] for label in point.microseconds} == {"triton", "torch"}
        assert point.failures == {}
    runner = moe_core.build_runner(CONFIG, experts="triton", device="cuda")
    shown = runner.kernel.experts[0].launch_ranges(plan.activation_format, plan.problem.device)
    assert any(item.source == "measured here" and "16x32x64" in item.what for item in shown)
    now = moe_core.plan(CONFIG, device="cuda")
    assert now.ranges_by.startswith("times that moe-core tune measured on ")
