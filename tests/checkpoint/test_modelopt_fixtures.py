"""Checkpoints that ModelOpt wrote, read bit by bit as ModelOpt dequantizes them. `make fixtures` writes them anew."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

import moe_core
from moe_core.build import method_for_checkpoint
from moe_core.checkpoint import Checkpoint, expert_blocks, load_experts, packed_rules
from moe_core.checkpoint.layouts import RULES
from moe_core.config import ActivationSpec, MoEConfig
from moe_core.emulated import dequantize_weights
from moe_core.types import GateUpLayout

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHECKPOINTS = ("fp8_qwen3_moe", "nvfp4_gpt_oss", "nvfp4_mixtral")
GPT_OSS = ActivationSpec("swiglu_oai", GateUpLayout.INTERLEAVED, limit=7.0, bias=True)


def test_the_fixtures_are_there_and_as_they_were_written():
    """No skip: without them nothing holds our reading of ModelOpt's formats against ModelOpt."""
    listed = {}
    for line in (FIXTURES / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        listed[name] = digest
    assert {name.split("/")[0] for name in listed} == {"make_modelopt.py", *CHECKPOINTS}
    for name in CHECKPOINTS:
        assert {f"{name}/{file}" for file in ("config.json", "model.safetensors", "dequantized.safetensors")} <= {
            *listed
        }
    changed = [name for name, digest in listed.items()
               if hashlib.sha256((FIXTURES / name).read_bytes()).hexdigest() != digest]  # fmt: skip
    assert not changed, "make fixtures"
    assert sum((FIXTURES / name).stat().st_size for name in listed) < 1_000_000


def layer_of(checkpoint: Checkpoint) -> moe_core.MoERunnerInterface:
    values = checkpoint.config
    config = MoEConfig(
        num_experts=values["num_local_experts"], top_k=values["num_experts_per_tok"],
        hidden_size=values["hidden_size"],
        intermediate_size=values.get("moe_intermediate_size", values["intermediate_size"]),
        dtype=torch.float32, activation=GPT_OSS if values["model_type"] == "gpt_oss" else ActivationSpec("silu"),
    )  # fmt: skip
    method = method_for_checkpoint(values["quantization_config"])
    return moe_core.build_runner(config, quant_method=method, device="cpu")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_experts_are_bit_by_bit_what_modelopt_dequantizes(name):
    from safetensors.torch import load_file

    truth = load_file(FIXTURES / name / "dequantized.safetensors")
    with Checkpoint.open(FIXTURES / name) as checkpoint:
        layer = layer_of(checkpoint)
        experts = layer.routed_experts
        rules = (*RULES, *packed_rules(experts.quant_method.checkpoint_suffixes))
        (prefix,) = expert_blocks(checkpoint, rules)
        load_experts(checkpoint, prefix, experts)
    got = dequantize_weights(experts.weights, experts.quant_method.scheme.weight)
    if name == "nvfp4_gpt_oss":
        assert torch.equal(got.w13, truth[f"{prefix}.experts.gate_up_proj"].transpose(1, 2))
        assert torch.equal(got.w2, truth[f"{prefix}.experts.down_proj"].transpose(1, 2))
        return
    gate, up, down = ("w1", "w3", "w2") if "mixtral" in name else ("gate_proj", "up_proj", "down_proj")
    for expert in range(4):
        stem = f"{prefix}.experts.{expert}"
        expected = torch.cat([truth[f"{stem}.{part}.weight"] for part in (gate, up)])
        assert torch.equal(got.w13[expert], expected)
        assert torch.equal(got.w2[expert], truth[f"{stem}.{down}.weight"])
