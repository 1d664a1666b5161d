"""What factories of plugins make is looked at wherever one is called: building, planning, explaining, tuning."""

from __future__ import annotations

import re

import pytest
import torch

import moe_core
from moe_core import Availability, Experts, PluginError, Router, UnsupportedError
from moe_core.build import device_of, method_for_checkpoint
from moe_core.cli.plan_details import plan_details
from moe_core.config import Problem, RouterSpec
from moe_core.planner import pair_costs
from moe_core.plugins import registry
from moe_core.tuner import _make


def available():
    return Availability(True)


class Wordy(Experts):
    """Declares its workspaces in a list."""

    def workspace_shapes(self, rows, activation_format):
        return []

    def apply(self, *arguments):
        raise AssertionError("nothing runs here")


WRONG_EXPERTS = [
    (lambda *_: None, "its factory returned None; expected factory(config, parallel, scheme, group, placement) -> "),
    (lambda config: None, "its factory raised TypeError: "),
    (lambda *_: Wordy(), "workspace_shapes(4, standard) returned an object of type list; expected a mapping"),
]
WHO = "experts 'wrong' (in process, moe_core_register_experts): "


@pytest.mark.parametrize(("factory", "says"), WRONG_EXPERTS)
def test_experts_that_a_factory_does_not_make_are_told_by_who_plans_explains_and_tunes(
    config, plugin, backend, factory, says
):
    plugin(experts=("wrong", factory, backend("experts", "torch")[1], available, 99))
    told = re.escape(WHO + says) + r".*docs/api\.md\)$"
    pairs = {(pair.report.dispatch, pair.report.experts): pair
             for pair in pair_costs(Problem(config=config(), device=device_of("cpu")), 4)}  # fmt: skip
    assert pairs["local", "torch"].cost is not None
    pair = pairs["local", "wrong"]
    assert pair.cost is None
    if pair.unusable:
        (broken,) = pair.unusable
        assert broken.reason.startswith(f"not usable: {says}")
        assert broken.reason.endswith("(docs/api.md) (in process, moe_core_register_experts)")
    else:
        (broken,) = pair.broken
        assert re.match(told, f"{broken.candidate}: {broken.reason}")
    assert bool(pair.unusable) is says.startswith("its factory")
    plan = moe_core.plan(config(), experts="wrong", device="cpu")
    (missing,) = plan_details(plan, [4]).missing
    assert re.match(told, missing)
    if not says.startswith("workspace"):
        with pytest.raises(PluginError, match=told):
            _make(plan.ranges[0].candidate, plan)


def test_experts_whose_library_is_not_here_cost_no_workspace(config, plugin, backend):
    def missing(*_):
        raise ImportError("libvendor.so")

    plugin(experts=("absent", missing, backend("experts", "torch")[1]))
    pairs = {pair.report.experts: pair for pair in pair_costs(Problem(config=config(), device=device_of("cpu")), 4)
             if pair.report.dispatch == "local"}  # fmt: skip
    assert pairs["absent"].cost.workspace_bytes is None
    assert pairs["absent"].cost.weight_bytes == pairs["torch"].cost.weight_bytes


def unquantized():
    return registry().find("quant_methods", "unquantized").factory()


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        (lambda: None, "its factory returned None; expected factory()"),
        (lambda scheme: None, "its factory raised TypeError: "),
        (unquantized, "its factory returned a method of scheme QuantScheme(name='unquantized'"),
    ],
)
def test_a_quantization_method(config, plugin, factory, says):
    plugin(quant_method=("acme", factory))
    told = re.escape(f"scheme 'acme' (in process, moe_core_register_quant_methods): {says}")
    with pytest.raises(PluginError, match=rf"^{told}.*docs/api\.md"):
        moe_core.plan(config(), scheme="acme", device="cpu")


def raising(_):
    raise KeyError("bits")


@pytest.mark.parametrize(
    ("claim", "says"),
    [
        (raising, "its from_checkpoint_config raised KeyError: 'bits'; expected a QuantMethod or a reason"),
        (lambda _: None, "its from_checkpoint_config answered None; expected a QuantMethod or a reason"),
    ],
)
def test_who_claims_a_checkpoint_wrongly_keeps_nobody_else_from_it(plugin, claim, says):
    plugin(quant_method=("acme", unquantized, claim))
    with pytest.raises(UnsupportedError, match=re.escape(f"acme (in process): {says} (docs/hooks.md)")):
        method_for_checkpoint({"quant_method": "nobody's"})


class Lacking(Router):
    """Has no `select_experts`."""


def of_users(config):
    return torch.zeros(dict(config.router.params)["size"])


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        (lambda config: None, "its factory returned None; expected factory(config) -> moe_core.Router"),
        (lambda: None, "its factory raised TypeError: "),
        (lambda config: Lacking(), "its factory raised TypeError: Can't instantiate abstract class Lacking"),
    ],
)
def test_a_router(config, build, plugin, factory, says):
    plugin(router=("acme", factory))
    told = re.escape(f"router 'acme' (in process, moe_core_register_routers): {says}")
    with pytest.raises(PluginError, match=rf"^{told}.*docs/api\.md"):
        build(config(router=RouterSpec("acme")))


def test_what_a_router_says_of_its_parameters_is_not_its_plugins_mistake(config, build, plugin):
    plugin(router=("acme", of_users))
    with pytest.raises(TypeError, match="zeros"):
        build(config(router=RouterSpec("acme", params={"size": "three"})))


def test_a_runner(config, plugin):
    plugin(runner=("acme", lambda *_, **__: torch.nn.Identity()))
    told = re.escape("runner 'acme' (in process, moe_core_register_runners): its factory returned an object of type ")
    with pytest.raises(PluginError, match=rf"^{told}Identity; .*-> moe_core\.MoERunnerInterface.*docs/api\.md"):
        moe_core.build_runner(config(), runner="acme", device="cpu")
