"""`MoEKernel`: workspaces, ranges of row bounds, and the contract that debug mode holds backends to."""

from __future__ import annotations

import re

import attrs
import pytest
import torch

from moe_core import MoEError, PluginError, Routing
from moe_core.interfaces import Experts

H, E = 24, 6


def step(runner, rows):
    ids = torch.arange(rows * 2).view(rows, 2) % E
    return runner.kernel(torch.randn(rows, H), Routing(ids, torch.rand(rows, 2)), runner.routed_experts.weights)[0]


class Probe(Experts):
    """Writes its own number, and looks at what it was given."""

    def __init__(self, number, shapes=None):
        self.number, self.shapes, self.seen = number, shapes or {}, []

    def workspace_shapes(self, rows, activation_format):
        return {name: ((rows, *shape), dtype) for name, (shape, dtype) in self.shapes.items()}

    def apply(self, dispatched, weights, workspaces, out):
        self.seen.append(workspaces)
        out.fill_(self.number)


def register(plugin, backend, **experts):
    _, capabilities = backend("experts", "torch")
    for name, (made, priority) in experts.items():
        plugin(name, experts=(name, lambda *_, made=made: made, capabilities, lambda: _ok(), priority))


def _ok():
    from moe_core import Availability

    return Availability(True)


def test_the_experts_are_chosen_by_the_row_bound(config, build, plugin, backend):
    register(plugin, backend, few=(Probe(1.0), ((0, 1000), (4, 10))), many=(Probe(2.0), ((0, 10), (4, 1000))))
    runner = build(config())
    assert [(r.first_row, r.candidate.name) for r in runner.plan.ranges] == [(0, "few"), (4, "many")]
    assert [step(runner, rows)[0, 0].item() for rows in (1, 3, 4, 9)] == [1, 1, 2, 2]


def test_workspaces_are_carved_exactly_from_one_aligned_allocation(config, build, plugin, backend):
    probe = Probe(0.0, {"a": ((3,), torch.float32), "b": ((), torch.int32), "c": ((5, 2), torch.bfloat16)})
    register(plugin, backend, probe=(probe, 1000))
    runner = build(config())
    step(runner, 7)
    spaces = probe.seen[0]
    assert {name: (tuple(t.shape), t.dtype) for name, t in spaces.items()} == {
        "a": ((7, 3), torch.float32),
        "b": ((7,), torch.int32),
        "c": ((7, 5, 2), torch.bfloat16),
    }
    assert len({t.untyped_storage().data_ptr() for t in spaces.values()}) == 1
    assert all(t.storage_offset() * t.element_size() % 256 == 0 for t in spaces.values())
    assert runner.kernel.workspace_bytes(7) == spaces["a"].untyped_storage().nbytes()
    for tensor in spaces.values():
        tensor.fill_(-1)
    assert all(t.eq(-1).all() for t in spaces.values()), "they do not overlap"


def test_experts_get_contiguous_ids_and_weights_whatever_the_dispatch_hands_over(config, build, plugin, backend):
    class Seeing(Probe):
        def apply(self, dispatched, weights, workspaces, out):
            super().apply(dispatched, weights, workspaces, out)
            self.seen.append(dispatched)

    factory, capabilities = backend("dispatch", "local")
    seeing = Seeing(0.0)

    def strided(*arguments):
        inner = factory(*arguments)
        prepare = inner.prepare

        def wide(*args, **kwargs):
            made = prepare(*args, **kwargs)
            ids, weights = (torch.stack([t, t], dim=2)[..., 0] for t in (made.topk_ids, made.topk_weights))
            return attrs.evolve(made, topk_ids=ids, topk_weights=weights)

        inner.prepare = wide
        return inner

    plugin("strided", dispatch=("strided", strided, capabilities, _ok, 1000))
    register(plugin, backend, seeing=(seeing, 1000))
    runner = build(config())
    step(runner, 4)
    dispatched = seeing.seen[-1]
    assert runner.plan.dispatch.name == "strided"
    assert dispatched.topk_ids.is_contiguous()
    assert dispatched.topk_weights.is_contiguous()
    assert dispatched.topk_ids.tolist() == (torch.arange(8).view(4, 2) % E).tolist()


def test_experts_are_not_called_without_rows(config, build, plugin, backend):
    probe = Probe(3.0)
    register(plugin, backend, probe=(probe, 1000))
    assert tuple(step(build(config()), 0).shape) == (0, H)
    assert probe.seen == []


ILL_FORMED = {
    "a tuple": (lambda d: (d.x, d.topk_ids), "an object of type tuple; expected a moe_core.Dispatched (docs/api.md)"),
    "no x": (lambda d: attrs.evolve(d, x=None), "x None; expected [R, 24] float32"),
    "a column too few": (lambda d: attrs.evolve(d, x=d.x[:, 1:]), "x of shape (3, 23), float32; expected [R, 24]"),
    "another dtype": (lambda d: attrs.evolve(d, x=d.x.double()), "x of shape (3, 24), float64; expected [R, 24]"),
    "strides in H": (lambda d: attrs.evolve(d, x=d.x.t().contiguous().t()), "x of strides (1, 3); expected unit"),
    "no ids": (lambda d: attrs.evolve(d, topk_ids=None), "topk_ids None; expected [3, K] int32 or int64"),
    "flat ids": (
        lambda d: attrs.evolve(d, topk_ids=d.topk_ids[:, 0]),
        "topk_ids of shape (3,), int64; expected [3, K]",
    ),
    "weights in bf16": (
        lambda d: attrs.evolve(d, topk_weights=d.topk_weights.bfloat16()),
        "topk_weights of shape (3, 2), bfloat16; expected [3, 2] float32 (Dispatched.topk_weights, docs/api.md)",
    ),
    "num_rows of the host": (lambda d: attrs.evolve(d, num_rows=3), "num_rows of type int; expected [1] int32"),
    "scales of nothing": (
        lambda d: attrs.evolve(d, x_scale=d.x),
        "x_scale of shape (3, 24), float32; expected None with payload",
    ),
}


@pytest.mark.parametrize(("broken", "message"), ILL_FORMED.values(), ids=ILL_FORMED)
def test_debug_mode_holds_a_dispatch_to_the_contract(config, build, plugin, backend, broken, message):
    factory, capabilities = backend("dispatch", "local")

    def make(*arguments):
        made = factory(*arguments)
        original = made.prepare
        made.prepare = lambda *a, **k: broken(original(*a, **k))
        return made

    plugin(dispatch=("broken", make, capabilities))
    with pytest.raises(MoEError, match=rf"dispatch 'broken' \(.*\): prepare returned {re.escape(message)}"):
        step(build(config(debug=True), dispatch="broken"), 3)


def test_debug_mode_tells_experts_that_return_what_they_should_write(config, build, plugin, backend):
    factory, capabilities = backend("experts", "torch")

    def make(*arguments):
        made = factory(*arguments)
        made.apply = lambda dispatched, *_: dispatched.x * 2
        return made

    plugin(experts=("returning", make, capabilities))
    with pytest.raises(
        MoEError, match=r"experts 'returning' .*: apply returned a Tensor; .*in out \(Experts.apply, docs"
    ):
        step(build(config(debug=True), experts="returning"), 3)


class Lacking(Experts):
    """Has no `apply`."""

    def workspace_shapes(self, rows, activation_format):
        return {}


class Declaring(Probe):
    """Experts with these workspaces."""

    def __init__(self, shapes):
        super().__init__(1.0)
        self.shapes = shapes

    def workspace_shapes(self, rows, activation_format):
        return self.shapes


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda *_: None, "its factory returned None; expected factory(config, parallel, scheme, group, placement)"),
        (lambda *_: object(), "its factory returned an object of type object; expected factory("),
        (lambda config: Probe(1.0), "its factory raised TypeError: "),
        (lambda *_: Lacking(), "its factory raised TypeError: Can't instantiate abstract class Lacking"),
        (lambda *_: Declaring([]), "workspace_shapes(1, standard) returned an object of type list; expected a mapping"),
        (lambda *_: Declaring({"h": (1, 3)}), "workspace_shapes(1, standard) declares 'h' as (1, 3); expected"),
    ],
)
def test_what_a_factory_makes_is_looked_at_when_a_layer_is_built(config, build, plugin, backend, factory, message):
    plugin(experts=("wrong", factory, backend("experts", "torch")[1]))
    hook = "moe_core_register_experts"
    with pytest.raises(
        PluginError, match=rf"^experts 'wrong' \(in process, {hook}\): {re.escape(message)}.*docs/api.md"
    ):
        build(config(), experts="wrong")


def test_a_dispatch_that_a_factory_does_not_make_is_told_too(config, build, plugin, backend):
    plugin(dispatch=("wrong", lambda *_: None, backend("dispatch", "local")[1]))
    with pytest.raises(PluginError, match=r"dispatch 'wrong' .* returned None; .*-> moe_core.PrepareAndFinalize"):
        build(config(), dispatch="wrong")


class RoutesItself(Experts):
    """Takes logits: the best expert's own number, once per token."""

    def workspace_shapes(self, rows, activation_format):
        return {"best": ((rows,), torch.int64)}

    def apply(self, *arguments):
        raise AssertionError("experts that route internally are given logits")

    def apply_from_logits(self, hidden_states, router_logits, weights, workspaces, out):
        workspaces["best"].copy_(router_logits.argmax(1))
        out.copy_(workspaces["best"].unsqueeze(1).expand_as(out))


def test_experts_that_route_by_themselves_are_given_logits(config, build, plugin, backend):
    _, capabilities = backend("experts", "torch", routes_internally=True)
    plugin(experts=("oracle", lambda *_: RoutesItself(), capabilities, _ok, 1000))
    runner = build(config(has_shared_experts=True), shared_experts=torch.nn.Identity())
    assert runner.plan.routes_internally
    assert not runner.is_internal_router
    x, logits = torch.randn(4, H), torch.randn(4, E)
    wanted = x + logits.argmax(1, keepdim=True)
    torch.testing.assert_close(runner(x, logits), wanted)
    padded = runner(x, logits, num_valid_tokens=torch.tensor([2]))
    torch.testing.assert_close(padded, torch.cat([wanted[:2], x[2:]]))
