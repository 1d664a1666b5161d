"""`moe-core shadow`: right layers pass, and of a broken stage the name is told."""

from __future__ import annotations

import importlib.util
import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import moe_core
from moe_core import QuantSpec, formats
from moe_core.builtin.local import LocalPrepareAndFinalize
from moe_core.builtin.torch_experts import TorchExperts
from moe_core.plugins import registry
from moe_core.types import Dispatched

safetensors = pytest.importorskip("safetensors.torch")

needs_batched = pytest.mark.skipif(
    importlib.util.find_spec("moe_batched") is None, reason="moe-batched is not installed"
)
needs_fp8 = pytest.mark.skipif(importlib.util.find_spec("quant_fp8") is None, reason="moe-quant-fp8 is not installed")


class DropsAToken(LocalPrepareAndFinalize):
    def finalize(self, expert_out: Any, handle: Any, routing: Any, out: torch.Tensor) -> None:
        super().finalize(expert_out, handle, routing, out)
        out[0] = 0


class SwapsTwoIds(LocalPrepareAndFinalize):
    def prepare(self, hidden_states: torch.Tensor, routing: Any, **named: Any) -> Dispatched:
        dispatched = super().prepare(hidden_states, routing, **named)
        return attrs.evolve(dispatched, topk_ids=dispatched.topk_ids.roll(1, dims=1))


class AddsOne(TorchExperts):
    def apply(self, dispatched: Any, weights: Any, workspaces: Any, out: torch.Tensor) -> None:
        super().apply(dispatched, weights, workspaces, out)
        out += 1


class IgnoresTheLayout(TorchExperts):
    def apply(self, dispatched: Any, weights: Any, workspaces: Any, out: torch.Tensor) -> None:
        turned = attrs.evolve(weights, gate_up_layout=moe_core.GateUpLayout.UP_GATE)
        super().apply(dispatched, turned, workspaces, out)


@pytest.fixture
def registered() -> Iterator[Callable[..., None]]:
    """`registered("acme", moe_core_register_experts=…)`: a plugin, for the time of a test."""
    names: list[str] = []

    def register(name: str, **hooks: Any) -> None:
        module = types.ModuleType(name)
        module.moe_core_api = (1, 0)  # type: ignore[attr-defined]
        for hook, function in hooks.items():
            setattr(module, hook, moe_core.hookimpl(function, specname=hook))
        names.append(moe_core.register_plugin(module).name)

    yield register
    for name in names:
        moe_core.unregister_plugin(name)


def dispatch_hook(backend: Any) -> Any:
    like = registry().dispatch["local"].capabilities
    return lambda register: register("acme", lambda *_: backend(), like, priority=-50)


def experts_hook(backend: Any) -> Any:
    like = registry().experts["torch"].capabilities
    return lambda register: register("acme", lambda config, parallel, *_: backend(config, parallel), like, priority=-50)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "DeepSeek-V3", "gpt-oss"])
def test_right_layers_pass(name, checkpoints, invoke):
    result = invoke("shadow", checkpoints(name), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "  ok" in result.stdout
    assert "DIFFERS" not in result.stdout


@needs_batched
def test_right_layers_pass_in_batched_format(checkpoints, invoke):
    found = json.loads(invoke("shadow", checkpoints("Mixtral"), "--dispatch", "batched", "--json").stdout)
    assert [layer["dispatch"] for layer in found["layers"]] == ["batched", "batched"]
    assert all(0 < layer["error"] < 1e-6 and not layer["differs"] for layer in found["layers"])


@pytest.mark.parametrize("backend", [DropsAToken, SwapsTwoIds])
def test_a_broken_dispatch_is_named(backend, checkpoints, invoke, registered):
    registered("acme", moe_core_register_prepare_finalize=dispatch_hook(backend))
    result = invoke("shadow", checkpoints("Mixtral"), "--dispatch", "acme")
    assert result.exit_code == 1
    assert result.stdout.count("→ dispatch acme (") == 2
    assert "→ experts" not in result.stdout
    assert "→ quantization" not in result.stdout


@pytest.mark.parametrize("backend", [AddsOne, IgnoresTheLayout])
@pytest.mark.parametrize("dispatch", ["local", pytest.param("batched", marks=needs_batched)])
def test_broken_experts_are_named(backend, dispatch, checkpoints, invoke, registered):
    registered("acme", moe_core_register_experts=experts_hook(backend))
    arguments = ("--experts", "acme", "--dispatch", dispatch, "--layers", "1,", "--json")
    result = invoke("shadow", checkpoints("Mixtral"), *arguments)
    (layer,) = json.loads(result.stdout)["layers"]
    assert result.exit_code == 1
    assert layer["differs"]
    assert layer["blame"].startswith("experts acme (")
    assert layer["swapped"]["experts"] < 1e-6
    assert layer["swapped"]["dispatch"] == pytest.approx(layer["error"], rel=1e-3)


def test_two_broken_stages_are_both_named(checkpoints, invoke, registered):
    registered("acme", moe_core_register_prepare_finalize=dispatch_hook(DropsAToken),
               moe_core_register_experts=experts_hook(AddsOne))  # fmt: skip
    result = invoke("shadow", checkpoints("Mixtral"), "--dispatch", "acme", "--experts", "acme", "--layers", "1")
    assert "→ dispatch acme (" in result.stdout
    assert " and experts acme (" in result.stdout


def write_fp8(plain: Path, folder: Path) -> Path:
    """The checkpoint with its experts and projections in fp8 blocks of 32 x 32, as DeepSeek writes them."""
    spec = QuantSpec("float8_e4m3fn", (32, 32))
    folder.mkdir()
    stored: dict[str, torch.Tensor] = {}
    for file in plain.glob("*.safetensors"):
        for name, tensor in safetensors.load_file(file).items():
            if not (name.endswith(".weight") and ("_proj" in name or ".experts." in name)):
                stored[name] = tensor
                continue
            q, scale = formats.quantize(tensor, spec)
            stored |= {name: q, name + "_scale_inv": scale}
    packing = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": packing}))
    safetensors.save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@needs_fp8
@pytest.mark.parametrize("dispatch", ["local", pytest.param("batched", marks=needs_batched)])
def test_right_packed_layers_pass(dispatch, checkpoints, tmp_path, invoke):
    folder = write_fp8(checkpoints("Qwen3-MoE"), tmp_path / "fp8")
    result = invoke("shadow", folder, "--dispatch", dispatch, "--json")
    layers = json.loads(result.stdout)["layers"]
    assert result.exit_code == 0, result.output
    assert [layer["scheme"] for layer in layers] == ["fp8_block"] * 2
    assert all(layer["error"] < layer["allowed"] and not layer["notes"] for layer in layers)


@needs_fp8
@pytest.mark.parametrize("damage", ["scale", "rows"])
def test_a_broken_quantization_method_is_named(damage, checkpoints, tmp_path, invoke, monkeypatch):
    from quant_fp8.method import Fp8Method

    class Broken(Fp8Method):
        def load_expert(self, layer: Any, expert: int, name: str, tensor: torch.Tensor) -> None:
            if damage == "scale" and name == "gate_scale":
                tensor = tensor * 2
            if damage == "rows" and name == "down":
                tensor = tensor.view(torch.uint8).flip(0).view(tensor.dtype)
            super().load_expert(layer, expert, name, tensor)

    def claim(config: Any) -> Any:
        made = entry.from_checkpoint_config(config)
        return made if isinstance(made, str) else Broken(made.scheme, online=False)

    entry = registry().quant_methods["fp8_block"]
    broken = attrs.evolve(entry, from_checkpoint_config=claim)
    monkeypatch.setitem(registry().quant_methods, "fp8_block", broken)
    folder = write_fp8(checkpoints("Qwen3-MoE"), tmp_path / "fp8")
    result = invoke("shadow", folder)
    assert result.exit_code == 1
    assert result.stdout.count("→ quantization: what was made of the checkpoint in scheme fp8_block") == 2
    assert "→ experts" not in result.stdout


def test_weights_that_were_loaded_wrong_are_named(checkpoints, invoke, monkeypatch):
    """Whoever loaded them: what the model holds is compared with what the files hold."""
    from moe_core.cli import shadow

    load = shadow.load_model

    def damaged(*arguments: Any) -> Any:
        loaded = load(*arguments)
        loaded.model.get_submodule(next(iter(loaded.plans))).down_proj.data[1] *= 3
        return loaded

    monkeypatch.setattr(shadow, "load_model", damaged)
    result = invoke("shadow", checkpoints("Mixtral"))
    assert result.stdout.count("DIFFERS") == 1
    assert "→ quantization: what was made of the checkpoint in scheme unquantized" in result.stdout


def test_a_difference_that_does_not_come_again_is_told_as_such(checkpoints, invoke, registered):
    calls = []

    class Sometimes(TorchExperts):
        def apply(self, dispatched: Any, weights: Any, workspaces: Any, out: torch.Tensor) -> None:
            super().apply(dispatched, weights, workspaces, out)
            calls.append(0)
            if len(calls) <= 2:
                out += 1

    registered("acme", moe_core_register_experts=experts_hook(Sometimes))
    result = invoke("shadow", checkpoints("Mixtral"), "--experts", "acme")
    assert "→ no stage: run again on its own with the same input, the layer is right" in result.stdout


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("x", "expected a count, all, or numbers"),
        ("0", "at least one layer"),
        ("0,9", "no MoE layer 9; there are [0, 1]"),
    ],
)
def test_layers_that_are_not_there(layers, said, checkpoints, refused):
    assert said in refused("shadow", checkpoints("Mixtral"), "--layers", layers)
