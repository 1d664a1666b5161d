"""Rules from names to experts: each family's names, and no guess where two families share them."""

from __future__ import annotations

import pytest

from moe_core import CheckpointError
from moe_core.checkpoint import RULES, LayoutRule, map_experts

MAPPED = {
    ("qwen3_moe", "model.layers.3.mlp.experts.17.gate_proj.weight"): ("model.layers.3.mlp", 17, ("gate",)),
    ("deepseek_v3", "model.layers.3.mlp.experts.0.down_proj.weight"): ("model.layers.3.mlp", 0, ("down",)),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.7.w1.weight"): (
        "model.layers.0.block_sparse_moe",
        7,
        ("gate",),
    ),
    ("lfm2_moe", "model.layers.2.feed_forward.experts.1.w3.weight"): ("model.layers.2.feed_forward", 1, ("up",)),
    ("phimoe", "model.layers.2.block_sparse_moe.experts.1.w2.weight"): (
        "model.layers.2.block_sparse_moe",
        1,
        ("down",),
    ),
    ("nemotron_h", "backbone.layers.1.mixer.experts.2.up_proj.weight"): ("backbone.layers.1.mixer", 2, ("up",)),
    ("granitemoe", "model.layers.0.block_sparse_moe.input_linear.weight"): (
        "model.layers.0.block_sparse_moe",
        None,
        ("gate", "up"),
    ),
    ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_bias"): (
        "model.layers.0.mlp",
        None,
        ("gate_bias", "up_bias"),
    ),
    ("gpt_oss", "model.layers.0.mlp.experts.down_proj"): ("model.layers.0.mlp", None, ("down",)),
    ("llama4_text", "model.layers.0.feed_forward.experts.gate_up_proj"): (
        "model.layers.0.feed_forward",
        None,
        ("gate", "up"),
    ),
}


@pytest.mark.parametrize(("model_type", "name"), MAPPED)
def test_names_of_the_hub(model_type, name):
    ((block, (found,)),) = map_experts([name], model_type).items()
    assert (block, found.expert, found.parts) == MAPPED[model_type, name]


def test_equal_names_of_two_families_are_two_layouts():
    name = "model.layers.0.mlp.experts.gate_up_proj"
    ((oss,),) = map_experts([name], "gpt_oss").values()
    ((llama,),) = map_experts([name], "llama4").values()
    assert (oss.transposed, oss.interleaved) == (True, True)
    assert (llama.transposed, llama.interleaved) == (True, False)
    with pytest.raises(
        CheckpointError, match="gate_up_proj' \\(model_type 'new_moe'\\) belongs to experts, and no rule"
    ):
        map_experts([name], "new_moe")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.shared_experts.up_proj.weight",
        "model.layers.0.mlp.shared_expert.up_proj.weight",
        "model.layers.0.block_sparse_moe.router.layer.weight",
        "model.layers.0.mlp.moe_statics.e_score_correction_bias",
        "model.layers.0.shared_mlp.input_linear.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ],
)
def test_what_belongs_to_no_expert_is_left_out(name):
    assert map_experts([name], "qwen3_moe") == {}


def test_error_lists_every_rule():
    with pytest.raises(CheckpointError) as caught:
        map_experts(["model.layers.0.mlp.experts.0.gate_proj.qweight"], "qwen3_moe")
    assert "'model.layers.0.mlp.experts.0.gate_proj.qweight'" in str(caught.value)
    assert all(rule.name in str(caught.value) for rule in RULES)


def test_a_caller_can_bring_a_rule():
    rule = LayoutRule(
        name="acme", pattern=r"^(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<part>\w+)$", parts={"wide": ("gate", "up")}
    )
    ((found,),) = map_experts(["layers.0.experts.5.wide"], "acme", [*RULES, rule]).values()
    assert (found.block, found.expert, found.parts) == ("layers.0", 5, ("gate", "up"))
