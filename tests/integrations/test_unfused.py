"""Experts that call the module's own functions: any gate, any norm, in both formats."""

from __future__ import annotations

import weakref

import pytest
import torch
from transformers.integrations.moe import ExpertsInterface

import moe_core.integrations.transformers as bridge
from moe_core import Dispatched, ExpertWeights, GateUpLayout, UnsupportedError
from moe_core.integrations.transformers.layer import experts_forward
from moe_core.integrations.transformers.unfused import ModuleExperts
from moe_core.reference import moe_reference
from moe_core.types import ActivationFormat

E, H, I, R, K = 5, 12, 8, 7, 2


class Module(torch.nn.Module):
    """Just enough of an experts module, with the one gate that the reference knows too."""

    has_gate = True

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(3)
    weights = ExpertWeights(
        w13=torch.randn(E, H, 2 * I, generator=generator).transpose(1, 2),
        w2=torch.randn(E, H, I, generator=generator),
        gate_up_layout=GateUpLayout.GATE_UP,
        w13_bias=torch.randn(E, 2 * I, generator=generator),
        w2_bias=torch.randn(E, H, generator=generator),
    )
    x = torch.randn(R, H, generator=generator)
    ids = torch.randint(-1, E, (R, K), generator=generator)
    return weights, x, ids, torch.rand(R, K, generator=generator)


def truth(x, ids, topk_weights, weights):
    from moe_core import ActivationSpec

    return moe_reference(x, ids, topk_weights, weights, ActivationSpec(bias=True))


@pytest.mark.parametrize("valid", [None, 0, 4, R])
def test_standard_format_equals_the_reference(case, valid, close):
    weights, x, ids, topk_weights = case
    module = Module()
    rows = R if valid is None else valid
    expected = truth(x[:rows], ids[:rows], topk_weights[:rows], weights)
    x, topk_weights = x.clone(), topk_weights.clone()
    x[rows:], topk_weights[rows:] = float("nan"), float("nan")
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32)
    dispatched = Dispatched(x=x, handle=None, topk_ids=ids, topk_weights=topk_weights, num_rows=count)
    out = torch.full((R, H), float("nan"))
    ModuleExperts(weakref.ref(module)).apply(dispatched, weights, {}, out)
    close(out[:rows], expected) if rows else None
    assert not out[rows:].any()


def test_batched_format_equals_the_reference(case, close):
    weights, x, _, _ = case
    module, counts = Module(), torch.tensor([0, 3, R, 1, 0], dtype=torch.int32)
    batch = torch.full((E, R, H), float("nan"))
    for expert, count in enumerate(counts.tolist()):
        batch[expert, :count] = x[:count]
    out = torch.full((E, R, H), float("nan"))
    experts = ModuleExperts(weakref.ref(module))
    assert experts.workspace_shapes(R, ActivationFormat.BATCHED) == {}
    experts.apply(Dispatched(x=batch, handle=None, tokens_per_expert=counts), weights, {}, out)
    for expert, count in enumerate(counts.tolist()):
        if count:
            ids = torch.full((count, 1), expert)
            close(out[expert, :count], truth(x[:count], ids, torch.ones(count, 1), weights))


def test_a_gate_that_nobody_knows_runs_as_the_module_has_it(tiny, close, monkeypatch):
    one = tiny("mixtral")
    module = one.experts[0]
    monkeypatch.setattr(
        type(module), "_apply_gate", lambda _, x: torch.sin(x[..., :32]) * torch.exp(-x[..., 32:].abs())
    )
    plan = bridge.attach(one.model)["model.layers.0.mlp.experts"]
    assert "sin" not in plan.explain()
    assert "MixtralExperts._apply_gate equals no activation" in plan.explain()
    torch.manual_seed(4)
    x = torch.randn(6, 64)
    weights, ids = torch.rand(6, 8).topk(3)
    with torch.no_grad():
        expected = ExpertsInterface._global_mapping["grouped_mm"](module, x, ids, weights)
        close(experts_forward(module, x, ids, weights), expected)
    with pytest.raises(UnsupportedError, match="experts 'torch' cannot run"):
        bridge.attach(one.model, experts="torch")


def test_a_norm_after_each_expert_is_not_dropped(tiny, close):
    module = tiny("mixtral").experts[0]
    module.has_post_expert_norm, module.post_expert_norm = True, torch.nn.LayerNorm(64)
    torch.manual_seed(4)
    x = torch.randn(6, 64)
    weights, ids = torch.rand(6, 8).topk(2)
    expected = torch.zeros(6, 64)
    with torch.no_grad():
        for token in range(6):
            for choice in range(2):
                expert = ids[token, choice]
                h = module._apply_gate(module.gate_up_proj[expert] @ x[token])
                expected[token] += weights[token, choice] * module.post_expert_norm(module.down_proj[expert] @ h)
        close(experts_forward(module, x, ids, weights), expected)
