"""`moe-core explain`: plans with reasons from a config alone."""

from __future__ import annotations

import json
import shutil

import pytest

from moe_core.cli.plan_text import ranges

ALL = ["Mixtral", "Qwen3-MoE", "DeepSeek-V3", "gpt-oss"]


@pytest.mark.parametrize("name", ALL)
def test_from_the_config_alone(name, checkpoints, tmp_path, invoke):
    alone = tmp_path / "some_config.json"
    shutil.copy(checkpoints(name) / "config.json", alone)
    result = invoke("explain", alone, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert ("layer 1 (" if name == "DeepSeek-V3" else "layers 0-1 (") in result.stdout
    assert "dispatch local · experts torch" in result.stdout
    assert "chosen     local + torch" in result.stdout
    assert invoke("explain", checkpoints(name), "--device", "cpu").stdout == result.stdout


def test_json(checkpoints, invoke):
    found = json.loads(invoke("explain", checkpoints("gpt-oss"), "--json", "--device", "cpu").stdout)
    (group,) = found["groups"]
    assert found["model_type"] == "gpt_oss"
    assert group["layers"] == [0, 1]
    assert group["plan"]["dispatch"]["name"] == "local"
    assert group["plan"]["candidates"]


def test_for_a_device_that_is_not_here(checkpoints, invoke):
    found = json.loads(invoke("explain", checkpoints("Mixtral"), "--json", "--device", "cuda:9.0").stdout)
    assert found["groups"][0]["plan"]["layer"]["device"] == "a CUDA device of compute capability 9.0"


def test_config_with_an_infinity_in_it(tmp_path, invoke):
    """transformers writes one as {"__float__": "Infinity"}, which plain JSON readers take for an object."""
    transformers = pytest.importorskip("transformers")
    layers = {"layers_block_type": ["attention", "moe"], "num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 64}
    transformers.NemotronHConfig(**layers).save_pretrained(tmp_path)
    assert "Infinity" in (tmp_path / "config.json").read_text()
    result = invoke("explain", tmp_path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "relu2" in result.stdout


def test_config_that_transformers_refuses(copied, refused):
    said = refused("explain", copied(hidden_size="many"))
    assert "config.json: transformers refuses it: " in said


def test_unknown_backend(checkpoints, refused):
    said = refused("explain", checkpoints("Mixtral"), "--experts", "nonsense")
    assert "unknown experts 'nonsense'; known here: " in said
    assert "torch, triton" in said
    assert "try pip install moe-" in said
    assert "unknown dispatch 'nonsense'" in refused("explain", checkpoints("Mixtral"), "--dispatch", "nonsense")


def test_unsupported_architectures(copied, refused, tmp_path):
    folder = copied(model_type="llama", architectures=["LlamaForCausalLM"])
    said = refused("explain", folder)
    assert said.startswith("LlamaForCausalLM")
    assert "mixtral" in said
    (folder / "config.json").write_text('{"model_type": "brand_new_moe"}')
    said = refused("explain", folder)
    assert "model_type 'brand_new_moe' is unknown to transformers" in said
    assert "qwen3_moe" in said


def test_no_config(tmp_path, refused):
    assert "no config.json" in refused("explain", tmp_path)
    assert "does not exist" in refused("explain", tmp_path / "nowhere")


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")])
def test_ranges(numbers, text):
    assert ranges(numbers) == text
