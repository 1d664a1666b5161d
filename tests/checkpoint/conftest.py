"""Small checkpoints of real architectures, written by transformers itself, once per session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from moe_core import ActivationSpec, GateUpLayout, MoEConfig, RouterSpec

transformers = pytest.importorskip("transformers")

HIDDEN, INNER, EXPERTS, TOP_K = 64, 32, 8, 2
COMMON = {
    "vocab_size": 128,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SILU = ActivationSpec("silu", GateUpLayout.GATE_UP)
UP_FIRST = ActivationSpec("silu", GateUpLayout.UP_GATE)
OAI = ActivationSpec("swiglu_oai", GateUpLayout.INTERLEAVED, limit=7.0, bias=True)
RELU2 = ActivationSpec("relu2", None)


@attrs.frozen
class Family:
    """An architecture: its transformers config, the activation of its experts, and its first MoE block on disk."""

    config_class: str
    settings: dict[str, Any]
    activation: ActivationSpec
    block: str

    @property
    def moe_config(self) -> MoEConfig:
        return MoEConfig(
            num_experts=EXPERTS,
            top_k=TOP_K,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            dtype=torch.float32,
            activation=self.activation,
            router=RouterSpec.of("softmax", renormalize=True),
        )


_SHARES = {"num_experts_per_tok": TOP_K, "intermediate_size": INNER}
FAMILIES = {
    "mixtral": Family(
        "MixtralConfig", {"num_local_experts": EXPERTS, **_SHARES}, SILU, "model.layers.0.block_sparse_moe"
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        {"num_experts": EXPERTS, **_SHARES, "moe_intermediate_size": INNER, "intermediate_size": 64},
        UP_FIRST,  # the layout of w13 is ours to choose, whatever the disk has
        "model.layers.0.mlp",
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "moe_intermediate_size": INNER,
            "intermediate_size": 64,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "head_dim": 8,
        },
        SILU,
        "model.layers.1.mlp",
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        {"num_local_experts": EXPERTS, **_SHARES, "layer_types": ["sliding_attention", "full_attention"]},
        OAI,
        "model.layers.0.mlp",
    ),
    "granitemoe": Family(
        "GraniteMoeConfig", {"num_local_experts": EXPERTS, **_SHARES}, SILU, "model.layers.0.block_sparse_moe"
    ),
    "nemotron_h": Family(
        "NemotronHConfig",
        {
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "moe_intermediate_size": INNER,
            "intermediate_size": 64,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": INNER,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "layers_block_type": ["attention", "moe"],
        },
        RELU2,
        "backbone.layers.1.mixer",
    ),
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoints(family, sharded=False)`: the folder of a checkpoint; tests must not write into it."""
    made: dict[tuple[str, bool], Path] = {}

    def folder(name: str, sharded: bool = False) -> Path:
        if (name, sharded) not in made:
            family = FAMILIES[name]
            settings = COMMON | family.settings
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(
                getattr(transformers, family.config_class)(**settings), dtype=torch.float32
            )
            for parameter in model.parameters():
                parameter.data.normal_(0, 0.15)
            target = tmp_path_factory.mktemp(f"{name}-{'sharded' if sharded else 'whole'}")
            model.save_pretrained(target, max_shard_size="40KB" if sharded else "1GB")
            made[name, sharded] = target
        return made[name, sharded]

    return folder


@pytest.fixture
def copied(checkpoints: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """The same, as a copy that a test may damage."""
    return lambda name="qwen3_moe", sharded=False: shutil.copytree(checkpoints(name, sharded), tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def families() -> dict[str, Family]:
    return FAMILIES
