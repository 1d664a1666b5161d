"""Whole models: attached, planned from a config alone, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers.integrations import finegrained_fp8
from transformers.integrations.moe import use_experts_implementation

import moe_core
import moe_core.integrations.transformers as bridge
from moe_core import UnsupportedError
from moe_core.integrations.transformers.layer import experts_forward


@pytest.fixture
def batched():
    """The name of the batched dispatch, registered in process where it isn't installed."""
    if any("dispatch:batched" in plugin.registers for plugin in moe_core.plugins()):
        yield "batched"
        return
    plugin = pytest.importorskip("moe_batched.plugin")
    moe_core.register_plugin(plugin, "batched-for-test")
    yield "batched"
    moe_core.unregister_plugin("batched-for-test")


# ---- attach


def test_attach_sets_the_implementation_and_plans_at_once(tiny, mixed, calls, close):
    one = tiny(mixed)
    expected = one.logits("eager")
    plans = bridge.attach(one.model)
    assert not calls
    assert set(plans) == set(bridge.experts_modules(one.model))
    for name, plan in plans.items():
        assert bridge.layer_for(one.model.get_submodule(name)).plans == {2: plan}
        assert plan.dispatch.name == "local"
    close(one.logits(), expected)
    assert calls == one.experts


def test_a_forced_dispatch_is_honoured(tiny, mixed, batched, close):
    one = tiny(mixed)
    expected = one.logits("eager")
    plans = bridge.attach(one.model, dispatch=batched)
    assert {plan.dispatch.name for plan in plans.values()} == {batched}
    assert all(plan.parallel.use_batched_activation_format for plan in plans.values())
    close(one.logits(), expected)


def test_a_copy_honours_the_request_and_attaching_again_changes_it(tiny, batched):
    one = tiny("mixtral")
    bridge.attach(one.model, dispatch=batched)
    copied = copy.deepcopy(one.model)
    one.logits(model=copied)
    for module in bridge.experts_modules(copied).values():
        assert {plan.dispatch.name for plan in bridge.layer_for(module).plans.values()} == {batched}
    keys = [bridge.layer_for(module).key for module in one.experts]
    assert {plan.dispatch.name for plan in bridge.attach(one.model).values()} == {"local"}
    one.logits()
    for module, key in zip(one.experts, keys, strict=True):
        assert bridge.layer_for(module).key == key, "graphs compiled before stay valid"
        assert {plan.dispatch.name for plan in bridge.layer_for(module).plans.values()} == {"local"}


@pytest.mark.parametrize("kind", ["dispatch", "experts"])
@pytest.mark.parametrize("name", ["mixtral", "inkling2_text"])
def test_an_unknown_backend_is_refused_with_those_that_are_known(tiny, kind, name):
    one = tiny(name)
    with pytest.raises(UnsupportedError, match="no_such") as refusal:
        bridge.attach(one.model, **{kind: "no_such"})
    text = str(refusal.value)
    assert "local" in text if kind == "dispatch" else "torch" in text
    assert ("pip install moe-no-such" if kind == "dispatch" else "pip install moe-experts-no-such") in text


@pytest.mark.parametrize("name", ["inkling2_text", "muse_spark_text"])
def test_named_experts_cannot_run_a_gate_that_is_not_theirs(tiny, name):
    with pytest.raises(UnsupportedError, match="experts 'torch' cannot run"):
        bridge.attach(tiny(name).model, experts="torch")


def test_unfused_plans_carry_every_refused_candidate(tiny):
    plan = next(iter(bridge.attach(tiny("inkling2_text").model).values()))
    table = {row["experts"]: row for row in plan.to_dict()["candidates"] if row["dispatch"] == "local"}
    assert "equals no activation" in " ".join(table["torch"]["reasons"])
    assert any("_apply_gate" in note for note in plan.to_dict()["notes"])


def test_post_expert_norm_is_named(tiny):
    plan = next(iter(bridge.attach(tiny("muse_spark_text").model).values()))
    assert "passes through MuseSpark" in plan.explain()


# ---- refusals


def test_architectures_without_the_interface_are_refused_by_name(tiny, refused):
    one = tiny(refused)
    before = one.logits()
    with pytest.raises(UnsupportedError) as refusal:
        bridge.attach(one.model)
    text = str(refusal.value)
    assert type(one.model).__name__ in text
    assert f"'{one.model.config.model_type}'" in text
    assert "mixtral" in text
    assert "gpt_oss" in text
    assert torch.equal(one.logits(), before)
    with pytest.raises(UnsupportedError, match=type(one.model).__name__):
        bridge.layer_plans(one.model.config, device="cpu")


def test_a_dense_model_is_refused():
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM"):
        bridge.attach(transformers.LlamaForCausalLM(config))


def packed_module(**changes: Any) -> torch.nn.Module:
    class Packed(finegrained_fp8.FP8Experts):
        pass

    cls = use_experts_implementation(
        experts_class=Packed, experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS, has_bias=False, has_gate=True
    )
    config = transformers.MixtralConfig(hidden_size=64, intermediate_size=32, num_local_experts=4)
    config._experts_implementation_internal = "moe_core"
    return cls(config=config, **{"block_size": (32, 32), "activation_scheme": "dynamic", **changes})


def test_an_fp8_module_is_refused_by_what_it_is():
    module = packed_module()
    arguments = torch.randn(3, 64), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    for call in (module, lambda *a: experts_forward(module, *a)):
        with pytest.raises(UnsupportedError) as refusal:
            call(*arguments)
        text = str(refusal.value)
        assert "float8_e4m3fn" in text
        assert "gate_up_proj_scale_inv" in text
        assert "(32, 32)" in text
        assert "moe-quant-fp8" in text
        assert "unquantized" in text


def test_weights_of_another_dtype_are_refused(tiny):
    module = tiny("mixtral").experts[0].double()
    with pytest.raises(UnsupportedError, match=r"float64.*legal dtypes: float32, float16, bfloat16"):
        experts_forward(module, torch.randn(3, 64), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))


def test_a_flag_of_a_later_transformers_is_refused(tiny):
    one = tiny("mixtral")
    one.experts[1].has_pre_expert_norm = True
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.experts.*has_pre_expert_norm"):
        bridge.attach(one.model)


def test_shapes_that_disagree_are_refused(tiny):
    one = tiny("mixtral")
    one.experts[0].down_proj = torch.nn.Parameter(torch.zeros(8, 64, 30))
    with pytest.raises(UnsupportedError, match=r"\(8, 64, 30\)"):
        bridge.attach(one.model)


def test_experts_beside_the_interface_are_refused(tiny):
    one = tiny("mixtral")

    class Mxfp4Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("gate_up_proj_blocks", torch.zeros(8, 4, 2, 16, dtype=torch.uint8))

    one.model.model.layers[1].mlp.experts = Mxfp4Experts()
    with pytest.raises(UnsupportedError, match=r"Mxfp4Experts.*dequantize=True"):
        bridge.attach(one.model)


@pytest.mark.parametrize(
    ("quantization", "word"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
    ],
)
def test_checkpoints_whose_scales_transformers_loses_are_refused(tiny, quantization, word):
    one = tiny("mixtral")
    one.model.config.quantization_config = quantization
    with pytest.raises(UnsupportedError, match=word):
        bridge.attach(one.model)
    with pytest.raises(UnsupportedError, match=word):
        bridge.layer_plans(one.model.config, device="cpu")
    one.model.set_experts_implementation("moe_core")
    with pytest.raises(UnsupportedError, match=word):
        one.logits()


def test_a_refused_model_runs_on_as_it_did(tiny, batched, close):
    one = tiny("mixtral")
    expected = one.logits("eager")
    bridge.attach(one.model, dispatch=batched)
    one.model.set_experts_implementation("eager")
    one.experts[1].has_pre_expert_norm = True
    with pytest.raises(UnsupportedError):
        bridge.attach(one.model, dispatch="local")
    assert one.model.config._experts_implementation == "eager"
    assert [bridge.layer_for(module).requested.dispatch for module in one.experts] == [batched, batched]
    close(one.logits(), expected)


# ---- layer_plans


def test_plans_from_a_config_are_those_of_the_model(tiny, architecture):
    one = tiny(architecture)
    planned = bridge.layer_plans(one.model.config, device="cpu")
    if type(one.model).__name__.endswith("Model"):
        pytest.skip("a model without a head, which no config asks for")
    attached = bridge.attach(one.model)
    assert list(planned) == list(attached)
    for name, plan in planned.items():
        assert plan.explain() == attached[name].explain()
        assert plan.fingerprint() == attached[name].fingerprint()


def test_plans_of_a_large_config_cost_no_weights():
    config = transformers.DeepseekV3Config(dtype=torch.bfloat16)
    plans = bridge.layer_plans(config, device="cpu")
    assert len(plans) == 58
    plan = plans["model.layers.60.mlp.experts"]
    assert (plan.config.num_experts, plan.config.top_k, plan.config.hidden_size) == (256, 8, 7168)
    assert plan.config.dtype is torch.bfloat16


def test_a_device_that_is_not_here(tiny):
    device = moe_core.Device("cuda", (9, 0), "a GPU")
    plan = next(iter(bridge.layer_plans(tiny("mixtral").model.config, device=device).values()))
    assert plan.problem.device is device


def test_mxfp4_is_planned_as_what_transformers_makes_of_it(tiny):
    config = tiny("gpt_oss").model.config
    config.quantization_config = {"quant_method": "mxfp4"}
    plan = next(iter(bridge.layer_plans(config, device="cpu").values()))
    assert "transformers expands it" in plan.explain()
    with pytest.raises(UnsupportedError, match=r"mxfp4.*cuda"):
        bridge.layer_plans(config, device=moe_core.Device("cuda", (9, 0), "a GPU"))


def test_a_config_that_makes_no_model_is_refused():
    config = transformers.MixtralConfig()
    vars(config)["hidden_size"] = None
    with pytest.raises(UnsupportedError, match="cannot make a model of this config"):
        bridge.layer_plans(config, device="cpu")


# ---- what is supported


def test_supported_architectures_are_read_from_the_installed_transformers():
    found = bridge.supported_architectures()
    assert len(found) >= 50
    assert {"mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe"} <= set(found)
    assert not {"llama4", "jetmoe", "longcat_flash"} & set(found)


def test_debug_mode_checks_ids_on_the_step(tiny):
    one = tiny("mixtral")
    bridge.attach(one.model, debug=True)
    module = one.experts[0]
    x, weights = torch.randn(2, module.down_proj.shape[1]), torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"topk_ids range from -7 to 1; legal ids are -1 to num_experts - 1"):
        module(x, torch.tensor([[0, 1], [-7, 1]]), weights)
