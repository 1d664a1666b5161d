"""What moe-batched declares, and that a plan built on it computes what the reference does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import attrs
import pytest
import torch

import moe_core
from moe_batched import plugin
from moe_core.config import ActivationSpec, MoEConfig, MoEParallelConfig, Problem
from moe_core.kernel import MoEKernel
from moe_core.plugins import registry
from moe_core.reference import moe_reference
from moe_core.types import Duty, ExpertWeights, GateUpLayout, Routing

CONFIG = MoEConfig(
    num_experts=5, top_k=2, hidden_size=24, intermediate_size=11, dtype=torch.float32, debug=True,
    activation=ActivationSpec("swiglu_oai", GateUpLayout.INTERLEAVED, limit=7.0, bias=True),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """Discovered where it is installed; registered in process where the tests run from a checkout alone."""
    if "batched" in registry().dispatch:
        yield
        return
    record = moe_core.register_plugin(plugin)
    yield
    moe_core.unregister_plugin(record.name)


def test_a_plan_with_it_computes_what_the_reference_does() -> None:
    torch.manual_seed(0)
    plan = moe_core.plan(CONFIG, dispatch="batched", experts="torch", device="cpu")
    assert plan.parallel.use_batched_activation_format
    weights = ExpertWeights(
        torch.randn(5, 22, 24), torch.randn(5, 24, 11), GateUpLayout.INTERLEAVED, torch.randn(5, 22), torch.randn(5, 24)
    )
    kernel = MoEKernel(plan)
    for tokens in (0, 1, 9):
        x, ids, scale = torch.randn(tokens, 24), torch.randint(-1, 5, (tokens, 2)), torch.rand(tokens, 2)
        out, shared = kernel(x, Routing(ids, scale), weights)
        assert shared is None
        torch.testing.assert_close(out, moe_reference(x, ids, scale, weights, CONFIG.activation), atol=1e-4, rtol=1e-4)


def test_finalize_owns_weight_and_sum() -> None:
    owners = moe_core.plan(CONFIG, dispatch="batched", device="cpu").owners
    assert owners[Duty.ROUTER_WEIGHT] == owners[Duty.TOPK_SUM] == "finalize of batched"


def test_local_wins_unless_it_is_asked_for() -> None:
    assert moe_core.plan(CONFIG, device="cpu").dispatch.name == "local"


def test_between_ranks_it_wants_to_know_the_most_tokens() -> None:
    refuse = plugin.BATCHED.refuse
    assert refuse is not None
    own_tokens = MoEParallelConfig.fold(dp_size=2, expert_parallel=True)
    assert refuse(Problem(config=CONFIG, parallel=MoEParallelConfig(ep_size=2))) is None
    reason = refuse(Problem(config=CONFIG, parallel=own_tokens))
    assert reason is not None
    assert "the row capacity is max_tokens_per_rank · 2; set it in MoEConfig" in reason
    assert refuse(Problem(config=attrs.evolve(CONFIG, max_tokens_per_rank=8), parallel=own_tokens)) is None


def test_its_declaration_imports_nothing_heavy() -> None:
    """Listing plugins imports plugin.py and not the implementation."""
    code = "import sys, moe_batched.plugin; print('moe_batched.prepare_finalize' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
