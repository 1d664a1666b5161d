"""Every architecture: the same logits as transformers' own code, by plans that know what the experts compute."""

from __future__ import annotations

import pytest
import torch
import transformers

import moe_core.integrations.transformers as bridge

LIMITED = ("gpt_oss", "deepseek_v4", "minimax_m3_vl_text", "openai_privacy_filter")


def test_logits_equal_eager_and_depend_on_the_experts(tiny, architecture, calls, close):
    one = tiny(architecture)
    assert len(one.experts) == one.layers
    expected, without = one.logits("eager"), one.logits("zero")
    actual = one.logits("moe_core")
    assert calls == one.experts, "our function ran once for every MoE layer"
    close(actual, expected)
    effect = float((without - expected).abs().max())
    assert effect > 1e4 * float((actual - expected).abs().max()), "so much do the experts matter"
    assert effect > 0.05


def test_attach_says_what_each_layer_computes(tiny, architecture):
    one = tiny(architecture)
    plans = bridge.attach(one.model)
    assert list(plans) == list(bridge.experts_modules(one.model))
    for plan, module in zip(plans.values(), one.experts, strict=True):
        assert plan.config.top_k == 2
        assert plan.problem.routing_is_external
        if one.function == "own":
            assert isinstance(plan, bridge.BridgePlan)
            assert plan.own_gate
            assert "runs unfused" in plan.explain()
            assert plan.to_dict()["layer"]["activation"] == "the module's own"
            continue
        activation = plan.config.activation
        assert activation.function == one.function
        limit = getattr(module, "limit", getattr(module, "swiglu_limit", None))
        assert activation.limit == limit
        assert (limit is not None) == (one.name in LIMITED)
        assert activation.gated == (one.name != "nemotron_h")
        assert activation.bias == (one.name in ("gpt_oss", "openai_privacy_filter"))


def test_views_copy_nothing(tiny, architecture):
    one = tiny(architecture)
    one.logits("moe_core")
    for module in one.experts:
        weights = bridge.layer_for(module).weights
        up = module.gate_up_proj if module.has_gate else module.up_proj
        assert weights.w13.data_ptr() == up.data_ptr()
        assert weights.w2.data_ptr() == module.down_proj.data_ptr()
        assert weights.w13.shape[2] == weights.w2.shape[1]
        if module.has_bias:
            assert weights.w13_bias.data_ptr() == module.gate_up_proj_bias.data_ptr()
            assert weights.w2_bias.data_ptr() == module.down_proj_bias.data_ptr()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "nemotron_h"])
def test_from_disk_by_name(tiny, name, tmp_path, calls, close):
    one = tiny(name)
    one.model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="moe_core", dtype=torch.float32
    ).eval()
    expected = one.logits("eager")
    close(one.logits(model=loaded), expected)
    assert len(calls) == one.layers
    assert "moe_core" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_generate_gives_the_same_tokens(tiny, name, calls):
    one = tiny(name)
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(one.ids)}
    one.model.set_experts_implementation("eager")
    expected = one.model.generate(one.ids, **arguments)
    one.model.set_experts_implementation("moe_core")
    assert torch.equal(one.model.generate(one.ids, **arguments), expected)
    assert len(calls) == 6 * one.layers
