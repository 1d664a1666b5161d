"""What moe-quant-nvfp4 declares: which plans it can join, and which checkpoints it claims."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch

import moe_core
from moe_core import Device, MoEConfig, MoEParallelConfig, UnsupportedError
from moe_core.build import method_for_checkpoint
from moe_core.config import MODEL_DTYPES
from moe_core.types import BATCHED_FINALIZE_DUTIES, ActivationFormat, DispatchCapabilities, ExpertPlacement
from quant_nvfp4.method import scheme_of
from quant_nvfp4.schemes import NVFP4, NVFP4_W4A4, SCHEMES

CONFIG = MoEConfig(num_experts=4, top_k=2, hidden_size=256, intermediate_size=96, dtype=torch.bfloat16)
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


def groups(weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": FP4 | weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"group_0": group}}


CLAIMED = [
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, NVFP4_W4A4),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, NVFP4_W4A4),
    ({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}, NVFP4),
    (groups({}, FP4 | {"dynamic": "local"}), NVFP4_W4A4),
    (groups({}, None), NVFP4),
]
DECLINED = [
    ({"quant_method": "fp8"}, "quant_method 'fp8'"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "quant_algo 'NVFP4_AWQ'"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "group_size 32"),
    (groups({"num_bits": 8}, None), "weights {'num_bits': 8"),
    (groups({}, FP4 | {"group_size": 32, "dynamic": "local"}), "input_activations"),
    (groups({}, FP4 | {"dynamic": False}), "dynamic = False"),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, "'num_bits': None"),
]


@pytest.mark.parametrize(("config", "scheme"), CLAIMED)
def test_a_checkpoint_runs_weight_only_unless_its_activations_are_asked_for(config, scheme):
    assert scheme_of(config) == scheme
    assert method_for_checkpoint(config).scheme == NVFP4
    if scheme is NVFP4_W4A4:
        assert method_for_checkpoint(config, scheme="nvfp4_w4a4").scheme == NVFP4_W4A4
    else:
        with pytest.raises(UnsupportedError, match="quantizes no activations"):
            method_for_checkpoint(config, scheme="nvfp4_w4a4")


@pytest.mark.parametrize(("config", "reason"), DECLINED)
def test_what_it_cannot_read_it_declines_with_a_reason(config, reason):
    answer = scheme_of(config)
    assert isinstance(answer, str)
    assert reason in answer


@pytest.fixture
def round_robin() -> Iterator[str]:
    """A dispatch that declares both: the batched format, and round-robin tables."""
    capabilities = DispatchCapabilities(
        activation_format=ActivationFormat.BATCHED,
        dtypes=frozenset(MODEL_DTYPES),
        device_types=frozenset({"cpu"}),
        owns=BATCHED_FINALIZE_DUTIES,
        accepts_dropped_ids=True,
        accepts_duplicate_ids=True,
        placements=frozenset(ExpertPlacement),
        needs_round_robin_routing_tables=True,
        max_ep_size=None,
        carries_tokens=True,
    )

    @moe_core.hookimpl
    def register_it(register: Callable[..., None]) -> None:
        register("acme_wire", lambda *_: None, capabilities)

    module = types.ModuleType("acme_wire")
    module.moe_core_api, module.moe_core_register_prepare_finalize = (1, 0), register_it  # type: ignore[attr-defined]
    moe_core.register_plugin(module)
    yield "acme_wire"
    moe_core.unregister_plugin("acme_wire")


@pytest.mark.parametrize("scheme", [scheme.name for scheme in SCHEMES])
def test_behind_a_dispatch_that_declares_batched(scheme, round_robin):
    """The format and the tables are the dispatch's declarations, whatever the scheme."""
    plan = moe_core.plan(CONFIG, scheme=scheme, dispatch="batched", device="cpu")
    assert plan.ranges[0].candidate.name == "nvfp4_torch"
    assert plan.parallel.use_batched_activation_format
    assert not plan.parallel.needs_round_robin_routing_tables
    config = attrs.evolve(CONFIG, placement=ExpertPlacement.ROUND_ROBIN)
    parallel = MoEParallelConfig(ep_size=2, dp_size=2)
    plan = moe_core.plan(config, parallel=parallel, scheme=scheme, dispatch=round_robin, device="cpu")
    assert plan.parallel.use_batched_activation_format
    assert plan.parallel.needs_round_robin_routing_tables
    plan = moe_core.plan(CONFIG, scheme=scheme, dispatch="local", device="cpu")
    assert not plan.parallel.use_batched_activation_format
    assert not plan.parallel.needs_round_robin_routing_tables


def test_a_backend_that_lacks_the_scheme_is_refused_with_the_table():
    with pytest.raises(UnsupportedError, match="experts torch: scheme nvfp4: runs unquantized") as caught:
        moe_core.plan(CONFIG, scheme="nvfp4", experts="torch", device="cpu")
    assert ("local", "torch") in {(pair.dispatch, pair.experts) for pair in caught.value.rejections}


def test_native_fp4_is_declared_and_refused_with_its_reasons():
    hopper = Device("cuda", (9, 0), "some GPU")
    with pytest.raises(UnsupportedError, match="isn't in this release") as caught:
        moe_core.plan(CONFIG, scheme="nvfp4_w4a4", experts="nvfp4_native", device=hopper)
    assert "10" in str(caught.value)


def test_sizes_that_the_format_cannot_have_are_refused():
    odd = attrs.evolve(CONFIG, intermediate_size=88)
    with pytest.raises(UnsupportedError, match="intermediate size 88: scheme nvfp4 needs a multiple of 16"):
        moe_core.plan(odd, scheme="nvfp4", device="cpu")
    with pytest.raises(UnsupportedError, match=r"legal tp sizes: \[1, 2, 3, 6\]"):
        moe_core.plan(CONFIG, parallel=MoEParallelConfig(tp_size=4), scheme="nvfp4", device="cpu")


def test_online_w4a4_needs_a_calibrated_input_scale():
    layer = moe_core.build_runner(CONFIG, scheme="nvfp4_w4a4", device="cpu").routed_experts
    for expert in range(4):
        for name, shape in {"gate": (96, 256), "up": (96, 256), "down": (256, 96)}.items():
            layer.load_expert(expert, name, torch.ones(shape))
    with pytest.raises(moe_core.CheckpointError, match="local expert 0: 'gate_input_scale'"):
        layer.pack_weights()


def test_an_inverse_scale_is_loaded_as_what_divides():
    layer = moe_core.build_runner(CONFIG, scheme="nvfp4", device="cpu").routed_experts
    layer.load_expert(1, "up_inverse_global_scale", torch.tensor([3.0]))
    layer.load_expert(1, "gate_global_scale", torch.tensor(0.25))
    layer.load_expert(1, "down_input_scale", torch.tensor(0.25))  # weight-only has no use for it
    stored = layer.weights.w13_global_scale
    assert stored is not None
    assert stored[1].tolist() == [0.25, 1 / 3]


def test_weights_are_stored_packed():
    layer = moe_core.build_runner(CONFIG, scheme="nvfp4_w4a4", device="cpu").routed_experts
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in layer.named_parameters()}
    e4m3, fp64 = torch.float8_e4m3fn, torch.float64
    assert shapes == {
        "w13": ((4, 192, 128), torch.uint8), "w13_scale": ((4, 192, 16), e4m3),
        "w2": ((4, 256, 48), torch.uint8), "w2_scale": ((4, 256, 6), e4m3),
        "w13_global_scale": ((4, 2), fp64), "w2_global_scale": ((4, 1), fp64),
        "w13_input_scale": ((4, 2), fp64), "w2_input_scale": ((4, 1), fp64),
    }  # fmt: skip


def test_its_declaration_imports_nothing_heavy():
    code = "import sys, quant_nvfp4.plugin; print('moe_core.emulated' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
