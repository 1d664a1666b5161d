"""Packed formats that no plugin reads and transformers expands itself: MXFP4 and FP8 in blocks.

Shape letters: E experts · H hidden · I intermediate.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

EXPERTS, HIDDEN, INNER, BLOCK = 8, 64, 32, 32
pytestmark = pytest.mark.usefixtures("no_plugin_reads_it")


def rewrite(folder, change, quantization_config):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in list(tensors):
        change(tensors, name)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}))


@pytest.fixture
def mxfp4(copied):
    """gpt-oss as it is published: expert matrices as 4-bit values with a shared exponent for each 32 of them."""
    generator = torch.Generator().manual_seed(0)

    def pack(tensors, name):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return
        _, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (EXPERTS, outputs, inputs // 32, 16), generator=generator)
        exponents = torch.randint(121, 125, (EXPERTS, outputs, inputs // 32), generator=generator)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks.to(torch.uint8), exponents.to(torch.uint8)

    folder = copied("gpt-oss")
    rewrite(folder, pack, {"quant_method": "mxfp4", "modules_to_not_convert": []})
    return folder


def fp8(folder, block=BLOCK):
    """Expert matrices in fp8, with a scale for each square block."""

    def pack(tensors, name):
        if ".experts." not in name:
            return
        weight = tensors[name]
        rows, columns = (extent // block for extent in weight.shape)
        tiles = weight.reshape(rows, block, columns, block)
        scale = tiles.abs().amax(dim=(1, 3)) / 448
        packed = (tiles / scale[:, None, :, None]).reshape(weight.shape)
        tensors[name], tensors[f"{name}_scale_inv"] = packed.to(torch.float8_e4m3fn), scale

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    rewrite(folder, pack, config)
    return folder


def run(invoke, folder):
    result = invoke(
        "run", folder, "--compare", "--json", "--max-new-tokens", 4, "--dtype", "float32", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


def test_mxfp4_runs_dequantized_and_says_so(mxfp4, invoke):
    found, said = run(invoke, mxfp4)
    assert "format mxfp4: no installed plugin reads it packed, so transformers dequantizes it" in said
    assert found["compare"]["tokens_equal"]
    assert found["compare"]["logit_difference"] < 1e-4
    assert any("mxfp4" in note for note in found["notes"])


def test_mxfp4_can_be_explained_for_a_gpu(mxfp4, invoke):
    for device in ("cpu", "cuda:9.0"):
        result = invoke("explain", mxfp4 / "config.json", "--device", device)
        assert result.exit_code == 0, result.output
        assert "layers 0-1 (" in result.stdout


def test_fp8_in_blocks_runs_dequantized_and_says_so(copied, checkpoints, invoke):
    pytest.importorskip("accelerate")
    found, said = run(invoke, fp8(copied("Qwen3-MoE")))
    assert "format fp8 in blocks of 32 x 32" in said
    assert found["compare"]["tokens_equal"]
    plain, _ = run(invoke, checkpoints("Qwen3-MoE"))
    assert found["tokens"] == plain["tokens"], "fp8 weights are near enough for the same first tokens"


def test_fp8_whose_blocks_are_not_full_is_refused(copied, refused):
    """There, transformers takes the block size from the grid of scales, and is wrong without an error."""
    folder = copied("Qwen3-MoE")
    fp8(folder, block=32)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [48, 48]
    (folder / "config.json").write_text(json.dumps(config))
    said = refused("run", folder)
    assert "of shape (64, 32) is no multiple of its fp8 blocks (48, 48)" in said
    assert "moe-quant-fp8" in said


def test_fp8_without_accelerate_names_the_pip_command(copied, refused, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_accelerate_available", lambda: False)
    assert "pip install accelerate" in refused("run", fp8(copied("Qwen3-MoE")))
