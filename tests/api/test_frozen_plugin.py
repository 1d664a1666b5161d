"""A plugin that was written for plugin API (1, 0) loads and gives right numbers, whatever the core has become."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path

import pytest
import torch

import moe_core
from moe_core.reference import moe_reference
from moe_core.types import ExpertWeights

FROZEN = Path(__file__).parent / "plugin_1_0.py"
SHA256 = "c30fb74d2e8ec17d8373cccccdbd1d9435b9d934d5cf30206ecc285fe90d091b"
NAMES = {"dispatch": "frozen_stay", "experts": "frozen_loop", "runner": "frozen_runner"}


@pytest.fixture
def frozen(monkeypatch):
    monkeypatch.syspath_prepend(str(FROZEN.parent))
    yield moe_core.register_plugin(importlib.import_module(FROZEN.stem))
    moe_core.unregister_plugin("plugin_1_0")


def test_the_plugin_is_as_it_was():
    found = hashlib.sha256(FROZEN.read_bytes()).hexdigest()
    assert found == SHA256, "plugin_1_0.py is what an author shipped; mend the core, or raise the major version"


def test_it_loads_with_all_it_brings(frozen):
    assert frozen.registers == (
        "dispatch:frozen_stay",
        "experts:frozen_loop",
        "scheme:frozen_fp8",
        "router:frozen_first",
        "runner:frozen_runner",
    )


@pytest.mark.parametrize("scheme", ["unquantized", "frozen_fp8"])
def test_it_runs_and_is_right(frozen, scheme):
    config = moe_core.MoEConfig(
        num_experts=4,
        top_k=2,
        hidden_size=16,
        intermediate_size=8,
        dtype=torch.float32,
        router=moe_core.RouterSpec("frozen_first"),
    )
    runner = moe_core.build_runner(config, scheme=scheme, device="cpu", **NAMES)
    torch.manual_seed(0)
    gate, up, down = torch.randn(4, 8, 16), torch.randn(4, 8, 16), torch.randn(4, 16, 8)
    for expert in range(4):
        for name, tensor in {"gate": gate, "up": up, "down": down}.items():
            runner.routed_experts.load_expert(expert, name, tensor[expert])
    runner.routed_experts.pack_weights()
    x = torch.randn(5, 16)
    weights = ExpertWeights(torch.cat([gate, up], dim=1), down, moe_core.GateUpLayout.GATE_UP)
    ids, half = torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
    expected = moe_reference(x, ids, half, weights, config.activation, compute_dtype=torch.float64)
    error = (runner(x, router_logits=torch.randn(5, 4)) - expected).norm() / expected.norm()
    assert error < (1e-6 if scheme == "unquantized" else 0.05)
