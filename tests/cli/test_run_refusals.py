"""`moe-core run` on folders that are wrong: one clear message, exit code 1, and the folder is left as it was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def change(folder, name, tensor):
    """Put a tensor into the weights, or take it out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def test_no_folder_and_no_config(copied, refused, tmp_path):
    assert "nowhere: does not exist; expected a checkpoint folder" in refused("run", tmp_path / "nowhere")
    folder = copied()
    (folder / "config.json").unlink()
    assert "no config.json, so this is not a Hugging Face checkpoint folder" in refused("run", folder)


def test_missing_shard(copied, refused):
    folder = copied("Mixtral")
    shard = min(folder.glob("model-*.safetensors"))
    shard.unlink()
    assert f"shard {shard.name} is missing" in refused("run", folder)


def test_truncated_shard(copied, refused):
    folder = copied("Mixtral")
    shard = min(folder.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    said = refused("run", folder)
    assert f"{shard.name}: truncated: " in said
    assert "fetch the file again" in said


def test_pickles_only(copied, refused):
    folder = copied()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    said = refused("run", folder)
    assert "only pytorch_model.bin" in said
    assert "Weights are read from safetensors only" in said


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (EXPERT, torch.zeros(31, 64), f"tensor '{EXPERT}' has shape (31, 64) (F32); expected (32, 64) (F32)"),
        (EXPERT, None, "block 'model.layers.0.mlp' has experts up to 15, but no tensor for 'up' of expert 3"),
        (QUERY, torch.zeros(8, 64), f"1 of another shape than the model: {QUERY} (file (8, 64), model (64, 64))"),
        (QUERY, None, f"1 missing in the checkpoint (transformers would fill them with random numbers): {QUERY}"),
        (
            "model.layers.0.mlp.experts.3.extra.weight",
            torch.zeros(3),
            "1 in the checkpoint, but not in the model: model.layers.0.mlp.experts.3.extra.weight",
        ),
    ],
    ids=["expert of another shape", "expert missing", "other shape", "missing", "nowhere to go"],
)
def test_weights_that_do_not_fit(name, tensor, message, copied, refused):
    folder = copied()
    change(folder, name, tensor)
    assert message in refused("run", folder)


def test_all_experts_of_another_width(copied, refused):
    said = refused("run", copied(moe_intermediate_size=16))
    assert "4 of another shape than the model: model.layers.0.mlp.experts.down_proj" in said


def test_unsupported_architectures(copied, refused):
    said = refused("run", copied(model_type="llama", architectures=["LlamaForCausalLM"]))
    assert said.startswith("LlamaForCausalLM")
    assert "deepseek_v3" in said


def test_unknown_architecture(copied, refused):
    said = refused("run", copied(model_type="brand_new_moe"))
    assert "model_type 'brand_new_moe' is unknown to transformers" in said
    assert "deepseek_v3" in said


CODE = """
from pathlib import Path
from transformers import Qwen3MoeConfig
Path(__file__).with_name("it_ran").touch()
Path({marker!r}).touch()
class BrandNewConfig(Qwen3MoeConfig):
    model_type = "brand_new_moe"
"""
MODEL = """
from transformers import Qwen3MoeForCausalLM
from .configuration_new import BrandNewConfig
class BrandNewForCausalLM(Qwen3MoeForCausalLM):
    config_class = BrandNewConfig
"""
AUTO_MAP = {
    "AutoConfig": "configuration_new.BrandNewConfig",
    "AutoModelForCausalLM": "modeling_new.BrandNewForCausalLM",
}


@pytest.fixture
def with_code(copied, tmp_path):
    """A checkpoint that brings code; running it leaves the file `marker` behind."""

    def make(**config):
        folder, marker = copied(auto_map=AUTO_MAP, **config), tmp_path / "marker"
        (folder / "configuration_new.py").write_text(CODE.format(marker=str(marker)))
        (folder / "modeling_new.py").write_text(MODEL)
        return folder, marker

    return make


def test_code_of_the_checkpoint_is_not_run_unasked(with_code, refused):
    folder, marker = with_code(model_type="brand_new_moe", architectures=["BrandNewForCausalLM"])
    said = refused("run", folder)
    assert "runs only with code that the checkpoint brings (auto_map)" in said
    assert "--trust-remote-code" in said
    assert "(auto_map)" in refused("explain", folder)
    assert not marker.exists()


def test_known_architecture_runs_without_the_code_that_it_brings(with_code, invoke):
    folder, marker = with_code()
    result = invoke("run", folder, "--max-new-tokens", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "it is not run, transformers' own qwen3_moe is" in result.stderr
    assert not marker.exists()


def test_code_is_run_when_trusted(with_code, process, tmp_path):
    folder, marker = with_code(model_type="brand_new_moe", architectures=["BrandNewForCausalLM"])
    process(
        "run", folder, "--trust-remote-code", "--max-new-tokens", 2, "--device", "cpu", HF_HOME=str(tmp_path / "cache")
    )
    assert marker.exists()


@pytest.mark.parametrize(
    ("packed", "expected"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, ["modelopt (FP8)", "ignore every scale", "moe-quant-fp8"]),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, ["modelopt (NVFP4)", "moe-quant-nvfp4"]),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            ["compressed-tensors (nvfp4-pack-quantized)", "global scales", "moe-quant-nvfp4"],
        ),
        ({"quant_method": "gptq", "bits": 4}, ["format gptq", "no installed plugin reads it", "another format"]),
    ],
    ids=["modelopt fp8", "modelopt nvfp4", "compressed-tensors nvfp4", "gptq"],
)
@pytest.mark.usefixtures("no_plugin_reads_it")
def test_formats_that_nothing_reads_are_refused_by_name(packed, expected, copied, refused):
    folder = copied(quantization_config=packed)
    for command in ("run", "explain"):
        said = refused(command, folder)
        assert all(part in said for part in expected), said


@pytest.mark.usefixtures("no_plugin_reads_it")
def test_modelopt_config_in_a_file_of_its_own(copied, refused):
    folder = copied()
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert "modelopt (FP8)" in refused("run", folder)
