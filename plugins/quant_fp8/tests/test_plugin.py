"""What moe-quant-fp8 declares: which plans it can join, and which checkpoints it claims."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import attrs
import pytest
import torch

import moe_core
from moe_core import MoEConfig, MoEParallelConfig, QuantSpec, ScaleFormat, UnsupportedError
from moe_core.build import method_for_checkpoint
from moe_core.routed_experts import RoutedExperts
from quant_fp8 import schemes
from quant_fp8.method import scheme_of
from quant_fp8.plugin import FP8_TORCH

CONFIG = MoEConfig(num_experts=4, top_k=2, hidden_size=256, intermediate_size=384, dtype=torch.bfloat16)
BITS = {"num_bits": 8, "type": "float", "symmetric": True}


def groups(weights: dict[str, Any], inputs: dict[str, Any] | None, *more: dict[str, Any]) -> dict[str, Any]:
    first = {"weights": BITS | weights, "input_activations": None if inputs is None else BITS | inputs}
    config = {f"group_{i}": group for i, group in enumerate([first, *more])}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": config}


CLAIMED = [
    ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}, schemes.FP8_BLOCK),
    ({"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, schemes.FP8_BLOCK_UE8M0),
    ({"quant_method": "fp8", "weight_block_size": [64, 32]}, schemes.block_scheme((64, 32), ScaleFormat.FP32)),
    ({"quant_method": "fp8", "activation_scheme": "static"}, schemes.FP8_TENSOR),
    ({"quant_method": "fp8"}, schemes.FP8_TENSOR_DYNAMIC),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, schemes.FP8_TENSOR),
    ({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, schemes.FP8_CHANNEL),
    (groups({"strategy": "channel"}, {"strategy": "token", "dynamic": True}), schemes.FP8_CHANNEL),
    (groups({"strategy": "tensor"}, {"strategy": "tensor", "dynamic": False}), schemes.FP8_TENSOR),
    (groups({"strategy": "tensor"}, {"strategy": "tensor", "dynamic": True}), schemes.FP8_TENSOR_DYNAMIC),
    (groups({"strategy": "channel"}, None), schemes.FP8_WEIGHT_ONLY),
    (
        groups({"strategy": "block", "block_structure": [128, 128]},
               {"strategy": "group", "group_size": 128, "dynamic": True}),
        schemes.FP8_BLOCK,
    ),
]  # fmt: skip

DECLINED = [
    ({"quant_method": "gptq"}, "quant_method 'gptq'"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "only e4m3"),
    ({"quant_method": "fp8", "expert_dtype": "fp4"}, "experts are not FP8"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}, "dynamic scales"),
    ({"quant_method": "fp8", "weight_block_size": 128}, "two positive ints"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4'"),
    ({"quant_method": "compressed-tensors"}, "of None bits"),
    (groups({"strategy": "channel", "num_bits": 4}, None), "4 bits"),
    (groups({"strategy": "group", "group_size": 64}, None), "strategy 'group'"),
    (groups({"strategy": "tensor"}, {"strategy": "token", "dynamic": True}), "tensor"),
    (groups({"strategy": "channel"}, None, {"weights": {"num_bits": 4}}), "differ in weights"),
    (groups({"strategy": "block"}, {"strategy": "group", "group_size": 64, "dynamic": True}), "group_size"),
]


@pytest.mark.parametrize(("config", "scheme"), CLAIMED)
def test_a_checkpoint_runs_in_its_own_scheme_or_weight_only_by_name(config, scheme):
    assert scheme_of(config) == scheme
    assert method_for_checkpoint(config).scheme == scheme
    alone = method_for_checkpoint(config, scheme="fp8_weight_only").scheme
    assert alone == attrs.evolve(scheme, name="fp8_weight_only", activation=None)


@pytest.mark.parametrize(("config", "reason"), DECLINED)
def test_what_it_cannot_read_it_declines_with_a_reason(config, reason):
    answer = scheme_of(config)
    assert isinstance(answer, str)
    assert reason in answer


def test_nobody_claims_it_and_everybody_says_why():
    with pytest.raises(UnsupportedError, match="quant_method = 'gptq'") as caught:
        method_for_checkpoint({"quant_method": "gptq"})
    assert all(f"  {scheme.name} (moe-quant-fp8" in str(caught.value) for scheme in schemes.SCHEMES)
    with pytest.raises(UnsupportedError, match="of scheme fp8_tensor"):
        method_for_checkpoint({"quant_method": "modelopt", "quant_algo": "FP8"}, scheme="fp8_block")


@pytest.mark.parametrize("scheme", [scheme.name for scheme in schemes.SCHEMES])
def test_behind_a_dispatch_that_declares_batched(scheme):
    """The format is the dispatch's declaration, whatever the scheme; both properties answer from it."""
    plan = moe_core.plan(CONFIG, scheme=scheme, dispatch="batched", device="cpu")
    assert plan.ranges[0].candidate.name == "fp8_torch"
    assert plan.parallel.use_batched_activation_format
    assert not plan.parallel.needs_round_robin_routing_tables
    assert not moe_core.plan(CONFIG, scheme=scheme, device="cpu").parallel.use_batched_activation_format


def test_a_backend_that_lacks_the_scheme_is_refused_with_the_table():
    with pytest.raises(UnsupportedError, match="experts torch: scheme fp8_block: runs unquantized") as caught:
        moe_core.plan(CONFIG, scheme="fp8_block", experts="torch", device="cpu")
    assert ("local", "torch") in {(pair.dispatch, pair.experts) for pair in caught.value.rejections}
    with pytest.raises(UnsupportedError, match="scheme unquantized: runs fp8_block"):
        moe_core.plan(CONFIG, experts="fp8_torch", device="cpu")


def test_what_is_not_claimed_is_refused():
    assert not FP8_TORCH.graph_capturable
    with pytest.raises(UnsupportedError, match="graph"):
        moe_core.plan(attrs.evolve(CONFIG, cuda_graph=True), scheme="fp8_block", device="cpu")
    with pytest.raises(UnsupportedError, match=r"64 of 384.*legal tp sizes: \[1, 3\]"):
        moe_core.plan(CONFIG, parallel=MoEParallelConfig(tp_size=6), scheme="fp8_block", device="cpu")
    assert moe_core.plan(CONFIG, parallel=MoEParallelConfig(tp_size=6), scheme="fp8_channel", device="cpu")


def make_layer(scheme: str) -> RoutedExperts:
    return moe_core.build_runner(CONFIG, scheme=scheme, device="cpu").routed_experts


def test_a_scale_that_was_never_loaded_is_named():
    layer = make_layer("fp8_tensor")
    for expert in range(4):
        for name, shape in {"gate": (384, 256), "up": (384, 256), "down": (256, 384)}.items():
            layer.load_expert(expert, name, torch.zeros(shape))
            if (expert, name) != (2, "up"):
                layer.load_expert(expert, f"{name}_input_scale", torch.tensor(0.01))
    with pytest.raises(moe_core.CheckpointError, match=r"local expert 2: 'up_input_scale'.*never loaded"):
        layer.pack_weights()


@pytest.mark.parametrize(
    ("name", "tensor", "text"),
    [
        ("gate", torch.zeros(384, 256, dtype=torch.float8_e5m2), "float8_e5m2.*expects torch.float8_e4m3fn"),
        ("gate", torch.zeros(256, 384), r"shape \(256, 384\).*expected \(384, 256\)"),
        ("up_scale", torch.zeros(3, 3), r"'up_scale' has shape \(3, 3\).*\(3, 2\).*\(128, 128\)"),
        ("gate_global_scale", torch.zeros(()), "gate_global_scale.*scheme fp8_block has gate, up, down"),
        ("gate_bias", torch.zeros(384), "declares no bias"),
        ("router", torch.zeros(4), "'router'"),
    ],
)
def test_what_does_not_fit_is_refused(name, tensor, text):
    with pytest.raises(moe_core.CheckpointError, match=text):
        make_layer("fp8_block").load_expert(0, name, tensor)


def test_weights_are_stored_packed():
    layer = make_layer("fp8_block")
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in layer.named_parameters()}
    fp8, fp32 = torch.float8_e4m3fn, torch.float32
    assert shapes == {"w13": ((4, 768, 256), fp8), "w13_scale": ((4, 2, 3, 2), fp32),
                      "w2": ((4, 256, 384), fp8), "w2_scale": ((4, 2, 3), fp32)}  # fmt: skip
    assert layer.quant_method.activation_quant(layer) == QuantSpec("float8_e4m3fn", (1, 128), dynamic=True)


def test_which_kernels_run_is_told_without_a_gpu():
    from moe_core.types import ActivationFormat, Device
    from quant_fp8.experts import Fp8TritonExperts

    config = attrs.evolve(CONFIG, num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768)
    experts = Fp8TritonExperts(config, MoEParallelConfig(), schemes.FP8_BLOCK)
    h200 = Device("cuda", (9, 0), "NVIDIA H200")
    ranges = experts.launch_ranges(ActivationFormat.STANDARD, h200)
    assert [item.first_row for item in ranges] == sorted({item.first_row for item in ranges})
    assert [item.what.partition(",")[0] for item in ranges][:4] == ["slots", "scan by slot", "stream", "scan"]
    assert "loading warps" in ranges[-1].what
    assert "at C = 128" in experts.launch_ranges(ActivationFormat.BATCHED, h200)[0].what


def test_on_a_gpu_the_kernels_are_chosen_but_for_blocks_that_they_do_not_read():
    from moe_core.types import Device

    h200, turing = Device("cuda", (9, 0), "NVIDIA H200"), Device("cuda", (7, 5), "NVIDIA T4")
    assert moe_core.plan(CONFIG, scheme="fp8_block", device=h200).ranges[0].candidate.name == "fp8_triton"
    assert moe_core.plan(CONFIG, scheme="fp8_block", device=turing).ranges[0].candidate.name == "fp8_torch"
    odd = {"quant_method": "fp8", "weight_block_size": [64, 32]}
    plan = moe_core.plan(CONFIG, scheme=method_for_checkpoint(odd).scheme, device=h200)
    assert plan.ranges[0].candidate.name == "fp8_torch"
    assert "the kernels read blocks of 128 × 128" in plan.explain()


def test_its_declaration_imports_nothing_heavy():
    code = "import sys, quant_fp8.plugin; print('moe_core.emulated' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
