"""`moe-core tune`: a table of times, stored for plans to come; nothing to tune is said, not hidden."""

from __future__ import annotations

import functools
import json
import time

import pytest
import torch

import moe_core
from moe_core import timing, tuned, tuner
from moe_core.builtin.torch_experts import TorchExperts
from moe_core.plugins import registry


class Slow(TorchExperts):
    def apply(self, *arguments):
        time.sleep(0.01)
        super().apply(*arguments)


class Broken(TorchExperts):
    def apply(self, *arguments):
        raise ValueError("no such kernel")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(tuner, "host_us", functools.partial(timing.host_us, rounds=2, at_least_s=0))
    return tmp_path / "cache"


@pytest.fixture
def rivals():
    """Two more experts on the CPU: a slow one that priority prefers, and a dead one."""
    import types

    capabilities = registry().find("experts", "torch").capabilities
    module = types.ModuleType("rivals")
    module.moe_core_api = (1, 0)

    @moe_core.hookimpl
    def moe_core_register_experts(register):
        register("slow", lambda c, p, *_: Slow(c, p), capabilities, priority=5)
        register("broken", lambda c, p, *_: Broken(c, p), capabilities, priority=9)

    module.moe_core_register_experts = moe_core_register_experts
    moe_core.register_plugin(module)
    yield
    moe_core.unregister_plugin("rivals")


SHAPE = ("tune", "--shape", "64,32,8,2", "--dtype", "float32", "--device", "cpu")


def test_a_shape_is_measured_and_plans_use_it(invoke, rivals):
    result = invoke(*SHAPE, "--tokens", 1, "--tokens", 9)
    assert result.exit_code == 0, result.output
    assert "64,32,8,2 (H 64, I 32, E 8, K 2, float32, unquantized) on cpu" in result.stdout
    assert result.stdout.count("ValueError: no such kernel") == 2
    assert "from 0 rows: torch (measured at 1 rows: " in result.stdout
    assert "T = 1: broken skipped: ValueError: no such kernel" in result.stderr
    config = moe_core.MoEConfig(
        num_experts=8, top_k=2, hidden_size=64, intermediate_size=32, dtype=torch.float32
    )  # fmt: skip
    plan = moe_core.plan(config, device="cpu")
    assert [item.candidate.name for item in plan.ranges] == ["torch"]
    assert plan.tuned.source in result.stdout.replace("\n", "")


def test_a_model_is_measured_one_layer_of_each_kind(invoke, rivals, checkpoints):
    found = json.loads(invoke("tune", checkpoints("Mixtral"), "--device", "cpu", "--tokens", 2, "--json").stdout)
    (layer,) = found["layers"]
    assert layer["title"] == "mixtral model.layers.0.mlp.experts"
    (point,) = layer["points"]
    assert point["rows"] == 2
    assert [label.split()[0] for label in point["failures"]] == ["broken"]
    assert sorted(label.split()[0] for label in point["microseconds"]) == ["slow", "torch"]
    explained = json.loads(invoke("explain", checkpoints("Mixtral"), "--device", "cpu", "--json").stdout)
    assert explained["groups"][0]["plan"]["experts"][0]["name"] == "torch"
    assert "times that moe-core tune measured on " in explained["groups"][0]["plan"]["ranges_by"]


def test_weights_are_laid_as_transformers_lays_them(invoke, rivals, checkpoints, monkeypatch):
    from moe_core.cli import tune as command

    seen = []
    original = command.Tuner.__init__
    monkeypatch.setattr(
        command.Tuner, "__init__", lambda self, *a, **k: (seen.append(k["transposed"]), original(self, *a, **k))[1]
    )
    for name in ("gpt-oss", "Qwen3-MoE"):
        assert invoke("tune", checkpoints(name), "--device", "cpu", "--tokens", 1).exit_code == 0
    assert seen == [True, False]


def test_nothing_to_tune_is_said(invoke, cache):
    result = invoke(*SHAPE)
    assert result.exit_code == 0
    assert "nothing to tune: no experts but torch come into question" in result.stderr
    assert not cache.exists()


def test_a_damaged_table_is_told_and_replaced(invoke, rivals, cache):
    invoke(*SHAPE, "--tokens", 1)
    (file,) = cache.rglob("*.json")
    file.write_text("{")
    result = invoke(*SHAPE, "--tokens", 1)
    assert "is damaged" in result.stderr
    assert json.loads(file.read_text())["formats"]["standard"]["points"]


def test_either_a_model_or_shapes(refused, checkpoints):
    assert "either a model's folder or --shape" in refused("tune")
    assert "either a model's folder or --shape" in refused("tune", checkpoints("Mixtral"), "--shape", "mixtral-8x7b")
    assert "unknown quantization scheme 'fp9'" in refused(*SHAPE, "--scheme", "fp9")
