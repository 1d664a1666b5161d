"""`MoERunner`: the whole layer against the reference, and one test for each bug that others have shipped."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch

import moe_core
from moe_core import (
    ActivationSpec,
    GateUpLayout,
    MoEError,
    MoEParallelConfig,
    QuantScheme,
    RoutedScaling,
    RouterSpec,
    SharedExperts,
    SharedExpertsOrder,
    UnsupportedError,
)
from moe_core.builtin.unquantized import UnquantizedMethod
from moe_core.runner import layer_of

H, E = 24, 6


def inputs(tokens=5, hidden=H, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, hidden, generator=generator).to(dtype), torch.randn(tokens, E, generator=generator)


def linear(rows, columns, seed=7):
    module = torch.nn.Linear(columns, rows, bias=False)
    module.weight.data = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.2
    return module.requires_grad_(False)


def assert_close(got, wanted, dtype=torch.float32):
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got.double(), wanted.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dispatch", ["local", "batched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_routed_output_is_the_references(config, build, routed_truth, dispatch, dtype, tokens):
    runner = build(config(dtype=dtype), dispatch=dispatch)
    x, logits = inputs(tokens, dtype=dtype)
    assert_close(runner(x, logits), routed_truth(runner, x, logits), dtype)


@pytest.mark.parametrize("layout", list(GateUpLayout))
def test_every_gate_up_layout_loads_to_the_same_layer(config, build, layout):
    spec = ActivationSpec("swiglu_oai", layout, limit=0.5, bias=True)
    halves = ActivationSpec("swiglu_oai", GateUpLayout.GATE_UP, limit=0.5, bias=True)
    x, logits = inputs()
    assert_close(build(config(activation=spec))(x, logits), build(config(activation=halves))(x, logits))


def test_leading_dimensions_and_strides_are_free(config, build):
    runner = build(config())
    x, logits = inputs(6)
    flat = runner(x, logits)
    assert_close(runner(x.view(2, 3, H), logits.view(2, 3, E)), flat.view(2, 3, H))
    assert_close(runner(x.t().contiguous().t(), logits), flat)


def test_the_runner_may_hold_the_gate(config, build):
    gate = linear(E, H)
    inside, outside = build(config(), gate=gate), build(config())
    x, _ = inputs()
    assert inside.is_internal_router
    assert not inside.plan.routes_internally, "holding the gate and experts that route are two facts"
    assert_close(inside(x), outside(x, gate(x)))
    with pytest.raises(ValueError, match="holds the gate, so router_logits must be None"):
        inside(x, gate(x))
    with pytest.raises(ValueError, match="router_logits is None, and this runner holds no gate"):
        outside(x)


@pytest.mark.parametrize("order", [None, SharedExpertsOrder.SEQUENTIAL, SharedExpertsOrder.INTERNAL])
def test_shared_experts_are_added_in_every_order(config, build, routed_truth, order):
    shared = linear(H, H)
    runner = build(config(has_shared_experts=True, shared_experts_order=order), shared_experts=shared)
    x, logits = inputs()
    assert_close(runner(x, logits), routed_truth(runner, x, logits) + shared(x))


def test_shared_experts_run_after_the_combine_has_started_in_internal_order(config, build, plugin, backend):
    events = []
    factory, capabilities = backend("dispatch", "local", split=True)

    class Spy(type(factory(None, None, None, None, None))):
        def finalize_start(self, *arguments):
            events.append("start")
            finish = super().finalize_start(*arguments)
            return lambda: (events.append("receive"), finish())[1]

    plugin(dispatch=("spy", lambda *_: Spy(), capabilities))
    runner = build(config(has_shared_experts=True), dispatch="spy", shared_experts=linear(H, H))
    runner.shared_experts.register_forward_hook(lambda *_: events.append("shared"))
    runner(*inputs())
    assert runner.plan.shared_experts_order is SharedExpertsOrder.INTERNAL
    assert events == ["start", "shared", "receive"]


def test_shared_experts_and_config_must_agree(config, build):
    with pytest.raises(ValueError, match=r"has_shared_experts = False, but shared_experts = SharedExperts"):
        build(config(), shared_experts=linear(H, H))


def test_padded_tokens_get_no_expert(config, build, routed_truth):
    runner = build(config(debug=True))
    x, logits = inputs(6)
    x[4:] = torch.nan  # padding may hold anything
    out = runner(x, logits, num_valid_tokens=torch.tensor([4]))
    assert_close(out[:4], routed_truth(runner, x[:4], logits[:4]))
    assert out[4:].eq(0).all()


# Bugs that peers have shipped, one test each.


def test_input_is_not_written(config, build):
    for changes in ({}, {"router_weight_on_input": True, "top_k": 1}, {"router_weight_on_input": True}):
        for dispatch in ("local", "batched"):
            if dispatch == "batched" and changes.get("router_weight_on_input") and "top_k" not in changes:
                continue  # refused, see test_rules
            runner = build(config(has_shared_experts=True, **changes), dispatch=dispatch, shared_experts=linear(H, H))
            x, logits = inputs()
            before = (x._version, x.clone(), logits._version)
            runner(x, logits)
            assert (x._version, logits._version) == (before[0], before[2])
            assert x.equal(before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shared", [False, True])
def test_routed_scale_multiplies_the_routed_output_also_in_fp16_and_without_shared_experts(
    config, build, routed_truth, dtype, shared
):
    module = linear(H, H).to(dtype) if shared else None
    runner = build(config(dtype=dtype, routed_scaling_factor=2.5, has_shared_experts=shared), shared_experts=module)
    x, logits = inputs(dtype=dtype)
    wanted = routed_truth(runner, x, logits) * 2.5
    assert_close(runner(x, logits), wanted + module(x) if shared else wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_inverse_convention_is_had_by_name(config, build, routed_truth, dtype):
    shared = linear(H, H).to(dtype)
    c = config(
        dtype=dtype, routed_scaling_factor=2.5, routed_scaling=RoutedScaling.INVERSE_ON_SHARED, has_shared_experts=True
    )
    runner = build(c, shared_experts=shared)
    x, logits = inputs(dtype=dtype)
    assert_close(runner(x, logits) * 2.5, routed_truth(runner, x, logits) * 2.5 + shared(x), dtype)


def test_a_router_that_carries_the_scale_makes_a_second_owner(config, plugin):
    from moe_core.route import SoftmaxRouter

    class Scaling(SoftmaxRouter):
        owns = frozenset({moe_core.Duty.ROUTED_SCALING})

    plugin(router=("scaling", lambda c: Scaling(c.top_k)))
    c = config(routed_scaling_factor=2.5, router=RouterSpec("scaling"))
    with pytest.raises(UnsupportedError, match=r"routed scaling factor must have one owner.*router scaling"):
        moe_core.build_runner(c, device="cpu")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("padded", [None, 32])
def test_routed_output_is_unpadded_before_the_shared_one_is_added(config, build, routed_truth, shared, padded):
    module = linear(H, H) if shared else None
    runner = build(config(padded_hidden_size=padded, has_shared_experts=shared), shared_experts=module)
    plain = build(config())
    x, logits = inputs()
    assert runner.routed_experts.w13.shape[-1] == (padded or H)
    wanted = routed_truth(plain, x, logits)
    assert_close(runner(x, logits), wanted + module(x) if shared else wanted)


def test_latent_input_goes_to_the_routed_experts_and_the_original_to_the_shared_ones(config, build, routed_truth):
    down, up, shared = linear(H, 40), linear(40, H, seed=8), linear(40, 40, seed=9)
    runner = build(
        config(has_shared_experts=True),
        shared_experts=shared,
        routed_input_transform=down,
        routed_output_transform=up,
    )
    x, logits = inputs(hidden=40)
    wanted = up(routed_truth(runner, down(x), logits).float()) + shared(x)
    assert_close(runner(x, logits), wanted)
    other = torch.randn(5, 40)
    assert_close(runner(x, logits, shared_experts_input=other), wanted - shared(x) + shared(other))


@pytest.mark.parametrize("shared", [None, "partial", "whole"])
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("kind", ["tp", "ep"])
def test_the_sum_over_ranks_happens_exactly_once(config, build, on_ranks, shared, transform, kind):
    module = linear(H, H)
    out = torch.nn.Sequential(linear(H, H, seed=3), torch.nn.Tanh()) if transform else None  # does not commute with +
    c = config(
        has_shared_experts=shared is not None,
        routed_scaling_factor=1.5,
        activation=ActivationSpec(bias=True),
    )
    x, logits = inputs(7)
    single = build(c, shared_experts=module if shared else None, routed_output_transform=out)(x, logits)

    def work(group):
        parallel = MoEParallelConfig(**{f"{kind}_size": 2, f"{kind}_rank": group.rank})
        experts = None
        if shared:
            partial = linear(H, H)
            if shared == "partial":
                partial.weight.data = module.weight / 2
            experts = SharedExperts(partial, output_is_partial=shared == "partial")
        runner = build(c, parallel=parallel, group=group, shared_experts=experts, routed_output_transform=out)
        assert not runner.plan.output_is_reduced
        return runner(x, logits), group.calls

    for result, calls in on_ranks(2, work):
        assert_close(result, single)
        assert calls == (2 if shared == "partial" and transform else 1)


def test_ranks_without_a_group_are_refused(config):
    with pytest.raises(MoEError, match="spread over 2 ranks, and group is None"):
        moe_core.build_runner(config(), parallel=MoEParallelConfig(tp_size=2), device="cpu")


class OtherScheme(UnquantizedMethod):
    scheme = QuantScheme("other")


def test_nothing_cached_survives_a_replaced_quantization_method(config, build, plugin, backend):
    """The reduced flag of the first plan must not decide for the second."""
    local, plain = backend("dispatch", "local")
    schemes = frozenset({"unquantized", "other"})
    torch_experts, experts = backend("experts", "torch", schemes=schemes)
    refusing = backend(
        "dispatch", "local", output_reduced=True, refuse=lambda p: "no" if p.scheme.name == "other" else None
    )
    plugin(
        "reduced",
        dispatch=("reduced", local, refusing[1], lambda: moe_core.Availability(True), 9),
        experts=("both", torch_experts, experts, lambda: moe_core.Availability(True), 9),
        quant_method=("other", OtherScheme),
    )

    class Group:
        rank, size, calls = 0, 2, 0

        def all_reduce(self, tensor):
            Group.calls += 1
            return tensor

    runner = build(config(), parallel=MoEParallelConfig(ep_size=2), group=Group())
    x, logits = inputs()
    assert (runner.plan.dispatch.name, runner.plan.output_is_reduced) == ("reduced", True)
    runner(x, logits)
    assert Group.calls == 0
    old = runner.routed_experts
    runner.replace_quant_method(OtherScheme())
    assert (runner.plan.dispatch.name, runner.plan.output_is_reduced) == ("local", False)
    assert runner.plan.scheme.name == "other"
    assert runner.routed_experts is not old
    runner(x, logits)
    assert Group.calls == 1
    del plain


# Being a module.


def test_a_copy_and_a_pickle_are_layers_of_their_own(config, build):
    runner = build(config(has_shared_experts=True), shared_experts=linear(H, H))
    x, logits = inputs()
    wanted = runner(x, logits)
    for other in (copy.deepcopy(runner), pickle.loads(pickle.dumps(runner))):
        assert other._layer_key != runner._layer_key
        assert layer_of(other._layer_key) is other
        assert_close(other(x, logits), wanted)
        other.routed_experts.w2.zero_()
        assert not torch.equal(other(x, logits), wanted)
    assert_close(runner(x, logits), wanted)


def test_a_dead_key_is_named(config, build):
    key = build(config())._layer_key
    gc.collect()
    with pytest.raises(MoEError, match=f"layer '{key}', which does not exist any more"):
        layer_of(key)


def test_weights_move_and_save_with_the_module(config, build):
    runner, other = build(config()), build(config(), seed=5)
    x, logits = inputs()
    other.load_state_dict(runner.state_dict())
    assert_close(other(x, logits), runner(x, logits))
    assert set(runner.state_dict()) == {"routed_experts.w13", "routed_experts.w2"}


def test_wrong_logits_and_dtypes_are_named(config, build):
    runner = build(config())
    x, logits = inputs(3)
    for wrong in (logits[:2], logits[:, :4], torch.randn(3, E + 1)):
        with pytest.raises(ValueError, match=r"router_logits have shape .*; expected \(T, E\) = \(3, 6\)"):
            runner(x, wrong)
    with pytest.raises(ValueError, match=r"hidden_states are torch.float16; this layer is built for dtype"):
        runner(x.half(), logits)


def test_a_wrong_hidden_size_is_named(config, build):
    with pytest.raises(ValueError, match="hidden_states have H = 20; this layer has hidden_size = 24"):
        build(config())(torch.randn(3, 20), torch.randn(3, E))
