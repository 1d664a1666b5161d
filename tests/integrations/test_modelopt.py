"""ModelOpt's own checkpoints through transformers, bit by bit what ModelOpt dequantizes (see tests/fixtures)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_core.errors import UnsupportedError

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

import moe_core.integrations.transformers as bridge  # noqa: E402 - after the skip where there is none

FIXTURES = Path(__file__).parents[1] / "fixtures"
SCHEMES = {"fp8_qwen3_moe": "fp8_weight_only", "nvfp4_gpt_oss": "nvfp4", "nvfp4_mixtral": "nvfp4"}
IDS = torch.arange(3, 23)[None]


@pytest.fixture
def truth(tmp_path: Path) -> Any:
    """`truth(name)`: transformers' own model, in fp32, of ModelOpt's dequantized values."""

    def make(name: str) -> Any:
        config = json.loads((FIXTURES / name / "config.json").read_text())
        del config["quantization_config"]
        stored = safetensors.load_file(FIXTURES / name / "model.safetensors")
        values = safetensors.load_file(FIXTURES / name / "dequantized.safetensors")
        plain = {key: tensor.float() for key, tensor in stored.items() if "scale" not in key}
        (tmp_path / "config.json").write_text(json.dumps(config))
        safetensors.save_file(plain | values, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()

    return make


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


@pytest.mark.parametrize("name", SCHEMES)
def test_weight_only_logits_are_those_of_modelopts_values(name, truth):
    model = bridge.packed.from_pretrained(FIXTURES / name, scheme=SCHEMES[name], dtype=torch.float32).eval()
    expected = truth(name)
    held = dict(expected.named_parameters())
    for key, parameter in model.named_parameters():
        if ".packed." not in key:
            assert torch.equal(parameter, held[key]), key
    assert float((logits(model) - logits(expected)).norm() / logits(expected).norm()) <= 1e-5


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_own_from_pretrained_keeps_the_experts_packed(name):
    """One import is all that is needed: transformers has no quantizer for the format, so ours stands in the table."""
    model = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype=torch.float32).eval()
    ours = bridge.packed.from_pretrained(FIXTURES / name, dtype=torch.float32).eval()
    assert torch.equal(logits(model), logits(ours))
    assert bridge.packed.packed_plans(model).keys() == bridge.packed.packed_plans(ours).keys() != set()
    with pytest.raises(UnsupportedError, match="run by their plans already"):
        bridge.attach(model)
    with pytest.raises(ValueError, match="serializable"):
        model.save_pretrained("/nowhere")


def test_without_a_plugin_for_it_the_refusal_says_what_to_install(monkeypatch):
    from moe_core.plugins import registry

    monkeypatch.setattr(registry(), "quant_methods", {})
    with pytest.raises(UnsupportedError, match="packages named moe-quant-"):
        transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / "nvfp4_mixtral")


def test_an_older_checkpoint_that_says_so_in_modelopts_own_file_only(tmp_path):
    for file in (FIXTURES / "nvfp4_mixtral").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    (tmp_path / "dequantized.safetensors").unlink()
    model = bridge.packed.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(
        logits(model), logits(bridge.packed.from_pretrained(FIXTURES / "nvfp4_mixtral", dtype=torch.float32))
    )


def test_a_device_map(truth):
    pytest.importorskip("accelerate")
    model = bridge.packed.from_pretrained(
        FIXTURES / "nvfp4_mixtral", dtype=torch.float32, device_map={"": "cpu"}
    ).eval()
    assert float((logits(model) - logits(truth("nvfp4_mixtral"))).norm()) < 1e-3


def test_debug_mode_reaches_the_layers():
    model = bridge.packed.from_pretrained(FIXTURES / "nvfp4_mixtral", dtype=torch.float32, debug=True)
    (experts,) = [module for name, module in model.named_modules() if name.endswith("experts.packed")]
    with pytest.raises(ValueError, match="topk_ids range from 0 to 9"):
        experts(torch.zeros(1, 64), torch.tensor([[0, 9]]), torch.ones(1, 2))


def test_a_copy_is_a_model_of_its_own():
    model = bridge.packed.from_pretrained(FIXTURES / "nvfp4_mixtral", dtype=torch.float32).eval()
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    (experts,) = [module for name, module in twin.named_modules() if name.endswith("experts.packed")]
    experts.w13_scale.data.zero_()
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


def test_compiled_whole(truth):
    torch._dynamo.reset()
    model = bridge.packed.from_pretrained(FIXTURES / "fp8_qwen3_moe", scheme="fp8_weight_only", dtype=torch.float32)
    compiled = torch.compile(model.eval(), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for ids in (IDS, IDS[:, :7]):
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits)
    torch._dynamo.reset()


def test_a_gradient_is_refused_and_not_lost():
    model = bridge.packed.from_pretrained(FIXTURES / "nvfp4_mixtral", dtype=torch.float32)
    loss = model(IDS).logits.sum()
    with pytest.raises(Exception, match="inference only"):
        loss.backward()


@pytest.mark.parametrize("name", SCHEMES)
def test_the_command_line_runs_it(name):
    testing = pytest.importorskip("click.testing")
    from moe_core.cli.app import app

    arguments = ["run", str(FIXTURES / name), "--dtype", "float32", "--prompt-ids", "3,4,5,6", "--max-new-tokens", "4"]
    done = testing.CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    model = bridge.packed.from_pretrained(FIXTURES / name, dtype=torch.float32).eval()
    expected = model.generate(torch.tensor([[3, 4, 5, 6]]), max_new_tokens=4, do_sample=False)[0, 4:].tolist()
    assert json.loads(done.stdout)["tokens"] == expected
