"""Packed checkpoints that we write, read back by the formats' own libraries and by our loader: the same values.

Shape letters: N, K rows and columns of a projection.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_core
from moe_core import formats
from moe_core.build import method_for_checkpoint
from moe_core.checkpoint import Checkpoint, Conversion, converting, expert_blocks, load_experts, packed_rules
from moe_core.checkpoint.layouts import RULES
from moe_core.cli.convert import FORMATS, form_of
from moe_core.config import MoEConfig
from moe_core.emulated import dequantize_weights
from moe_core.errors import CheckpointError, UnsupportedError

safetensors = pytest.importorskip("safetensors.torch")

E, H, I = 3, 160, 48  # neither is whole blocks of 128
LAYERS = 2
CONFIG: dict[str, Any] = {"model_type": "qwen3_moe", "num_experts": E, "hidden_size": H, "moe_intermediate_size": I}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(0.2).bfloat16()

    found = {"model.embed_tokens.weight": draw(7, H), "model.norm.weight": draw(H), "lm_head.weight": draw(7, H)}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        found[f"{stem}.self_attn.q_proj.weight"] = draw(H, H)
        found[f"{stem}.mlp.gate.weight"] = draw(E, H).float()
        for expert in range(E):
            for part, shape in {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}.items():
                scale = torch.logspace(-3, 1, shape[0]).unsqueeze(1)
                weight = draw(*shape) * scale.bfloat16()
                weight[0] = 0
                found[f"{stem}.mlp.experts.{expert}.{part}.weight"] = weight
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint in two shards, with a file beside it."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    held = tensors()
    names = list(held)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in shards.items():
        safetensors.save_file({name: held[name] for name in own}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def written(source: Path, target: Path, name: str, **arguments: Any) -> dict[str, torch.Tensor]:
    """Convert, and read all files back with safetensors."""
    with Checkpoint.open(source) as checkpoint:
        Conversion(checkpoint, form_of(name)).write(target, **arguments)
    return {key: value for file in target.glob("*.safetensors") for key, value in safetensors.load_file(file).items()}


def library_values(name: str, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every packed weight, as compressed-tensors dequantizes it."""
    pytest.importorskip("loguru", reason="compressed-tensors is not installed whole: pip install moe-core[oracles]")
    pytest.importorskip("compressed_tensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer
        from compressed_tensors.quantization import QuantizationConfig
    if name == "fp8-block":
        packed = {k: v for k, v in stored.items() if ".experts." in k}
        return FP8BlockDequantizer(targets=["re:.*experts.*"], dtype=torch.float32).process(packed)
    config = FORMATS[name].config([])
    scheme = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "quant_method"})
    library = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    values = {}
    for key in stored:
        if key.endswith(".weight_packed"):
            stem = key.removesuffix("_packed").removesuffix("weight")
            own = {k.removeprefix(stem): v for k, v in stored.items() if k.startswith(stem)}
            values[f"{stem}weight"] = library.decompress(own, scheme.config_groups["group_0"])["weight"]
    return values


@pytest.mark.parametrize(("name", "close"), [("fp8-block", 0.03), ("nvfp4", 0.12)])
def test_libraries_and_our_loader_read_the_same_values(name, close, source, tmp_path):
    target = tmp_path / "target"
    stored = written(source, target, name)
    theirs, held = library_values(name, stored), tensors()
    assert len(theirs) == LAYERS * E * 3
    for key, value in theirs.items():
        error = (value.float() - held[key].float()).norm() / held[key].float().norm()
        assert error <= close, key
    for key, tensor in held.items():
        if ".experts." not in key:
            assert torch.equal(stored[key], tensor)
    with Checkpoint.open(target) as checkpoint:
        method = method_for_checkpoint(checkpoint.config["quantization_config"])
        spec = method.scheme.weight
        config = MoEConfig(num_experts=E, top_k=2, hidden_size=H, intermediate_size=I, dtype=torch.float32)
        rules = (*RULES, *packed_rules(method.checkpoint_suffixes))
        for prefix in expert_blocks(checkpoint, rules):
            layer = moe_core.build_runner(config, quant_method=method, device="cpu").routed_experts
            load_experts(checkpoint, prefix, layer)
            ours = dequantize_weights(layer.weights, spec)
            for expert in range(E):
                stem = f"{prefix}.experts.{expert}"
                joined = torch.cat([theirs[f"{stem}.{part}.weight"] for part in ("gate_proj", "up_proj")])
                assert torch.equal(ours.w13[expert].to(joined.dtype), joined)  # NVFP4's library answers in bf16
                assert torch.equal(ours.w2[expert].to(joined.dtype), theirs[f"{stem}.down_proj.weight"])


def test_nvfp4_gate_and_up_share_their_global_scale(source, tmp_path):
    stored = written(source, tmp_path / "target", "nvfp4")
    scales = {key: value for key, value in stored.items() if key.endswith("weight_global_scale")}
    assert all(value.shape == (1,) and value.dtype is torch.float32 for value in scales.values())
    for key, value in scales.items():
        if "gate_proj" in key:
            assert torch.equal(value, scales[key.replace("gate_proj", "up_proj")])


def test_the_config_says_what_is_packed_and_other_files_come_along(source, tmp_path):
    target = tmp_path / "deep" / "target"
    written(source, target, "fp8-block", max_shard_bytes=100_000)
    config = json.loads((target / "config.json").read_text())
    kept = config.pop("quantization_config").pop("modules_to_not_convert")
    assert config == CONFIG
    assert {"lm_head", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.gate"} <= set(kept)
    assert not any(".experts." in name for name in kept)
    assert (target / "tokenizer.json").read_text() == "{}"
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = {file.name for file in target.glob("*.safetensors")}
    assert files == set(index["weight_map"].values())
    assert len(files) > 2
    assert all(file.stat().st_size < 150_000 for file in target.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == Checkpoint.open(target).num_bytes


def test_an_error_half_way_leaves_nothing(source, tmp_path, monkeypatch):
    calls = []

    def breaks(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return quantize(*arguments, **named)

    quantize = formats.quantize
    monkeypatch.setattr(converting.formats, "quantize", breaks)
    with pytest.raises(KeyboardInterrupt):
        written(source, tmp_path / "target", "nvfp4")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_what_cannot_be_converted_is_refused_before_anything_is_written(source, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        written(source, target, "fp8-block")
    first = written(source, tmp_path / "first", "fp8-block")
    assert first
    with pytest.raises(UnsupportedError, match="quantized already"):
        written(tmp_path / "first", tmp_path / "second", "nvfp4")
    held = tensors()
    held["model.layers.0.mlp.experts.1.up_proj.weight"][3, 5] = torch.nan
    for file in source.glob("*.safetensors*"):
        file.unlink()
    safetensors.save_file(held, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj\.weight' holds NaN or Inf"):
        written(source, tmp_path / "second", "fp8-block")
    held = {key: value[:, :40].contiguous() if "down_proj" in key else value for key, value in tensors().items()}
    safetensors.save_file(held, source / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"down_proj.*multiple of 16"):
        written(source, tmp_path / "second", "nvfp4")
    held = {key: value for key, value in tensors().items() if "experts.1.up_proj" not in key}
    safetensors.save_file(held, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor for 'up' of expert 1"):
        written(source, tmp_path / "second", "fp8-block")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target", "first"}


_MEASURE = """
import sys, threading, torch
from pathlib import Path
from moe_core.checkpoint import Checkpoint
from moe_core.cli.convert import form_of
from moe_core.checkpoint import Conversion

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

with Checkpoint.open(sys.argv[1]) as checkpoint:
    conversion = Conversion(checkpoint, form_of("fp8-block"))
    before, peak, done = anonymous(), 0, threading.Event()
    def watch():
        global peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())
    watcher = threading.Thread(target=watch); watcher.start()
    conversion.write(Path(sys.argv[2]))
    done.set(); watcher.join()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
def test_memory_is_bounded_by_a_few_experts(tmp_path):
    """24 experts of 3 MB (75 MB in all); the whole rise stays under 3 of them."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weight, parts = torch.randn(512, 1024).bfloat16(), ("gate_proj", "up_proj", "down_proj")
    held = {f"model.layers.0.mlp.experts.{e}.{part}.weight": weight.clone() for e in range(24) for part in parts}
    safetensors.save_file(held, folder / "model.safetensors")
    command = [sys.executable, "-c", _MEASURE, str(folder), str(tmp_path / "target")]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout) < 3 * 3 * weight.nbytes
