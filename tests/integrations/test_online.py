"""Floating-point checkpoints through transformers with their experts quantized while they load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_core import UnsupportedError, formats
from moe_core.plugins import registry

transformers = pytest.importorskip("transformers")
packed = pytest.importorskip("moe_core.integrations.transformers.packed")

COMMON = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}  # fmt: skip
IDS = torch.arange(3, 23)[None]


@pytest.fixture(params=["mixtral", "gpt_oss"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One tensor per expert and projection, or all experts in one, transposed, gate and up rows in turn, with bias."""
    torch.manual_seed(0)
    made = transformers.MixtralConfig if request.param == "mixtral" else transformers.GptOssConfig
    config = made(**COMMON, intermediate_size=32, num_local_experts=4)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15)
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def through(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    """`[N, K]` as the format holds it."""
    spec = registry().find("quant_methods", scheme).factory().scheme.weight
    top = formats.global_scale_of(weight.abs().amax(), spec) if spec.second_level else None
    return formats.quantize_dequantize(weight, spec, global_scale=top)


def quantize_experts(model: Any, scheme: str) -> None:
    """Each projection of each expert of a transformers model, for itself."""
    for name, module in model.named_modules():
        if not name.endswith(".experts"):
            continue
        for w13, w2 in zip(module.gate_up_proj.data, module.down_proj.data, strict=True):
            if module.is_transposed:
                gate_up = w13.T.clone()
                for half in range(2):
                    gate_up[half::2] = through(gate_up[half::2], scheme)
                w13.copy_(gate_up.T)
                w2.copy_(through(w2.T, scheme).T)
            else:
                w13.copy_(torch.cat([through(half, scheme) for half in w13.chunk(2)]))
                w2.copy_(through(w2, scheme))


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8_weight_only"])
def test_logits_are_those_of_experts_quantized_one_by_one(scheme, folder):
    seen: list[tuple[int, int]] = []
    model = packed.from_pretrained(
        folder, scheme=scheme, dtype=torch.float32, progress=lambda done, total: seen.append((done, total))
    ).eval()
    assert seen == [(done, 8) for done in range(1, 9)]
    truth = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        got, unquantized = model(IDS).logits, truth(IDS).logits
        quantize_experts(truth, scheme)
        expected = truth(IDS).logits
    assert float((got - expected).norm() / expected.norm()) <= 1e-5
    assert float((unquantized - expected).norm() / expected.norm()) >= 1e-3, "the quantizer does something"
    assert all(
        module.packed.w13.element_size() == 1 for name, module in model.named_modules() if hasattr(module, "packed")
    )


def test_the_command_line_quantizes_on_the_way_or_says_why_not(folder):
    testing = pytest.importorskip("click.testing")
    from moe_core.cli.app import app

    def said(scheme: str) -> Any:
        prompt = ["--prompt-ids", "3,4,5", "--max-new-tokens", "2", "--json"]
        return testing.CliRunner().invoke(app, ["run", str(folder), "--scheme", scheme, *prompt])

    done = said("nvfp4")
    assert done.exit_code == 0, done.output
    assert "loading experts, 8 of them" in done.stderr
    result = json.loads(done.stdout)
    assert {group["plan"]["layer"]["scheme"] for group in result["groups"]} == {"nvfp4"}
    assert any("quantized while they load, to scheme nvfp4" in note for note in result["notes"])
    refused = said("fp8_tensor")
    assert refused.exit_code == 1
    assert "needs input scale from a calibration" in refused.output
    assert "fp8_tensor_dynamic" in refused.output


def test_a_scheme_with_scales_of_a_calibration_is_refused_before_anything_is_read(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(
        UnsupportedError, match=r"'fp8_tensor' needs input scale from a calibration.*fp8_tensor_dynamic"
    ):
        packed.from_pretrained(folder, scheme="fp8_tensor")


def test_without_a_scheme_there_is_nothing_to_do(folder):
    with pytest.raises(UnsupportedError, match=r"no quantization_config.*or name a scheme"):
        packed.from_pretrained(folder)
