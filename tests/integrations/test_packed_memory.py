"""Loading holds the packed model, and beside it no more than one layer and one expert as it is stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

E, H, I, LAYERS = 16, 512, 512, 2
EXPERT = 3 * H * I  # bytes of a packed one, scales aside

_LOAD = """
import sys, threading, torch
from pathlib import Path
from moe_core.integrations.transformers.packed import from_pretrained

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

small, folder, scheme = sys.argv[1], sys.argv[2], sys.argv[3] or None
from_pretrained(small)  # imports, pools and caches are there now
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch); watcher.start()
model = from_pretrained(folder, scheme=scheme)
done.set(); watcher.join()
held = sum(p.nbytes for p in model.parameters())
print(peak - before, held)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
@pytest.mark.parametrize(
    "scheme",
    ["", "nvfp4", pytest.param("fp8_block", marks=pytest.mark.full)],
    ids=["packed", "bf16 to nvfp4", "bf16 to fp8_block"],
)
def test_peak_memory_while_loading(scheme, tmp_path):
    """As it is stored, or quantized on the way."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=H, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=64, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=2,
    )  # fmt: skip
    config.architectures = ["Qwen3MoeForCausalLM"]
    with torch.device("meta"):
        names = {key: value.shape for key, value in transformers.Qwen3MoeForCausalLM(config).state_dict().items()}
    tensors = {key: torch.randn(shape).bfloat16() for key, shape in names.items() if ".experts." not in key}
    codes = torch.randint(0, 127, (H, I), dtype=torch.uint8).view(torch.float8_e4m3fn)
    plain = torch.randn(H, I).bfloat16()
    for layer in range(LAYERS):
        for expert in range(E):
            for part in ("gate_proj", "up_proj", "down_proj"):
                stem = f"model.layers.{layer}.mlp.experts.{expert}.{part}"
                tensors[f"{stem}.weight"] = (plain if scheme else codes).clone()
                if not scheme:
                    tensors |= {f"{stem}.weight_scale": torch.tensor(0.01), f"{stem}.input_scale": torch.tensor(0.01)}
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stored = {} if scheme else {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | stored))
    small = Path(__file__).parents[1] / "fixtures" / "fp8_qwen3_moe"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    command = [sys.executable, "-c", _LOAD, str(small), str(tmp_path), scheme]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rise, held = map(int, done.stdout.split())
    packed, one = (EXPERT // 2, 2 * EXPERT) if scheme == "nvfp4" else (EXPERT, 2 * EXPERT if scheme else EXPERT)
    assert held >= LAYERS * E * packed
    assert rise <= held + E * packed + one, (rise, held)
