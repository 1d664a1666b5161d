"""Quantized checkpoints through transformers with packed experts, beside a model whose weights were dequantized first.

Shape letters: N, K rows and columns of a projection.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_core import QuantSpec, ScaleFormat, UnsupportedError, formats

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
packed = pytest.importorskip("moe_core.integrations.transformers.packed")

E4M3 = "float8_e4m3fn"
SPECS = {
    "deepseek": QuantSpec(E4M3, (32, 32)),
    "channel": QuantSpec(E4M3, (1, -1)),
    "modelopt_fp8": QuantSpec(E4M3, (-1, -1)),
    "modelopt_nvfp4": QuantSpec("float4_e2m1", (1, 16), ScaleFormat.E4M3, second_level=True),
    "ct_nvfp4": QuantSpec("float4_e2m1", (1, 16), ScaleFormat.E4M3, second_level=True),
}
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
    "channel": {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "input_activations": {"strategy": "token", "dynamic": True}}}},
    "modelopt_fp8": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "modelopt_nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "ct_nvfp4": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"group_0": {
        "weights": FP4, "input_activations": FP4 | {"dynamic": "local"}}}},
}  # fmt: skip
COMMON = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}  # fmt: skip


def make_config(name: str) -> Any:
    if name == "mixtral":
        return transformers.MixtralConfig(**COMMON, intermediate_size=32, num_local_experts=4)
    if name == "deepseek_v3":  # shared experts, a dense first layer, projections that are no whole blocks
        return transformers.DeepseekV3Config(**COMMON | {
            "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 32, "intermediate_size": 64,
            "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8,
        })  # fmt: skip
    return transformers.Qwen3MoeConfig(**COMMON, intermediate_size=64, moe_intermediate_size=32, num_experts=4)


def pack(kind: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight under the names of a format, and what it is then."""
    spec = SPECS[kind]
    top = formats.global_scale_of(weight.abs().amax(), spec).float().double() if spec.second_level else None
    if kind == "ct_nvfp4" and top is not None:
        top = 1 / (1 / top).float().double()
    q, scale = formats.quantize(weight, spec, global_scale=top)
    value = formats.dequantize(q, scale, spec, top)
    if top is None:
        name = "weight_scale_inv" if kind == "deepseek" else "weight_scale"
        tensors = {"weight": q, name: scale.reshape(()) if kind == "modelopt_fp8" else scale}
        return tensors | ({"input_scale": torch.tensor(0.01)} if kind == "modelopt_fp8" else {}), value
    if kind == "modelopt_nvfp4":
        return {"weight": q, "weight_scale": scale, "weight_scale_2": top.float(),
                "input_scale": torch.tensor(0.01)}, value  # fmt: skip
    return {"weight_packed": q, "weight_scale": scale, "weight_global_scale": (1 / top).float().reshape(1),
            "input_global_scale": torch.tensor([100.0])}, value  # fmt: skip


@pytest.fixture(params=["qwen3_moe", "mixtral", "deepseek_v3"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """`written(kind)`: (packed folder, folder of the same values in fp32)."""

    def make(kind: str) -> tuple[Path, Path]:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(make_config(request.param), dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.15)
        plain, folder = tmp_path / "plain", tmp_path / "packed"
        model.save_pretrained(folder)
        tensors, stored, values = safetensors.load_file(folder / "model.safetensors"), {}, {}
        for name, tensor in tensors.items():
            linear = name.endswith(".weight") and ("_proj" in name or ".experts." in name)
            if not linear:
                stored[name] = values[name] = tensor
                continue
            parts, values[name] = pack(kind, tensor)
            stored |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
        config = json.loads((folder / "config.json").read_text())
        plain.mkdir()
        (plain / "config.json").write_text(json.dumps(config))
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[kind]}))
        safetensors.save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        safetensors.save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
        return folder, plain

    return make


@pytest.mark.parametrize("kind", CONFIGS)
def test_weight_only_logits_are_those_of_the_dequantized_model(kind, written):
    folder, plain = written(kind)
    scheme = "nvfp4" if "nvfp4" in kind else "fp8_weight_only"
    model = packed.from_pretrained(folder, scheme=scheme, dtype=torch.float32).eval()
    truth = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        got, expected = model(ids).logits, truth(ids).logits
    assert float((got - expected).norm() / expected.norm()) <= 1e-5
    experts = [module for name, module in model.named_modules() if name.endswith("experts.packed")]
    assert len(experts) == model.config.num_hidden_layers - getattr(model.config, "first_k_dense_replace", 0)
    assert all(module.w13.element_size() == 1 for module in experts)


def e4m3(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def e2m1(x: torch.Tensor, top: float) -> torch.Tensor:
    """Groups of 16 under a second-level scale, for values that lie between no two codes exactly."""
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    groups = x.unflatten(1, (-1, 16))
    scale = e4m3(groups.abs().amax(-1, keepdim=True) / 6, torch.tensor(top))
    nearest = grid[((groups / scale).abs().unsqueeze(-1) - grid).abs().argmin(-1)]
    return (nearest.copysign(groups) * scale).flatten(1)


QUANTIZERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "deepseek": lambda x: torch.cat([e4m3(g, g.abs().amax(1, keepdim=True) / 448) for g in x.split(32, dim=1)], dim=1),
    "channel": lambda x: e4m3(x, x.abs().amax(1, keepdim=True) / 448),
    "modelopt_fp8": lambda x: e4m3(x, torch.tensor(0.01)),
    "modelopt_nvfp4": lambda x: e2m1(x, 0.01),
    "ct_nvfp4": lambda x: e2m1(x, 0.01),
}
"""What each format makes of a linear layer's input, written apart from `formats`."""


def quantize_inputs(model: Any, quantize: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """transformers' own experts, with both their inputs quantized."""

    def forward(module: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            token, choice = torch.where(ids == expert)
            gate, up = (quantize(x[token]) @ module.gate_up_proj[expert].T).chunk(2, dim=1)
            y = quantize(module.act_fn(gate) * up) @ module.down_proj[expert].T
            out.index_add_(0, token, y * weights[token, choice].unsqueeze(1))
        return out

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.forward = functools.partial(forward, module)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_logits_with_quantized_activations_are_those_of_the_formats_quantizer(kind, written):
    folder, plain = written(kind)
    scheme = "nvfp4_w4a4" if "nvfp4" in kind else None  # unasked, NVFP4's activations stay as they are
    model = packed.from_pretrained(folder, scheme=scheme, dtype=torch.float32).eval()
    truth = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        got, unquantized = model(ids).logits, truth(ids).logits
        quantize_inputs(truth, QUANTIZERS[kind])
        expected = truth(ids).logits
    assert float((got - expected).norm() / expected.norm()) <= 1e-5
    assert float((unquantized - expected).norm() / expected.norm()) >= 1e-3, "the quantizer does something"


def test_a_format_that_nobody_reads_is_refused_before_loading(written):
    folder, plain = written("channel")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedError, match="gptq"):
        packed.from_pretrained(folder)
    with pytest.raises(UnsupportedError, match="no quantization_config"):
        packed.from_pretrained(plain)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_command_line_runs_and_explains_it_packed(kind, written):
    testing = pytest.importorskip("click.testing")
    from moe_core.cli.app import app

    folder, _ = written(kind)

    def said(*arguments: str) -> Any:
        done = testing.CliRunner().invoke(app, [*arguments, "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    ran = said("run", str(folder), "--dtype", "float32", "--prompt-ids", "3,4,5,6", "--max-new-tokens", "4")
    model = packed.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, 4:].tolist()
    assert ran["tokens"] == expected[: len(ran["tokens"])]
    assert any("experts stay packed" in note for note in ran["notes"])
    schemes = {group["plan"]["layer"]["scheme"] for group in ran["groups"]}
    assert schemes <= {"fp8_block", "fp8_channel", "fp8_tensor", "nvfp4", "nvfp4_w4a4"}
    explained = said("explain", str(folder))
    assert {group["plan"]["layer"]["scheme"] for group in explained["groups"]} == schemes
    refused = testing.CliRunner().invoke(app, ["run", str(folder), "--compare"])
    assert refused.exit_code == 1
    assert "transformers has none of its own for such weights" in refused.output
