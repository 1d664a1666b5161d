"""Registering in process: what a plugin module must look like, and what it is told when it doesn't.

Discovery of installed packages is tested in tests/packaging with real distributions.
"""

from __future__ import annotations

import types

import pytest

import moe_core
from moe_core import Availability, PluginError, UnsupportedError, hookimpl
from moe_core.plugins import BUILTIN_MODULES, PluginStatus, registry


def module(name="acme", api=(1, 0), **hooks):
    made = types.ModuleType(name)
    if api is not None:
        made.moe_core_api = api
    for hook, function in hooks.items():
        setattr(made, hook, hookimpl(function))
    return made


@pytest.fixture
def register():
    yield moe_core.register_plugin
    for record in moe_core.plugins():
        if record.distribution == "in process":
            moe_core.unregister_plugin(record.name)


def test_a_registered_module_brings_its_backends_and_takes_them_along(register, backend, config):
    factory, capabilities = backend("dispatch", "local")
    made = module(moe_core_register_prepare_finalize=lambda register: register("acme", factory, capabilities))
    record = register(made)
    assert (record.status, record.registers) == (PluginStatus.LOADED, ("dispatch:acme",))
    assert record in moe_core.plugins()
    assert moe_core.plan(config(), dispatch="acme", device="cpu").dispatch.plugin == "in process"
    with pytest.raises(PluginError, match="a plugin named 'acme' is registered already"):
        moe_core.register_plugin(made)
    moe_core.unregister_plugin("acme")
    with pytest.raises(UnsupportedError, match="unknown dispatch 'acme'"):
        moe_core.plan(config(), dispatch="acme", device="cpu")
    register(made)  # and again, as in a notebook whose cell is run twice
    moe_core.unregister_plugin(made)  # by what it was registered as, or by its name
    register(made, "another name")
    moe_core.unregister_plugin(made)
    for unknown in (made, "acme"):
        with pytest.raises(PluginError, match="no plugin 'acme' was registered in this process; registered so: none"):
            moe_core.unregister_plugin(unknown)


def test_a_refused_plugin_leaves_nothing_behind(backend):
    factory, capabilities = backend("dispatch", "local")

    def two(register):
        register("fine", factory, capabilities)
        register("local", factory, capabilities)

    before = (len(moe_core.plugins()), set(registry().dispatch))
    with pytest.raises(
        PluginError,
        match=r"_prepare_finalize: registers dispatch 'local', which moe-core .* has registered already",
    ):
        moe_core.register_plugin(module(moe_core_register_prepare_finalize=two))
    assert (len(moe_core.plugins()), set(registry().dispatch)) == before


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            module(api=(2, 0)),
            r"acme declares moe_core_api = \(2, 0\), .* speaks \(1, 0\); .* --upgrade moe-core \(docs/stability.md\)",
        ),
        (module(api=(1, 99)), r"moe_core_api = \(1, 99\).*pip install --upgrade moe-core"),
        (module(api=(0, 9)), r"moe_core_api = \(0, 9\).*pip install --upgrade"),
        (module(api=None), r"acme does not set moe_core_api; expected a pair of ints such as \(1, 0\)"),
        (
            module(moe_core_register_expert=lambda register: None),
            r"^plugin 'acme': acme defines moe_core_register_expert, .* did you mean moe_core_register_experts\?",
        ),
        (
            module(moe_core_register_experts=lambda register: register("x", print, {})),
            r"experts 'x': capabilities = \{\}; expected a moe_core.ExpertsCapabilities",
        ),
        (
            module(moe_core_register_routers=lambda register: register("", print)),
            r"router: name = ''; expected a str, not empty",
        ),
        (
            module(moe_core_register_routers=lambda register: 1 / 0),
            r"hook moe_core_register_routers raised ZeroDivisionError at .*test_plugins.py:\d+: division",
        ),
    ],
)
def test_a_wrong_plugin_is_told_what_is_wrong(made, message):
    with pytest.raises(PluginError, match=message):
        moe_core.register_plugin(made)
    assert all(record.name != "acme" for record in moe_core.plugins())


def test_a_probe_decides_and_its_reason_is_kept(register, backend, config):
    factory, capabilities = backend("experts", "torch")
    absent = Availability(False, "needs libacme: pip install acme-kernels")
    register(
        module(moe_core_register_experts=lambda register: register("acme", factory, capabilities, lambda: absent, 50))
    )
    plan = moe_core.plan(config(), device="cpu")
    assert plan.ranges[0].candidate.name != "acme"
    assert "experts acme: needs libacme: pip install acme-kernels" in plan.explain()


def test_what_ships_with_the_core_comes_through_the_same_hooks():
    shipped = [record for record in moe_core.plugins() if record.distribution == "moe-core"]
    assert [record.module for record in shipped] == list(BUILTIN_MODULES)
    registered = {entry for record in shipped for entry in record.registers}
    assert {"dispatch:local", "experts:torch", "scheme:unquantized", "router:softmax", "runner:default"} <= registered
