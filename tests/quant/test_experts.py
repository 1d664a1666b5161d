"""Packed experts compute what their packed weights say: every scheme, both formats, on a machine without a GPU.

Shape letters: T tokens · H hidden · I intermediate.
"""

from __future__ import annotations

import attrs
import pytest
import torch

from moe_core import ActivationSpec, GateUpLayout, Routing
from moe_core.emulated import dequantize_weights
from moe_core.reference import activation_reference
from tests.quant.conftest import Layer, config_of, expert_tensors, fill, relative, routing_of, tokens_of

WEIGHT_ONLY = ["fp8_weight_only", "nvfp4"]
FP8 = ["fp8_block", "fp8_block_ue8m0", "fp8_tensor", "fp8_tensor_dynamic", "fp8_channel"]
SCHEMES = [*WEIGHT_ONLY, *FP8, "nvfp4_w4a4"]
OAI = ActivationSpec("swiglu_oai", GateUpLayout.INTERLEAVED, limit=7.0, bias=True)


@pytest.mark.parametrize("dispatch", ["local", "batched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_against_fp64_on_the_dequantized_weights(scheme, dtype, dispatch, layer):
    made = layer(scheme, dispatch=dispatch, dtype=dtype)
    bound = 1e-5 if dtype is torch.float32 else 0.006
    bound = bound if scheme in WEIGHT_ONLY else 0.05 if scheme in FP8 else 0.2
    for tokens in (1, 9):
        x, routing = tokens_of(tokens, made.plan.config), routing_of(tokens, made.plan.config)
        assert relative(made(x, routing), made.truth(x, routing)) <= bound


def e4m3(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Written apart from `formats`, for finite values that no scale saturates but the largest."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def emulated_input(x: torch.Tensor, scheme: str, static: float) -> torch.Tensor:
    """What each format makes of `[N, K]` fp32 rows."""
    if scheme.startswith("fp8_block"):
        parts = []
        for part in x.split(128, dim=1):
            scale = part.abs().amax(1, keepdim=True) / 448
            if scheme.endswith("ue8m0"):
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            parts.append(e4m3(part, scale))
        return torch.cat(parts, dim=1)
    scales = {
        "fp8_tensor": torch.tensor(static),
        "fp8_tensor_dynamic": x.abs().amax() / 448,
        "fp8_channel": x.abs().amax(1, keepdim=True) / 448,
    }
    return e4m3(x, scales[scheme])


@pytest.mark.parametrize("dispatch", ["local", "batched"])
@pytest.mark.parametrize("scheme", FP8)
def test_fp8_activations_are_the_formats_own_quantizer(scheme, dispatch, layer):
    made = layer(scheme, dispatch=dispatch)
    config = made.plan.config
    x, routing = tokens_of(12, config), routing_of(12, config)
    weights = dequantize_weights(made.experts.weights, made.plan.scheme.weight)
    expected = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(config.num_experts):
        row, choice = torch.where(routing.topk_ids == expert)
        if not len(row):
            continue
        h = emulated_input(x[row], scheme, 4.0 / 448).double() @ weights.w13[expert].double().T
        act = activation_reference(h.float(), config.activation)
        y = emulated_input(act, scheme, 0.5 / 448).double() @ weights.w2[expert].double().T
        expected.index_add_(0, row, y * routing.topk_weights[row, choice].double().unsqueeze(1))
    # a value on the border between two codes may fall either way after another order of additions
    assert relative(made(x, routing), expected) <= 2e-3
    assert relative(made.truth(x, routing), expected) >= 0.01, "the quantizer does something"


@pytest.mark.parametrize("dispatch", ["local", "batched"])
def test_w4a4_is_bit_by_bit_what_compressed_tensors_makes_of_both_inputs(dispatch, layer, nvfp4_of_the_library):
    made = layer("nvfp4_w4a4", dispatch=dispatch)
    config = made.plan.config
    inverse = {"gate": 672.0, "up": 672.0, "down": 5376.0}
    for expert in range(config.num_experts):
        for name, value in inverse.items():
            made.experts.load_expert(expert, f"{name}_inverse_input_scale", torch.tensor([value]))
    made.experts.pack_weights()
    x, routing = tokens_of(12, config), routing_of(12, config)
    weights = dequantize_weights(made.experts.weights, made.plan.scheme.weight)
    expected = torch.zeros_like(x)
    for expert in range(config.num_experts):
        row, choice = torch.where(routing.topk_ids == expert)
        if not len(row):
            continue
        h = nvfp4_of_the_library(x[row], inverse["up"]) @ weights.w13[expert].T
        act = activation_reference(h, config.activation)
        y = nvfp4_of_the_library(act, inverse["down"]) @ weights.w2[expert].T
        expected.index_add_(0, row, y * routing.topk_weights[row, choice].unsqueeze(1))
    if dispatch == "local":
        assert torch.equal(made(x, routing), expected)
    else:  # the same rows, added up in another order
        assert relative(made(x, routing), expected.double()) <= 1e-6
    assert relative(made.truth(x, routing), expected.double()) >= 0.05, "the quantizer does something"


@pytest.mark.parametrize("dispatch", ["local", "batched"])
@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_channel", "nvfp4", "nvfp4_w4a4"])
@pytest.mark.parametrize(
    "activation",
    [OAI, ActivationSpec("silu", GateUpLayout.UP_GATE), ActivationSpec("relu2", None)],
    ids=["oai", "up_gate", "relu2"],
)
def test_every_layout_of_gate_and_up(activation, scheme, dispatch, layer):
    made = layer(scheme, dispatch=dispatch, activation=activation)
    config = made.plan.config
    x, routing = tokens_of(7, config), routing_of(7, config)
    bound = {"nvfp4": 1e-5, "nvfp4_w4a4": 0.25}.get(scheme, 0.06)
    assert relative(made(x, routing), made.truth(x, routing)) <= bound
    if activation.gated:  # the same experts, stored in another order: the same weights, scale by scale
        plain = layer(scheme, activation=attrs.evolve(activation, gate_up_layout=GateUpLayout.GATE_UP))
        torch.testing.assert_close(made(x, routing), plain(x, routing), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gate_and_up_keep_scales_of_their_own(scheme, layer):
    """Up is 20 times smaller than gate here; under one scale its error would be that of gate."""
    made = layer(scheme)
    spec = made.plan.scheme.weight
    w13 = dequantize_weights(made.experts.weights, spec).w13
    bound = 0.12 if spec.dtype == "float4_e2m1" else 0.04
    for expert, name, tensor in expert_tensors(made.plan.config):
        if name in ("gate", "up"):
            half = w13[expert].chunk(2)[0 if name == "gate" else 1]
            assert relative(half, tensor.double()) <= bound


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_reload_writes_into_the_same_storage_and_a_cache_notices(scheme, layer, monkeypatch):
    backend = "nvfp4_torch_cached" if scheme.startswith("nvfp4") else "fp8_torch_cached"
    cached, other = layer(scheme, experts=backend), layer(scheme, seed=9)
    x, routing = tokens_of(6, cached.plan.config), routing_of(6, cached.plan.config)
    before = cached(x, routing)
    with monkeypatch.context() as nothing:
        nothing.delattr("moe_core.emulated.dequantize_expert")  # nobody unpacks a second time
        assert torch.equal(cached(x, routing), before)
    assert torch.equal(layer(scheme)(x, routing), before)
    addresses = {name: tensor.data_ptr() for name, tensor in cached.experts.named_parameters()}
    fill(cached.experts, seed=9)
    cached.experts.pack_weights()
    assert {name: tensor.data_ptr() for name, tensor in cached.experts.named_parameters()} == addresses
    assert torch.equal(cached(x, routing), other(x, routing))
    assert not torch.equal(other(x, routing), before)


@pytest.mark.parametrize("dispatch", ["local", "batched"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_and_inf_reach_their_own_token_and_no_other(scheme, dispatch, layer):
    made = layer(scheme, dispatch=dispatch)
    config = made.plan.config
    x, ids = tokens_of(6, config), torch.tensor([[0, 1], [2, -1], [-1, -1], [2, 3], [0, 3], [3, 1]])
    clean = made(x, Routing(ids, torch.ones(6, 2)))
    assert bool((clean[2] == 0).all())
    x[1, 5], x[2, 5] = torch.inf, torch.nan  # nobody takes row 2
    got = made(x, Routing(ids, torch.ones(6, 2)))
    assert not bool(got[1].isfinite().any())
    assert bool((got[2] == 0).all())
    if scheme == "fp8_tensor_dynamic":  # one scale for all rows of expert 2: row 3 shares it
        assert not bool(got[3].isfinite().any())
        got[3] = clean[3]
    kept = [0, 3, 4, 5]
    assert torch.equal(got[kept], clean[kept])


@pytest.mark.parametrize("dispatch", ["local", "batched"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_token_at_all_and_no_choice_at_all(scheme, dispatch, layer):
    made = layer(scheme, dispatch=dispatch)
    config = made.plan.config
    assert made(tokens_of(0, config), routing_of(0, config)).shape == (0, config.hidden_size)
    nobody = Routing(torch.full((3, 2), -1), torch.full((3, 2), torch.nan))
    assert torch.equal(made(tokens_of(3, config), nobody), torch.zeros(3, config.hidden_size))


@pytest.mark.parametrize("dispatch", ["local", "batched"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_everywhere_and_weights_of_every_size(scheme, dispatch, layer):
    """A group of zeros has nothing to make a scale of, in the weights, in x and between the GEMMs."""
    made = layer(scheme, dispatch=dispatch)
    config = made.plan.config
    down = torch.randn(208, 176, generator=torch.Generator().manual_seed(5))
    down[:128] *= 1e30
    down[:, :128] = 0
    made.experts.load_expert(0, "down", down)
    made.experts.load_expert(1, "gate", torch.zeros(176, 208))
    made.experts.pack_weights()
    x, ids = tokens_of(60, config), torch.tensor([[0, -1], [1, -1], [2, -1]]).repeat(20, 1)
    x[5] = 0  # by expert 2
    got, truth = (run(x, Routing(ids, torch.ones(60, 2))) for run in (made, made.truth))
    assert bool((got[1::3] == 0).all())
    assert bool((got[5] == 0).all())
    assert bool(got.isfinite().all())
    bound = 1e-5 if scheme in WEIGHT_ONLY else 0.05 if scheme in FP8 else 0.2
    for rows in (slice(0, 128), slice(128, None)):
        if bool(truth[::3, rows].any()):  # under one scale for all, what is 10^30 times smaller is zero
            assert relative(got[::3, rows], truth[::3, rows]) <= bound


@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_tensor", "fp8_channel", "nvfp4", "nvfp4_w4a4"])
def test_weights_stored_wider_than_the_model(scheme, layer):
    """padded_hidden_size: what pads is zero, its scales too, and the result is the same."""
    made, padded = layer(scheme), layer(scheme, padded_hidden_size=256)
    config = made.plan.config
    x, routing = tokens_of(6, config), routing_of(6, config)
    wide = padded(torch.nn.functional.pad(x, (0, 48)), routing)
    assert bool((wide[:, 208:] == 0).all())
    torch.testing.assert_close(wide[:, :208], made(x, routing), atol=1e-4, rtol=1e-4)


def test_gate_and_up_with_different_input_scales_quantize_each_for_itself(layer):
    made = layer("fp8_tensor")
    config = made.plan.config
    for expert in range(config.num_experts):
        made.experts.load_expert(expert, "up_input_scale", torch.tensor(1.0))  # coarse: 448 steps of up to 32
    x, routing = tokens_of(5, config) * 100, Routing(torch.zeros(5, 2, dtype=torch.int64), torch.full((5, 2), 0.5))
    weights = dequantize_weights(made.experts.weights, made.plan.scheme.weight)
    gate, up = weights.w13[0].chunk(2)
    h = torch.cat([e4m3(x, torch.tensor(4.0 / 448)) @ gate.T, e4m3(x, torch.tensor(1.0)) @ up.T], dim=1)
    act = activation_reference(h, config.activation)
    expected = e4m3(act, torch.tensor(0.5 / 448)) @ weights.w2[0].T
    assert relative(made(x, routing), expected.double()) <= 1e-3


def test_a_choice_that_stands_twice_counts_twice_and_weights_on_the_input_count_once(layer):
    made = layer("fp8_channel")
    x = tokens_of(3, made.plan.config)
    twice = Routing(torch.tensor([[1, 1]] * 3), torch.tensor([[0.25, 0.5]] * 3))
    once = Routing(torch.tensor([[1, -1]] * 3), torch.tensor([[0.75, 0.0]] * 3))
    torch.testing.assert_close(made(x, twice), made(x, once))
    on_input = layer("fp8_channel", router_weight_on_input=True, activation=ActivationSpec("relu2", None))
    plain = layer("fp8_channel", activation=ActivationSpec("relu2", None))
    half = Routing(once.topk_ids, torch.tensor([[0.5, 0.0]] * 3))
    # relu² of half is a quarter, and powers of two pass every quantizer of per-token scales unchanged
    quarter = Routing(once.topk_ids, torch.tensor([[0.25, 0.0]] * 3))
    torch.testing.assert_close(on_input(x, half), plain(x, quarter))


def test_a_move_to_the_models_dtype_leaves_packed_weights_as_they_are():
    """`model.to(torch.bfloat16)` converts whatever is floating point, and fp8 and its scales are that too."""
    made = Layer(config_of(dtype=torch.bfloat16), "fp8_block")
    before = {name: tensor.clone() for name, tensor in made.experts.named_parameters()}
    made.experts.to(torch.bfloat16)
    for name, tensor in made.experts.named_parameters():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
