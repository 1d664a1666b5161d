"""The rules that make whole classes of bugs impossible, each with a test that fails when it is broken.

The numbers are those of CONTRIBUTING.md, "Rules". Rules 9 (agreement of ranks), 12 (packed weights) and 15
(collectives) are tested here as far as one process and unquantized weights reach.
"""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest
import torch

import moe_core
from moe_core import (
    ActivationFormat,
    ActivationSpec,
    CapacityError,
    Duty,
    ExpertPlacement,
    Experts,
    MoEError,
    MoEParallelConfig,
    Routing,
    UnsupportedError,
)
from moe_core.plugins import registry
from moe_core.reference import moe_reference

H, E, K = 24, 6, 2
DISPATCHES = ["local", "batched"]


def tokens(count=5, seed=0):
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed))


def routing(ids, weights=None):
    ids = torch.tensor(ids)
    return Routing(ids, torch.rand(ids.shape) if weights is None else torch.tensor(weights))


def truth(runner, x, route):
    return moe_reference(
        x, route.topk_ids, route.topk_weights, runner.routed_experts.weights, runner.plan.config.activation,
        compute_dtype=torch.float64,
    )  # fmt: skip


def run(runner, x, route):
    return runner.kernel(x, route, runner.routed_experts.weights)[0]


def assert_close(got, wanted):
    torch.testing.assert_close(got.double(), wanted.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_rule_1_state_between_stages_is_the_handle(config, build, dispatch):
    """Two micro-batches in flight, combined in either order; nothing is kept on the backend; a handle serves once."""
    runner = build(config(), dispatch=dispatch)
    kernel, weights = runner.kernel, runner.routed_experts.weights
    before = dict(vars(kernel.prepare_finalize))
    batches = [(tokens(n, n), routing([[n % E, (n + 1) % E]] * n)) for n in (3, 4)]
    flights = [kernel.dispatch(x, route) for x, route in batches]
    assert dict(vars(kernel.prepare_finalize)) == before
    outs = [kernel.run_experts(flight, weights) for flight in flights]
    for flight, out, (x, route) in reversed(list(zip(flights, outs, batches, strict=True))):
        kernel.combine(flight, out)()
        assert_close(flight.out, truth(runner, x, route))
    with pytest.raises(MoEError, match="handle"):
        kernel.prepare_finalize.finalize(outs[0], flights[0].dispatched.handle, flights[0].routing, flights[0].out)


def test_rule_1_a_backend_with_one_buffer_is_never_given_two_batches(config, build, plugin, backend):
    plugin(dispatch=("single", *backend("dispatch", "local", max_in_flight=1)))
    runner = build(config(), dispatch="single")
    first = runner.kernel.dispatch(tokens(), routing([[0, 1]] * 5))
    with pytest.raises(MoEError, match="single holds 1 micro-batches in flight and declares max_in_flight = 1"):
        runner.kernel.dispatch(tokens(), routing([[0, 1]] * 5))
    runner.kernel.combine(first, runner.kernel.run_experts(first, runner.routed_experts.weights))()
    runner.kernel.dispatch(tokens(), routing([[0, 1]] * 5))


def test_rule_1_an_exception_releases_what_was_in_flight(config, build, plugin, backend):
    factory, capabilities = backend("dispatch", "local", max_in_flight=1)
    released = []

    class Recording(type(factory(None, None, None, None, None))):
        def release(self, handle):
            released.append(handle)

    class Failing(Experts):
        def __init__(self, inner):
            self.inner, self.fail = inner, True

        def workspace_shapes(self, *arguments):
            return self.inner.workspace_shapes(*arguments)

        def apply(self, *arguments):
            if self.fail:
                raise RuntimeError("kernel died")
            self.inner.apply(*arguments)

    torch_experts, experts = backend("experts", "torch")
    plugin(
        dispatch=("recording", lambda *_: Recording(), capabilities),
        experts=("failing", lambda *arguments: Failing(torch_experts(*arguments)), experts),
    )
    runner = build(config(), dispatch="recording", experts="failing")
    x, logits = tokens(), torch.randn(5, E)
    with pytest.raises(RuntimeError, match="kernel died"):
        runner(x, logits)
    assert len(released) == 1
    runner.kernel.experts[0].fail = False
    assert runner(x, logits).isfinite().all(), "the slot is free again"


def test_rule_1_a_buffer_is_taken_until_the_combine_is_received(config, build, plugin, backend):
    plugin(dispatch=("single", *backend("dispatch", "local", max_in_flight=1)))
    runner = build(config(), dispatch="single")
    flight = runner.kernel.dispatch(tokens(), routing([[0, 1]] * 5))
    receive = runner.kernel.combine(flight, runner.kernel.run_experts(flight, runner.routed_experts.weights))
    with pytest.raises(MoEError, match="in flight"):
        runner.kernel.dispatch(tokens(), routing([[0, 1]] * 5))
    receive()
    runner.kernel.dispatch(tokens(), routing([[0, 1]] * 5))


@pytest.mark.parametrize("where", ["finalize", "debug check", "shared experts"])
def test_rule_1_whatever_fails_the_slot_is_free_again(config, build, plugin, backend, where):
    factory, capabilities = backend("dispatch", "local", max_in_flight=1)
    broken = {"now": True}

    class Faulty(type(factory(None, None, None, None, None))):
        def prepare(self, *arguments, **named):
            dispatched = super().prepare(*arguments, **named)
            return attrs.evolve(dispatched, topk_ids=None) if broken["now"] and where == "debug check" else dispatched

        def finalize(self, *arguments):
            if broken["now"] and where == "finalize":
                raise MoEError("wire cut")
            super().finalize(*arguments)

    class Shared(torch.nn.Module):
        def forward(self, x):
            if broken["now"] and where == "shared experts":
                raise MoEError("no memory")
            return x * 2

    plugin(dispatch=("faulty", lambda *_: Faulty(), capabilities))
    order = moe_core.SharedExpertsOrder.INTERNAL
    c = config(debug=True, has_shared_experts=True, shared_experts_order=order)
    runner = build(c, dispatch="faulty", shared_experts=Shared())
    x, logits = tokens(), torch.randn(5, E)
    with pytest.raises(MoEError, match=r"wire cut|returned topk_ids None|no memory"):
        runner(x, logits)
    broken["now"] = False
    assert runner(x, logits).isfinite().all()


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_rule_2_no_stage_writes_what_it_was_handed(config, build, dispatch, weight_on_input):
    runner = build(config(top_k=1, router_weight_on_input=weight_on_input), dispatch=dispatch)
    x, route = tokens(), routing([[0], [-1], [5], [5], [2]])
    weights = runner.routed_experts.weights
    handed = [x, route.topk_ids, route.topk_weights, weights.w13, weights.w2]
    before = [(tensor._version, tensor.clone()) for tensor in handed]
    run(runner, x, route)
    for tensor, (version, copy) in zip(handed, before, strict=True):
        assert tensor._version == version
        assert tensor.equal(copy)


def test_rule_3_tokens_per_expert_is_int32_per_local_expert(config, build, plugin, backend):
    runner = build(config(), dispatch="batched", parallel=MoEParallelConfig(ep_size=2, ep_rank=1), group=object())
    counts = runner.kernel.dispatch(tokens(), routing([[3, 4], [3, 0], [-1, 5], [3, 1], [2, 0]])).dispatched
    assert counts.tokens_per_expert.dtype == torch.int32
    assert counts.tokens_per_expert.tolist() == [3, 1, 1]
    factory, capabilities = backend("dispatch", "batched")

    class Total(
        type(factory(runner.plan.config, MoEParallelConfig(), runner.plan.scheme, None, ExpertPlacement.LINEAR))
    ):
        def prepare(self, *arguments, **named):
            dispatched = super().prepare(*arguments, **named)
            return attrs.evolve(dispatched, tokens_per_expert=dispatched.tokens_per_expert.sum().view(1))

    plugin(dispatch=("total", lambda c, p, s, g, e: _same(Total, factory, c, p, s, g, e), capabilities))
    wrong = build(config(debug=True), dispatch="total")
    with pytest.raises(MoEError, match=r"'total'.* tokens_per_expert of .*int64; expected \[6\] int32"):
        run(wrong, tokens(), routing([[0, 1]] * 5))


def _same(cls, factory, *arguments):
    made = factory(*arguments)
    made.__class__ = cls
    return made


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_rule_4_minus_one_means_no_expert_and_duplicates_add(config, build, dispatch):
    runner = build(config(), dispatch=dispatch)
    x = tokens()
    x[3] = torch.nan  # a token of no expert may hold anything
    route = routing([[0, -1], [2, 2], [-1, 5], [-1, -1], [4, 0]])
    out = run(runner, x, route)
    assert_close(out, truth(runner, x, route))
    assert out[3].eq(0).all()


@pytest.mark.parametrize("where", ["dispatch", "experts"])
@pytest.mark.parametrize("ep_rank", [0, 1])
def test_rule_4_a_backend_that_cannot_take_minus_one_never_sees_it(config, build, plugin, backend, where, ep_rank):
    seen = []
    name = {"dispatch": "local", "experts": "torch"}[where]
    casts = {"id_dtype": torch.int32} if where == "dispatch" else {}
    factory, capabilities = backend(where, name, accepts_dropped_ids=False, **casts)

    def spy(*arguments):
        made = factory(*arguments)
        method = "prepare" if where == "dispatch" else "apply"
        original = getattr(made, method)

        def watched(first, *rest, **named):
            seen.append(rest[0].topk_ids if where == "dispatch" else first.topk_ids)
            return original(first, *rest, **named)

        setattr(made, method, watched)
        return made

    plugin(**{where: ("picky", spy, capabilities)})
    parallel = MoEParallelConfig(ep_size=2, ep_rank=ep_rank)
    runner = build(config(), parallel=parallel, group=object(), **{where: "picky"})
    plain = build(config(), parallel=parallel, group=object())
    x = tokens()
    x[3] = torch.nan
    route = routing([[0, -1], [2, 5], [-1, 5], [-1, -1], [4, 0]])
    assert_close(run(runner, x, route), run(plain, x, route))
    assert (seen[0] >= 0).all()
    if where == "dispatch":
        assert seen[0].dtype == torch.int32
        assert seen[0][3].tolist() == [3 * ep_rank] * 2, "a row of nothing goes to the caller's first own expert"
        assert seen[0][0].tolist() == [0, 0], "a dropped id goes to the row's first valid one"


def test_rule_4_ids_become_physical_once_with_minus_one_masked(config, build, plugin, backend):
    seen = []
    factory, capabilities = backend(
        "dispatch", "local", needs_round_robin_routing_tables=True, placements=frozenset(ExpertPlacement)
    )

    def spy(*arguments):
        made = factory(*arguments)
        original = made.prepare

        def watched(x, route, **named):
            seen.append((route.topk_ids, named["expert_map"]))
            return original(x, route, **named)

        made.prepare = watched
        return made

    plugin(dispatch=("tables", spy, capabilities))
    c = config(placement=ExpertPlacement.ROUND_ROBIN)
    runner = build(c, dispatch="tables", parallel=MoEParallelConfig(ep_size=2), group=object())
    runner.kernel.dispatch(tokens(2), routing([[0, -1], [3, 4]]))
    ids, expert_map = seen[0]
    assert ids.tolist() == [[0, -1], [4, 2]], "expert e is on rank e mod 2 at e div 2: physical = rank · 3 + local"
    assert expert_map is None, "ids are translated once, not again by a map"


def test_rule_4_debug_mode_checks_ids(config, build, plugin, backend):
    runner = build(config(debug=True))
    with pytest.raises(ValueError, match="topk_ids range from 0 to 6; legal ids are -1 to num_experts - 1 = 5"):
        run(runner, tokens(1), routing([[0, 6]]))
    with pytest.raises(ValueError, match=r"topk_ids has shape \(1, 3\); expected \(T, K\) = \(1, 2\)"):
        run(runner, tokens(1), routing([[0, 1, 2]]))
    plugin(dispatch=("unique", *backend("dispatch", "local", accepts_duplicate_ids=False)))
    with pytest.raises(ValueError, match="holds an id twice, which dispatch unique forbids"):
        run(build(config(debug=True), dispatch="unique"), tokens(1), routing([[3, 3]]))


def test_rule_5_the_core_holds_no_list_of_backends():
    """A word that names a backend of this repository, or a vendor, may stand in the core only where it is made."""
    core = Path(moe_core.__file__).parent
    vendors = r"\b(mori|nixl|deep_?ep|deep_?gemm|moe_batched|batched_mm)\b"
    names = re.compile(rf"{vendors}|(?-i:[\"']batched[\"'])", re.IGNORECASE)  # "BATCHED" is a kernel's constant
    allowed = {"types.py"}  # ActivationFormat.BATCHED's value is a format
    outside = ("integrations", "cli", "testing")
    found = [
        f"{path.relative_to(core)}: {match.group()}"
        for path in core.rglob("*.py")
        if path.name not in allowed and path.relative_to(core).parts[0] not in outside
        for match in names.finditer(path.read_text())
    ]
    assert found == []


def test_rule_6_the_format_is_the_dispatchs_even_against_priority(config, plugin, backend):
    factory, capabilities = backend("experts", "torch")
    standard = attrs.evolve(
        capabilities, owns={ActivationFormat.STANDARD: capabilities.owns[ActivationFormat.STANDARD]}
    )
    plugin(experts=("standard_only", factory, standard, lambda: moe_core.Availability(True), 10_000))
    plan = moe_core.plan(config(), dispatch="batched", device="cpu")
    assert plan.ranges[0].candidate.name != "standard_only"
    report = next(r for r in plan.reports if r.experts == "standard_only")
    assert [r.reason for r in report.rejections] == ["takes standard format, batched delivers batched"]


@pytest.mark.parametrize(
    ("kind", "name", "changes", "duty", "claimed"),
    [
        ("dispatch", "local", {"owns": frozenset({Duty.TOPK_SUM})}, "top-k sum", "finalize of x and experts torch"),
        ("dispatch", "batched", {"owns": frozenset({Duty.TOPK_SUM})}, "router weight", "nobody"),
        ("experts", "torch", {"owns": {ActivationFormat.STANDARD: frozenset()}}, "expert biases", "nobody"),
        (
            "dispatch",
            "local",
            {"owns": frozenset({Duty.ROUTED_SCALING})},
            "routed scaling factor",
            "runner and finalize of x",
        ),
        ("dispatch", "local", {"owns": frozenset({Duty.PADDING})}, "padding", "runner and finalize of x"),
    ],
)
def test_rule_7_every_duty_has_exactly_one_owner(config, plugin, backend, kind, name, changes, duty, claimed):
    plugin(**{kind: ("x", *backend(kind, name, **changes))})
    c = config(activation=ActivationSpec(bias=True), routed_scaling_factor=2.0, padded_hidden_size=32)
    with pytest.raises(UnsupportedError) as caught:
        moe_core.plan(c, device="cpu", **{kind: "x"})
    assert f"{duty} must have one owner, but is claimed by {claimed}" in str(caught.value)


def test_rule_7_the_ledger_of_a_plan_names_each_duty_once(config):
    c = config(
        activation=ActivationSpec(limit=7.0, bias=True),
        routed_scaling_factor=2.0,
        padded_hidden_size=32,
    )
    plan = moe_core.plan(c, dispatch="batched", parallel=MoEParallelConfig(ep_size=2), device="cpu")
    assert {duty.name: owner for duty, owner in plan.owners.items()} == {
        "ROUTER_WEIGHT": "finalize of batched",
        "TOPK_SUM": "finalize of batched",
        "EXPERT_BIAS": "experts torch",
        "ACTIVATION_CLAMP": "experts torch",
        "ROUTED_SCALING": "runner",
        "CROSS_RANK_REDUCE": "runner",
        "PADDING": "runner",
        "UNPADDING": "runner",
    }
    on_input = moe_core.plan(config(top_k=1, router_weight_on_input=True), device="cpu")
    assert on_input.owners[Duty.ROUTER_WEIGHT] == "kernel, on the input"


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_rule_7_a_weight_on_the_input_is_not_applied_again_on_the_output(config, build, dispatch):
    runner = build(config(top_k=1, router_weight_on_input=True), dispatch=dispatch)
    x, route = tokens(), routing([[0], [3], [5], [5], [2]])
    wanted = moe_reference(
        x, route.topk_ids, route.topk_weights, runner.routed_experts.weights, runner.plan.config.activation,
        router_weight_on_input=True, compute_dtype=torch.float64,
    )  # fmt: skip
    assert_close(run(runner, x, route), wanted)


def test_rule_8_a_refusal_carries_every_pair_with_every_reason(config):
    with pytest.raises(UnsupportedError) as caught:
        moe_core.plan(config(), dispatch="batched", device=moe_core.Device("xpu"))
    found = registry()
    assert len(caught.value.rejections) == len(found.experts)
    for report in caught.value.rejections:
        assert {item.candidate for item in report.rejections} >= {"dispatch batched", f"experts {report.experts}"}


def test_rule_9_the_fingerprint_holds_what_ranks_must_agree_on_and_no_more(config):
    def fingerprint(parallel=MoEParallelConfig(ep_size=2), **changes):
        named = {key: changes.pop(key) for key in ("dispatch",) if key in changes}
        return moe_core.plan(config(**changes), parallel=parallel, device="cpu", **named).fingerprint()

    base = fingerprint()
    assert base == fingerprint(parallel=MoEParallelConfig(ep_size=2, ep_rank=1)), "the rank is not in it"
    changed = {
        "dispatch": {"dispatch": "batched"},
        "dtype": {"dtype": torch.bfloat16},
        "top_k": {"top_k": 1},
        "num_experts": {"num_experts": 8},
        "hidden_size": {"hidden_size": 32},
        "intermediate_size": {"intermediate_size": 32},
        "placement": {"placement": ExpertPlacement.ROUND_ROBIN},
        "max_tokens_per_rank": {"max_tokens_per_rank": 64},
        "owners": {"routed_scaling_factor": 2.0},
    }
    for field, change in changed.items():
        assert fingerprint(**change)[field] != base[field]
    assert {"api", "experts", "format", "payload", "scheme", "cuda_graph", "split"} <= set(base)


def test_rule_10_overflow_is_an_error_and_default_capacities_make_it_unreachable(config, build):
    runner = build(config(), dispatch="batched")
    x, route = tokens(9), routing([[4, 4]] * 9)  # everything to one expert
    assert_close(run(runner, x, route), truth(runner, x, route))
    bounded = build(config(max_tokens_per_rank=4), dispatch="batched")
    few = routing([[4, 2]] * 4)
    assert_close(run(bounded, tokens(4), few), truth(bounded, tokens(4), few))
    with pytest.raises(CapacityError, match="9"):
        run(bounded, x, route)
    bounded.check()


def test_rule_11_what_follows_from_the_plan_is_not_stored(config, build):
    runner = build(config())
    stored = {name for name, value in vars(runner).items() if isinstance(value, bool)} - set(vars(torch.nn.Module()))
    assert stored == set(), "flags on the runner go stale when the plan changes"
    assert runner.plan is runner.kernel.plan


def test_rule_12_reload_writes_into_the_same_storage(config, build):
    runner = build(config())
    layer = runner.routed_experts
    addresses = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    x, logits = tokens(), torch.randn(5, E)
    before = runner(x, logits)
    for expert in range(E):
        layer.load_expert(expert, "down", torch.ones(H, 16))
    layer.pack_weights()
    assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == addresses
    assert not torch.equal(runner(x, logits), before)
    assert runner.routed_experts.weights.w2.data_ptr() == addresses["w2"]


def test_rule_13_the_routed_output_is_unpadded_before_anything_is_added(config, build):
    shared = torch.nn.Linear(H, H).requires_grad_(False)
    plain, padded = (
        build(config(padded_hidden_size=p, has_shared_experts=True), shared_experts=shared) for p in (None, 40)
    )
    x, logits = tokens(), torch.randn(5, E)
    assert_close(padded(x, logits), plain(x, logits))
    assert {Duty.PADDING, Duty.UNPADDING} <= set(padded.plan.owners)


def test_rule_14_fp16_carries_the_routed_scale(config, build):
    one, two = (build(config(dtype=torch.float16, routed_scaling_factor=s)) for s in (1.0, 2.0))
    x, logits = tokens().half(), torch.randn(5, E)
    torch.testing.assert_close(two(x, logits), one(x, logits) * 2)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_rule_15_no_tokens_is_a_step_and_the_collective_is_entered(config, build, on_ranks, dispatch):
    def work(group):
        parallel = MoEParallelConfig(ep_size=2, ep_rank=group.rank)
        runner = build(config(), parallel=parallel, group=group, dispatch=dispatch)
        return runner(tokens(0), torch.randn(0, E)), group.calls

    for out, calls in on_ranks(2, work):
        assert tuple(out.shape) == (0, H)
        assert calls == 1
