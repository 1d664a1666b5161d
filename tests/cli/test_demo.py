"""`moe-core demo`: every checkpoint beside transformers, and an exit code that means something."""

from __future__ import annotations

import json
import re

import attrs
import pytest

from moe_core.cli import demo
from moe_core.plugins import registry


@pytest.fixture
def small_demo(monkeypatch, small_models):
    """The demo with smaller models and fewer tokens."""
    monkeypatch.setattr(demo, "MODELS", tuple(small_models.values()))
    monkeypatch.setattr(demo, "_NEW_TOKENS", 3)
    monkeypatch.setattr(demo, "_ROUNDS", 1)


@pytest.mark.usefixtures("small_demo")
def test_every_row_has_the_same_tokens_by_experts_that_matter(invoke, tmp_path):
    result = invoke("demo", "--json", "--keep", tmp_path / "kept")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    batched = ["Mixtral"] if "batched" in registry().dispatch else []
    models = ["Mixtral", *batched, "Qwen3-MoE", "DeepSeek-V3", "gpt-oss", "Mixtral, fp8", "Qwen3-MoE, nvfp4"]
    assert [row["model"] for row in found["rows"]] == models
    for row in found["rows"]:
        assert row["comparison"]["tokens_equal"]
        assert row["comparison"]["logit_difference"] < 1e-4
        assert row["effect"] > 0.1
    assert found["rows"][0]["backends"] == "local + torch"
    assert len(list((tmp_path / "kept" / "mixtral").glob("model-*.safetensors"))) > 1, "one of them is to be sharded"
    assert "plugin builtin (moe-core" in result.stderr


@pytest.mark.usefixtures("small_demo")
def test_packed_rows_stay_packed_and_are_left_out_without_their_plugin(invoke, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "MODELS", demo.MODELS[-1:])
    found = json.loads(invoke("demo", "--json", "--keep", tmp_path / "kept").stdout)
    assert [row["backends"] for row in found["rows"]] == ["local + nvfp4_torch"]
    config = json.loads((tmp_path / "kept" / "qwen3-moe-nvfp4" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "nvfp4-pack-quantized"
    monkeypatch.setattr(registry(), "quant_methods", {})
    result = invoke("demo", "--json")
    assert json.loads(result.stdout)["rows"] == []
    assert "left out: unknown quantization scheme 'nvfp4'" in result.stderr


@pytest.mark.usefixtures("small_demo")
def test_table_and_exit_code_when_tokens_differ(invoke, monkeypatch):
    monkeypatch.setattr(demo, "MODELS", demo.MODELS[1:2])
    assert invoke("demo").exit_code == 0
    real = demo.compare

    def different(*arguments):
        generation, comparison = real(*arguments)
        return generation, attrs.evolve(comparison, tokens_equal=False)

    monkeypatch.setattr(demo, "compare", different)
    result = invoke("demo")
    assert result.exit_code == 1
    assert re.search(r"Qwen3-MoE +local \+ torch +NO ", result.stdout)
    assert "NOT the same everywhere" in result.stdout


@pytest.mark.usefixtures("small_demo")
def test_equality_by_experts_that_do_not_matter_is_no_success(invoke, monkeypatch):
    monkeypatch.setattr(demo, "MODELS", demo.MODELS[1:2])
    monkeypatch.setattr(demo, "experts_effect", lambda *_: 0.0)
    assert invoke("demo").exit_code == 1


def test_a_folder_with_something_in_it_is_not_written_into(refused, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert "the folder is not empty; name a new one" in refused("demo", "--keep", tmp_path)


@pytest.mark.full
def test_the_demo_as_it_is(process):
    done = process("demo")
    assert done.returncode == 0, done.stderr
    assert "the same tokens everywhere" in done.stdout
