"""Real layouts from safetensors, kept packed: read to the bit, only this rank's bytes, in bounded memory.

Shape letters: N, K rows and columns of a projection · H hidden · I intermediate · E experts.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe_core
from moe_core import CheckpointError, MoEConfig, MoEParallelConfig, formats
from moe_core.build import method_for_checkpoint
from moe_core.checkpoint import Checkpoint, load_experts
from moe_core.emulated import dequantize_expert
from moe_core.routed_experts import RoutedExperts

safetensors = pytest.importorskip("safetensors.torch")

BLOCK = "model.layers.0.mlp"
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True}
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}


def ct_config(format: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}, "ignore": []}


CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "deepseek_ue8m0": {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
    "small_blocks": {"quant_method": "fp8", "weight_block_size": [32, 64]},
    "ct_channel": ct_config("float-quantized", WEIGHTS | {"strategy": "channel"}, TOKEN),
    "ct_tensor": ct_config("float-quantized", WEIGHTS | {"strategy": "tensor"}, TOKEN | {"strategy": "tensor"}),
    "ct_block": ct_config(
        "float-quantized",
        WEIGHTS | {"strategy": "block", "block_structure": [128, 128]},
        TOKEN | {"strategy": "group", "group_size": 128},
    ),
    "modelopt_fp8": {"quant_method": "modelopt", "quant_algo": "FP8", "config_groups": {}, "ignore": ["lm_head"]},
    "modelopt_nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
    "ct_nvfp4": ct_config("nvfp4-pack-quantized", FP4, FP4 | {"dynamic": "local"}),
}
Projection = tuple[dict[str, torch.Tensor], torch.Tensor]


def fp8(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 127, (rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)


def repeated(scale: torch.Tensor, block: tuple[int, int], rows: int, columns: int) -> torch.Tensor:
    return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def projection(kind: str, rows: int, columns: int) -> Projection:
    """Random bytes under the names of a format, and what they stand for by a formula written apart from ours."""
    if kind.endswith("nvfp4"):
        packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
        scale = torch.randint(1, 127, (rows, columns // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
        values = torch.where(nibbles >= 8, -1.0, 1.0) * table[nibbles % 8]
        top = torch.rand(()) * 1e-3 + 1e-5
        if kind.startswith("modelopt"):
            tensors = {"weight": packed, "weight_scale": scale, "weight_scale_2": top, "input_scale": top * 3}
            return tensors, values * (scale.float() * top).repeat_interleave(16, 1)
        inverse = (1 / top).reshape(1)
        tensors = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": inverse}
        tensors["input_global_scale"] = inverse / 3
        return tensors, values * (scale.float() / inverse).repeat_interleave(16, 1)
    q = fp8(rows, columns)
    if "block" in kind or kind.startswith("deepseek"):
        block = (32, 64) if kind == "small_blocks" else (128, 128)
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        name = "weight_scale" if kind.startswith("ct") else "weight_scale_inv"
        if kind == "deepseek_ue8m0":
            codes = torch.randint(110, 130, grid, dtype=torch.uint8)
            return {"weight": q, name: codes}, q.float() * repeated(2.0 ** (codes.float() - 127), block, rows, columns)
        scale = torch.rand(grid) * 0.01
        return {"weight": q, name: scale}, q.float() * repeated(scale, block, rows, columns)
    shape = {"ct_channel": (rows, 1), "ct_tensor": (1,), "modelopt_fp8": ()}[kind]
    scale = torch.rand(shape) * 0.01
    tensors = {"weight": q, "weight_scale": scale}
    if kind == "modelopt_fp8":
        tensors["input_scale"] = torch.rand(()) * 0.01
    return tensors, q.float() * scale


Written = tuple[Path, dict[tuple[int, str], torch.Tensor], MoEConfig]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Written]:
    """`write(kind, …)`: a checkpoint folder, (expert, part) → what its weights stand for, and the layer."""

    def make(kind: str, hidden: int = 208, inner: int = 176, experts: int = 3, drop: str = "") -> Written:
        torch.manual_seed(0)
        names = {"gate": ("gate_proj", inner, hidden), "up": ("up_proj", inner, hidden),
                 "down": ("down_proj", hidden, inner)}  # fmt: skip
        stored: dict[str, torch.Tensor] = {"model.embed_tokens.weight": torch.zeros(2, 2)}
        values: dict[tuple[int, str], torch.Tensor] = {}
        for expert in range(experts):
            for part, (name, rows, columns) in names.items():
                tensors, values[expert, part] = projection(kind, rows, columns)
                stored |= {f"{BLOCK}.experts.{expert}.{name}.{suffix}": t for suffix, t in tensors.items()}
        stored.pop(drop, None)
        safetensors.save_file(stored, tmp_path / "model.safetensors")
        config = {"model_type": "qwen3_moe", "quantization_config": CONFIGS[kind]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        layer = MoEConfig(
            num_experts=experts, top_k=2, hidden_size=hidden, intermediate_size=inner, dtype=torch.float32
        )
        return tmp_path, values, layer

    return make


def load(folder: Path, config: MoEConfig, parallel: MoEParallelConfig | None = None, **arguments: Any) -> RoutedExperts:
    with Checkpoint.open(folder) as checkpoint:
        method = method_for_checkpoint(checkpoint.config["quantization_config"])
        plan = moe_core.plan(config, parallel=parallel, scheme=method.scheme, device="cpu")
        layer = RoutedExperts(plan, method, torch.device("cpu"))
        load_experts(checkpoint, BLOCK, layer, **arguments)
    return layer


def dequantized(layer: RoutedExperts, local: int) -> dict[str, torch.Tensor]:
    spec = layer.quant_method.scheme.weight
    assert spec is not None
    w13, w2 = dequantize_expert(layer.weights, local, spec)
    gate, up = w13.chunk(2)
    return {"gate": gate, "up": up, "down": w2}


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_are_bit_for_bit_what_the_format_says(kind, write):
    folder, values, config = write(kind)
    layer = load(folder, config)
    for (expert, part), expected in values.items():
        assert torch.equal(dequantized(layer, expert)[part], expected), (expert, part)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_tp_split_reads_its_own_part_and_the_parts_make_the_whole(kind, write, monkeypatch):
    folder, values, config = write(kind, hidden=192, inner=256, experts=2)
    read = count_bytes(monkeypatch)
    parts = []
    for rank in range(2):
        read.clear()
        layer = load(folder, config, MoEParallelConfig(tp_size=2, tp_rank=rank))
        parts.append([dequantized(layer, expert) for expert in range(2)])
        packed = sum(value.numel() * value.element_size() for name, value in layer.named_parameters() if name in WHOLE)
        assert sum(read.values()) <= packed + 4096  # scalars and rows of scales that every rank reads whole
    for (expert, part), expected in values.items():
        dim = 1 if part == "down" else 0
        assert torch.equal(torch.cat([parts[rank][expert][part] for rank in range(2)], dim), expected)


WHOLE = ("w13", "w2", "w13_scale", "w2_scale")


def count_bytes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Tensor name → bytes that were asked of the file."""
    read: dict[str, int] = {}
    tensor, slices = Checkpoint.tensor, Checkpoint.slice

    def counted(name: str, value: torch.Tensor) -> torch.Tensor:
        read[name] = read.get(name, 0) + value.numel() * value.element_size()
        return value

    class Slice:
        def __init__(self, checkpoint: Checkpoint, name: str) -> None:
            self.inner, self.name = slices(checkpoint, name), name

        def __getitem__(self, index: Any) -> torch.Tensor:
            return counted(self.name, self.inner[index])

    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: counted(name, tensor(self, name)))
    monkeypatch.setattr(Checkpoint, "slice", lambda self, name: Slice(self, name))
    return read


@pytest.mark.parametrize("kind", ["deepseek", "modelopt_nvfp4"])
def test_an_ep_rank_reads_its_own_experts_only(kind, write, monkeypatch):
    folder, values, config = write(kind, experts=4)
    read = count_bytes(monkeypatch)
    layer = load(folder, config, MoEParallelConfig(ep_size=2, ep_rank=1))
    assert {int(re.search(r"experts\.(\d+)", name)[1]) for name in read} == {2, 3}
    assert torch.equal(dequantized(layer, 0)["down"], values[2, "down"])


def test_a_tp_split_that_cuts_a_block_is_refused_with_the_legal_sizes(write):
    folder, _, config = write("deepseek", inner=768)
    with pytest.raises(moe_core.UnsupportedError, match=r"192 of 768.*multiples of 128.*\[1, 2, 3, 6\]"):
        load(folder, config, MoEParallelConfig(tp_size=4))
    method = method_for_checkpoint(CONFIGS["deepseek"])
    plan = moe_core.plan(config, parallel=MoEParallelConfig(tp_size=2), scheme=method.scheme, device="cpu")
    assert RoutedExperts(plan, method, torch.device("cpu")).intermediate_size == 384


@pytest.mark.parametrize(
    ("kind", "suffix", "part"),
    [
        ("deepseek", "weight_scale_inv", "up_scale"),
        ("ct_channel", "weight_scale", "up_scale"),
        ("modelopt_fp8", "input_scale", "up_input_scale"),
        ("modelopt_nvfp4", "weight_scale_2", "up_global_scale"),
        ("ct_nvfp4", "weight_global_scale", "up_global_scale"),
        ("ct_nvfp4", "weight_packed", "up"),
    ],
)
def test_a_missing_scale_is_named(kind, suffix, part, write):
    name = f"{BLOCK}.experts.1.up_proj.{suffix}"
    folder, _, config = write(kind, drop=name)
    with pytest.raises(CheckpointError, match=f"expert 1 {part}") as caught:
        load(folder, config)
    assert name in str(caught.value) or part == "up"


def test_a_grid_of_another_block_size_is_refused(write):
    """The block comes from the config: 32×64 grids are not stretched to 128×128."""
    folder, _, config = write("small_blocks")
    config_json = json.loads((folder / "config.json").read_text())
    config_json["quantization_config"] = CONFIGS["deepseek"]
    (folder / "config.json").write_text(json.dumps(config_json))
    pattern = r"experts\.0\.down_proj\.weight_scale_inv'.*shape \(7, 3\).*expects \(2, 2\).*\(128, 128\)"
    with pytest.raises(CheckpointError, match=pattern):
        load(folder, config)


def test_plain_weights_under_a_packed_config_are_refused_and_by_name_quantized(write, tmp_path):
    folder, values, config = write("deepseek")
    plain = {f"{BLOCK}.experts.{e}.{part}_proj.weight": value.bfloat16() for (e, part), value in values.items()}
    safetensors.save_file(plain, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"bfloat16.*promises float8_e4m3fn.*by name"):
        load(folder, config)
    seen: list[tuple[int, int]] = []
    layer = moe_core.build_runner(config, scheme="fp8_block", device="cpu").routed_experts
    with Checkpoint.open(folder) as checkpoint:
        load_experts(checkpoint, BLOCK, layer, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for (expert, part), value in values.items():
        expected = formats.quantize_dequantize(value.bfloat16(), layer.quant_method.scheme.weight)
        assert torch.equal(dequantized(layer, expert)[part], expected)


class PeakMemory(TorchDispatchMode):
    """Bytes of live storages that operators made inside: an account of every allocation, whatever the system does."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.add(value.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@pytest.mark.parametrize("scheme", ["packed", "fp8_block", "fp8_tensor_dynamic", "fp8_channel", "nvfp4"])
def test_peak_memory_is_a_layer_and_an_expert(scheme, write, monkeypatch):
    """Packed as it is, or quantized from bf16 on the way: at most the layer's packed size and one expert as stored."""
    hidden, inner, experts = 1024, 1024, 3
    folder, values, config = write("deepseek", hidden, inner, experts)
    one = 3 * hidden * inner
    if scheme != "packed":
        one *= 2  # bf16
        plain = {f"{BLOCK}.experts.{e}.{part}_proj.weight": v.bfloat16() for (e, part), v in values.items()}
        safetensors.save_file(plain, folder / "model.safetensors")
    monkeypatch.setattr("moe_core.packed._CHUNK", 1 << 14)  # the experts here are a tenth of real ones
    del values
    with Checkpoint.open(folder) as checkpoint, PeakMemory() as memory:
        tensor = Checkpoint.tensor

        def counted(self: Checkpoint, name: str) -> torch.Tensor:
            value = tensor(self, name)
            memory.add(value.untyped_storage())  # the library allocates outside of any operator
            return value

        monkeypatch.setattr(Checkpoint, "tensor", counted)
        method = method_for_checkpoint(checkpoint.config["quantization_config"]) if scheme == "packed" else None
        layer = moe_core.build_runner(
            config, scheme=None if method else scheme, quant_method=method, device="cpu"
        ).routed_experts
        load_experts(checkpoint, BLOCK, layer)
    packed = sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())
    assert packed <= memory.peak <= packed + one, (packed, one, memory.peak)


def test_gpt_oss_as_modelopt_writes_it(tmp_path):
    """All experts in one, transposed and packed along H, gate and up interleaved, one second-level scale for all."""
    torch.manual_seed(0)
    experts, hidden, inner = 3, 64, 32
    activation = moe_core.ActivationSpec("swiglu_oai", moe_core.GateUpLayout.INTERLEAVED, limit=7.0, bias=True)
    config = MoEConfig(num_experts=experts, top_k=2, hidden_size=hidden, intermediate_size=inner, dtype=torch.float32,
                       activation=activation)  # fmt: skip
    stored, expected = {}, {}
    for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        made = [projection("modelopt_nvfp4", rows, columns)[0] for _ in range(experts)]
        top = made[0]["weight_scale_2"]
        prefix = f"{BLOCK}.experts.{name}"
        stored[prefix] = torch.stack([tensors["weight"].T for tensors in made]).contiguous()
        stored[f"{prefix}_weight_scale"] = torch.stack([tensors["weight_scale"].T for tensors in made]).contiguous()
        stored |= {f"{prefix}_weight_scale_2": top, f"{prefix}_input_scale": top * 2}
        stored[f"{prefix}_bias"] = torch.randn(experts, rows)
        spec = method_for_checkpoint(CONFIGS["modelopt_nvfp4"]).scheme.weight
        expected[name] = [formats.dequantize(t["weight"], t["weight_scale"], spec, top.double()) for t in made]
    safetensors.save_file(stored, tmp_path / "model.safetensors")
    json_config = {"model_type": "gpt_oss", "quantization_config": CONFIGS["modelopt_nvfp4"]}
    (tmp_path / "config.json").write_text(json.dumps(json_config))
    layer = load(tmp_path, config)
    shares = [load(tmp_path, config, MoEParallelConfig(tp_size=2, tp_rank=rank)) for rank in range(2)]
    spec = layer.quant_method.scheme.weight
    for expert in range(experts):
        w13, w2 = dequantize_expert(layer.weights, expert, spec)
        assert torch.equal(w13, expected["gate_up_proj"][expert])
        assert torch.equal(w2, expected["down_proj"][expert])
        first, second = (dequantize_expert(share.weights, expert, spec) for share in shares)
        assert torch.equal(torch.cat([first[0], second[0]]), w13)
        assert torch.equal(torch.cat([first[1], second[1]], dim=1), w2)
    assert torch.equal(layer.weights.w13_bias, stored[f"{BLOCK}.experts.gate_up_proj_bias"])
