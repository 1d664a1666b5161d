"""Tiny random models of real architectures, made once per session, and a way to see who computed their experts."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

from transformers.integrations.moe import ExpertsInterface  # noqa: E402 - after the skip where there is none
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

import moe_core.integrations.transformers as bridge  # noqa: E402

_BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_MOE = {"intermediate_size": 64, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
_DEEPSEEK = dict(**_MOE, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1)
_LOCAL = {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_hidden_layers": 4,
    "shared_expert_intermediate_size": 32,
}
_MAMBA = {
    "moe_shared_expert_intermediate_size": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    "layers_block_type": ["mamba", "moe", "attention", "moe"],
    "num_hidden_layers": 4,
}
_JAMBA = {
    "num_experts": 4,
    "num_hidden_layers": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "use_mamba_kernels": False,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}

# model type → (config, experts modules, activation). A limit of 0.5 is low enough to bite on random weights.
ARCHITECTURES: dict[str, tuple[dict[str, Any], int, str]] = {
    "mixtral": (_LOCAL, 2, "silu"),
    "qwen2_moe": (dict(**_MOE, num_experts=8, shared_expert_intermediate_size=32), 2, "silu"),
    "qwen3_moe": (dict(**_MOE, num_experts=8), 2, "silu"),
    "qwen3_next": (dict(**_MOE, num_experts=8, **_LINEAR), 4, "silu"),
    "deepseek_v2": (dict(**_DEEPSEEK, n_group=2, topk_group=1, topk_method="greedy", **_MLA), 1, "silu"),
    "deepseek_v3": (dict(**_DEEPSEEK, n_group=2, topk_group=1, **_MLA), 1, "silu"),
    "gpt_oss": (dict(**_LOCAL, swiglu_limit=0.5, layer_types=["sliding_attention", "full_attention"]), 2, "swiglu_oai"),
    "olmoe": ({"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}, 2, "silu"),
    "glm4_moe": (dict(**_DEEPSEEK, n_group=1, topk_group=1), 1, "silu"),
    "phimoe": (_LOCAL, 2, "silu"),
    "granitemoe": (_LOCAL, 2, "silu"),
    "jamba": (dict(intermediate_size=32, num_experts_per_tok=2, **_JAMBA), 2, "silu"),
    "minimax_m2": (dict(**_LOCAL, rotary_dim=8), 2, "silu"),
    "nemotron_h": (dict(**_MOE, n_routed_experts=8, n_shared_experts=1, **_MAMBA), 2, "relu2"),
    "ernie4_5_moe": (
        dict(
            **_MOE, moe_num_experts=8, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=0, moe_layer_interval=1
        ),
        2,
        "silu",
    ),
    "hunyuan_v1_moe": ({"intermediate_size": 32, "num_experts": 8, "moe_topk": 2, "num_experts_per_tok": 2}, 2, "silu"),
    "dots1": (dict(**_DEEPSEEK, n_group=1, topk_group=1), 1, "silu"),
    "lfm2_moe": (
        dict(**_MOE, num_experts=8, num_dense_layers=1, layer_types=["full_attention", "full_attention"]),
        1,
        "silu",
    ),
    "gemma4_text": (
        {
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "top_k_experts": 2,
            "enable_moe_block": True,
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8,
        },
        2,
        "gelu_tanh",
    ),
    "deepseek_v4": (dict(**_LOCAL, n_routed_experts=8, moe_intermediate_size=32, swiglu_limit=0.5), 2, "silu"),
    "minimax_m3_vl_text": (dict(**_LOCAL, swiglu_limit=0.5), 2, "swiglu_oai"),
    "openai_privacy_filter": (dict(**_LOCAL, swiglu_limit=0.5), 2, "swiglu_oai"),
    "aria_text": (
        {"intermediate_size": 32, "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
        2,
        "silu",
    ),
    "inkling2_text": (dict(**_MOE, n_routed_experts=8, num_local_experts=8), 2, "own"),
    "muse_spark_text": (
        dict(**_MOE, moe_hidden_size=32, num_local_experts=8, mlp_layer_types=["sparse", "sparse"]),
        2,
        "own",
    ),
}
MIXED = ["mixtral", "gpt_oss", "deepseek_v3", "nemotron_h", "inkling2_text"]
"""One of each kind: plain, transposed + interleaved + bias + clamp, shared experts, no gate, a gate of its own."""
REFUSED = {
    "llama4_text": {
        "intermediate_size": 32,
        "intermediate_size_mlp": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    },
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "kv_channels": 16},
    "longcat_flash": dict(
        ffn_hidden_size=64,
        expert_ffn_hidden_size=32,
        n_routed_experts=8,
        zero_expert_num=2,
        moe_topk=2,
        num_layers=2,
        **_MLA,
    ),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, names in (("architecture", ARCHITECTURES), ("mixed", MIXED), ("refused", REFUSED)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, list(names))


def make_config(name: str, changes: dict[str, Any]) -> Any:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    known = bridge.supported_architectures()
    if name in ARCHITECTURES and not {name, name.removesuffix("_text")} & set(known):
        pytest.skip(f"in transformers {transformers.__version__}, {name} does not use the experts interface")
    values = {**_BASE, **changes}
    if "kv_lora_rank" in changes:
        del values["head_dim"]
        values["num_key_value_heads"] = 4
    config = CONFIG_MAPPING[name](**values)
    if "kv_lora_rank" in changes and hasattr(config, "head_dim"):
        config.head_dim = config.qk_rope_head_dim
    return config


@functools.cache
def _model(name: str) -> Any:
    config = make_config(name, (ARCHITECTURES[name][0] if name in ARCHITECTURES else REFUSED[name]))
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        auto = transformers.AutoModel
    model = auto.from_config(config).eval().float()
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" in key:
            parameter.data.fill_(1.0)
        elif "A_log" in key or "dt_bias" in key:
            parameter.data.uniform_(0, 0.5, generator=generator)
        else:
            parameter.data.normal_(0, 0.15, generator=generator)
    for key, buffer in model.named_buffers():
        if buffer.is_floating_point() and "correction" in key:
            buffer.data.normal_(0, 0.05, generator=generator)
    return model


class Tiny:
    """One model, its input, and how to run it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = copy.deepcopy(_model(name))
        _, self.layers, self.function = ARCHITECTURES.get(name, ({}, 0, ""))
        self.ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(2))

    @torch.no_grad()
    def logits(self, implementation: str | None = None, model: Any = None, ids: Any = None) -> torch.Tensor:
        """The model's first output: logits, or hidden states of a model without a head."""
        model = self.model if model is None else model
        if implementation is not None:
            model.set_experts_implementation(implementation)
        return model(input_ids=self.ids if ids is None else ids, use_cache=False)[0]

    @property
    def experts(self) -> list[Any]:
        return list(bridge.experts_modules(self.model).values())


@pytest.fixture
def tiny():
    """`tiny(model type)`: a fresh copy of a cached random model."""
    return Tiny


@pytest.fixture
def close():
    """fp32 equality within 1e-5 of the values' own size."""

    def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
        scale = max(1.0, float(expected.abs().max()))
        assert float((actual - expected).abs().max()) <= 1e-5 * scale

    return check


@pytest.fixture
def calls(monkeypatch):
    """The modules that our function was called for, in order. Also makes an implementation "zero"."""
    seen: list[Any] = []
    mapping = ExpertsInterface._global_mapping
    ours = mapping[bridge.IMPLEMENTATION]

    def counting(module: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
        seen.append(module)
        return ours(module, *arguments, **keywords)

    monkeypatch.setitem(mapping, bridge.IMPLEMENTATION, counting)
    monkeypatch.setitem(mapping, "zero", lambda module, hidden_states, *_: torch.zeros_like(hidden_states))
    return seen
