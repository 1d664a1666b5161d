"""A layer whose plan reads the kernels' layout, on a machine without a GPU: load, pack, reload, export, save."""

from __future__ import annotations

import copy

import pytest
import torch

import moe_core
from moe_core import Device, MoEConfig, UnsupportedError
from moe_core.config import ActivationSpec
from moe_core.emulated import EmulatedExperts, dequantize_weights
from moe_core.errors import CheckpointError
from moe_core.routed_experts import RoutedExperts
from moe_core.types import Dispatched, GateUpLayout
from quant_nvfp4.method import Nvfp4Method
from quant_nvfp4.schemes import MMA_LAYOUT, NVFP4

H100 = Device("cuda", (9, 0), "a GPU that is not here")
WEIGHTS = ("w13", "w13_scale", "w2", "w2_scale")


def config_of(**changes):
    sizes = {"num_experts": 3, "top_k": 2, "hidden_size": 128, "intermediate_size": 64, "dtype": torch.bfloat16}
    return MoEConfig(**{**sizes, **changes})


def layer(device=H100, seed=0, **changes):
    """A layer that is planned for `device`, with its weights on the CPU, loaded and not packed."""
    plan = moe_core.plan(config_of(**changes), scheme="nvfp4", device=device)
    experts = RoutedExperts(plan, Nvfp4Method(NVFP4), torch.device("cpu"))
    load(experts, seed)
    return experts


def load(experts, seed=0, only=None):
    generator = torch.Generator().manual_seed(seed)
    config = experts.config
    inner, hidden = config.intermediate_size, config.hidden_size
    names = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    for expert in range(config.num_experts):
        for name, shape in names.items():
            tensor = torch.randn(shape, generator=generator)
            if (only is None or (expert, name) == only) and (name != "gate" or config.activation.gated):
                experts.load_expert(expert, name, tensor)


def data(experts):
    return {name: getattr(experts, name).data.view(torch.uint8).clone() for name in WEIGHTS}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in WEIGHTS)


SPECS = {
    "gate_up": ActivationSpec(),
    "up_gate": ActivationSpec("gelu", GateUpLayout.UP_GATE),
    "interleaved": ActivationSpec("swiglu_oai", GateUpLayout.INTERLEAVED, limit=7.0, bias=True),
    "ungated": ActivationSpec("relu2", None),
}


@pytest.mark.parametrize("spec", SPECS)
def test_packing_stays_in_place_and_the_bytes_come_back(spec):
    experts = layer(activation=SPECS[spec])
    loaded, addresses = data(experts), {name: getattr(experts, name).data_ptr() for name in WEIGHTS}
    experts.pack_weights()
    packed = data(experts)
    assert not same(packed, loaded)
    experts.pack_weights()
    assert same(data(experts), packed), "packing twice is packing once"
    experts.unpack_weights()
    assert same(data(experts), loaded)
    assert experts.weights.layout is None
    assert {name: getattr(experts, name).data_ptr() for name in WEIGHTS} == addresses


@pytest.mark.parametrize("spec", SPECS)
def test_a_reload_of_one_tensor_repacks_its_expert_alone(spec):
    experts, other = layer(activation=SPECS[spec]), layer(activation=SPECS[spec])
    experts.pack_weights()
    load(experts, seed=7, only=(1, "up"))
    assert experts.packed_experts == {0, 2}
    experts.pack_weights()
    load(other, seed=7, only=(1, "up"))
    other.pack_weights()
    assert same(data(experts), data(other))


@pytest.mark.parametrize("spec", SPECS)
def test_the_emulation_reads_the_packed_layout_too(spec):
    experts = layer(activation=SPECS[spec])
    before = dequantize_weights(experts.weights, NVFP4.weight)
    x, ids = torch.randn(5, 128, dtype=torch.bfloat16), torch.tensor([[0, 1], [2, -1], [1, 1], [0, 2], [-1, -1]])
    dispatched = Dispatched(x, None, topk_ids=ids, topk_weights=torch.rand(5, 2))
    outs = []
    for _ in range(2):
        out = torch.empty_like(x)
        EmulatedExperts(experts.config, NVFP4).apply(dispatched, experts.weights, {}, out)
        outs.append(out)
        experts.pack_weights()
    assert experts.weights.layout is not None
    assert torch.equal(*outs)
    after = dequantize_weights(experts.weights, NVFP4.weight)
    assert torch.equal(after.w13, before.w13)
    assert torch.equal(after.w2, before.w2)


def test_saved_bytes_know_their_layout():
    experts = layer()
    plain = experts.state_dict()
    assert set(plain) == {name for name, _ in experts.named_parameters()}
    plain = {name: tensor.clone() for name, tensor in plain.items()}
    experts.pack_weights()
    packed, bytes_ = copy.deepcopy(experts.state_dict()), data(experts)
    fresh = layer(seed=3)
    fresh.load_state_dict(packed)
    assert fresh.packed_experts == {0, 1, 2}
    fresh.pack_weights()
    assert same(data(fresh), bytes_)
    fresh.load_state_dict(plain)
    assert not fresh.packed_experts
    fresh.pack_weights()
    assert same(data(fresh), bytes_)
    with pytest.raises(CheckpointError, match=f"{MMA_LAYOUT}.*unpack_weights"):
        layer(device="cpu").load_state_dict(packed)


def test_a_scale_that_the_layout_cannot_hold_is_refused():
    experts = layer()
    experts.w2_scale.data.view(torch.uint8)[1, 0, 0] = 0x90
    with pytest.raises(CheckpointError, match=r"local expert 1.*negative"):
        experts.pack_weights()


@pytest.mark.parametrize("dispatch", ["local", "batched"])
def test_the_kernels_are_chosen_on_a_gpu_without_being_asked(dispatch):
    plan = moe_core.plan(config_of(cuda_graph=True, max_tokens_per_rank=8), scheme="nvfp4", device=H100,
                         dispatch=dispatch)  # fmt: skip
    assert [r.candidate.name for r in plan.ranges] == ["nvfp4_triton"]
    assert plan.weight_layout == MMA_LAYOUT


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({"hidden_size": 144}, H100, "64"),
        ({"intermediate_size": 96}, H100, "64"),
        ({"dtype": torch.float16}, H100, "float16"),
        ({}, Device("cuda", (7, 5), "an old GPU"), r"\(8, 0\)|8\.0"),
        ({}, "cpu", "cpu"),
    ],
)
def test_what_they_cannot_run_is_refused_with_a_reason_and_emulated(changes, device, reason):
    with pytest.raises(UnsupportedError, match=reason):
        moe_core.plan(config_of(**changes), scheme="nvfp4", device=device, experts="nvfp4_triton")
    plan = moe_core.plan(config_of(**changes), scheme="nvfp4", device=device)
    assert plan.ranges[0].candidate.name == "nvfp4_torch"
    assert plan.weight_layout == "canonical"
