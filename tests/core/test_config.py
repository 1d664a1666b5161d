"""Configs: validated at construction; every error names the field, the bad value and the legal ones."""

from __future__ import annotations

import attrs
import pytest
import torch

import moe_core
from moe_core import (
    ActivationSpec,
    GateUpLayout,
    MoEConfig,
    MoEError,
    MoEParallelConfig,
    Problem,
    RoutedScaling,
    RouterSpec,
    SharedExpertsOrder,
)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_experts": 0}, ["MoEConfig.num_experts = 0", "int >= 1"]),
        ({"top_k": 7}, ["MoEConfig.top_k = 7", "1 to num_experts = 6"]),
        ({"top_k": True}, ["MoEConfig.top_k = True", "int >= 1"]),
        ({"hidden_size": -4}, ["MoEConfig.hidden_size = -4", "int >= 1"]),
        ({"dtype": torch.float64}, ["MoEConfig.dtype = torch.float64", "torch.bfloat16"]),
        ({"padded_hidden_size": 8}, ["MoEConfig.padded_hidden_size = 8", "hidden_size = 24"]),
        ({"placement": "linear"}, ["MoEConfig.placement = 'linear'", "LINEAR", "ROUND_ROBIN"]),
        ({"max_tokens_per_rank": 0}, ["max_tokens_per_rank", "0"]),
        ({"routed_scaling_factor": 0.0}, ["MoEConfig.routed_scaling_factor = 0.0", "finite number, not 0"]),
        ({"routed_scaling_factor": float("nan")}, ["routed_scaling_factor = nan", "finite"]),
        ({"routed_scaling_factor": "2"}, ["routed_scaling_factor = '2'", "finite"]),
        ({"activation": "silu"}, ["MoEConfig.activation = 'silu'", "ActivationSpec"]),
        ({"router": "softmax"}, ["MoEConfig.router = 'softmax'", "RouterSpec"]),
        ({"cuda_graph": "no"}, ["MoEConfig.cuda_graph = 'no'", "True, False"]),
        (
            {"routed_scaling": RoutedScaling.INVERSE_ON_SHARED},
            ["routed_scaling = INVERSE_ON_SHARED", "ON_ROUTED"],
        ),
        (
            {"shared_experts_order": SharedExpertsOrder.INTERNAL},
            ["shared_experts_order", "has_shared_experts = False", "NONE"],
        ),
        (
            {"shared_experts_order": SharedExpertsOrder.NONE, "has_shared_experts": True},
            ["shared_experts_order", "has_shared_experts = True", "any order but NONE"],
        ),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_the_legal_ones(config, changes, parts):
    with pytest.raises(ValueError) as caught:
        config(**changes)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"function": "swish"}, ["ActivationSpec.function = 'swish'", "silu"]),
        ({"function": "relu2"}, ["'relu2' with a gate", "silu, gelu, gelu_tanh, swiglu_oai"]),
        ({"function": "swiglu_oai", "gate_up_layout": None}, ["'swiglu_oai' without a gate", "relu2"]),
        ({"limit": -1.0}, ["ActivationSpec.limit = -1.0", "> 0"]),
        ({"limit": "7"}, ["ActivationSpec.limit = '7'", "finite"]),
        ({"alpha": "x"}, ["ActivationSpec.alpha = 'x'", "finite"]),
        ({"gate_up_layout": "halves"}, ["ActivationSpec.gate_up_layout = 'halves'", "INTERLEAVED"]),
    ],
)
def test_a_bad_activation_is_named(arguments, parts):
    with pytest.raises(ValueError) as caught:
        ActivationSpec(**arguments)
    for part in parts:
        assert part in str(caught.value)


def test_configs_are_frozen_comparable_and_printable(config):
    assert config() == config()
    assert config() != config(top_k=1)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        config().top_k = 3
    spec = RouterSpec.of("grouped_sigmoid", topk_groups=2, num_groups=4)
    assert spec == RouterSpec("grouped_sigmoid", {"num_groups": 4, "topk_groups": 2})
    assert hash(ActivationSpec(gate_up_layout=GateUpLayout.INTERLEAVED))


def test_expert_parallelism_folds_tp_and_dp_into_ep():
    seen = {
        MoEParallelConfig.fold(tp_size=2, tp_rank=t, dp_size=3, dp_rank=d, expert_parallel=True).ep_rank
        for t in range(2)
        for d in range(3)
    }
    assert seen == set(range(6))
    folded = MoEParallelConfig.fold(tp_size=2, tp_rank=1, dp_size=3, dp_rank=2, expert_parallel=True)
    assert (folded.tp_size, folded.ep_size, folded.ep_rank, folded.dp_size) == (1, 6, 5, 3)
    unfolded = MoEParallelConfig.fold(tp_size=2, tp_rank=1)
    assert (unfolded.tp_size, unfolded.tp_rank, unfolded.ep_size) == (2, 1, 1)


def test_replicated_tokens_are_recognised():
    assert MoEParallelConfig.fold(tp_size=4, expert_parallel=True).tokens_are_replicated
    assert not MoEParallelConfig.fold(dp_size=4, expert_parallel=True).tokens_are_replicated
    assert not MoEParallelConfig.fold(tp_size=4, expert_parallel=True, sequence_parallel=True).tokens_are_replicated


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"tp_size": 2, "tp_rank": 2}, ["tp_rank = 2", "0 to tp_size - 1 = 1"]),
        ({"ep_size": 0}, ["ep_size = 0", "int >= 1"]),
        ({"tp_size": 2, "ep_size": 2}, ["tp_size = 2", "ep_size = 2", "fold"]),
    ],
)
def test_a_bad_spread_is_named(arguments, parts):
    with pytest.raises(ValueError) as caught:
        MoEParallelConfig(**arguments)
    for part in parts:
        assert part in str(caught.value)


def test_more_ranks_than_experts_and_uneven_splits_are_named(config):
    with pytest.raises(ValueError, match=r"ep_size = 7; legal values: 1 to num_experts = 6"):
        Problem(config=config(), parallel=MoEParallelConfig(ep_size=7))
    with pytest.raises(ValueError, match=r"tp_size = 3; legal values: divisors of intermediate_size = 16"):
        Problem(config=config(), parallel=MoEParallelConfig(tp_size=3))


@pytest.mark.parametrize("question", ["use_batched_activation_format", "needs_round_robin_routing_tables"])
def test_the_two_properties_answer_from_the_selected_dispatch_only(config, question, plugin, backend):
    with pytest.raises(MoEError, match=rf"{question}.*read plan\.parallel"):
        getattr(MoEParallelConfig(), question)
    assert getattr(moe_core.plan(config(), device="cpu").parallel, question) is False
    factory, tables = backend("dispatch", "local", needs_round_robin_routing_tables=True)
    plugin(dispatch=("tables", factory, tables))
    with_tables = moe_core.plan(config(), dispatch="tables", device="cpu").parallel
    batched = moe_core.plan(config(), dispatch="batched", device="cpu").parallel
    # two facts: a dispatch may want tables without the batched format, and the other way round
    assert (with_tables.use_batched_activation_format, with_tables.needs_round_robin_routing_tables) == (False, True)
    assert (batched.use_batched_activation_format, batched.needs_round_robin_routing_tables) == (True, False)


def test_config_is_kept_whole_by_the_plan(config):
    made = config(routed_scaling_factor=2.5)
    assert isinstance(made, MoEConfig)
    assert moe_core.plan(made, device="cpu").config is made
