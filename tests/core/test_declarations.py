"""What a plugin declares wrongly is told to its author by name, and harms no layer that runs without it."""

from __future__ import annotations

import importlib.util
import re
import types

import attrs
import pytest
import torch

import moe_core
from moe_core import (
    ActivationFormat,
    Availability,
    DispatchCapabilities,
    Duty,
    ExpertsCapabilities,
    GateUpLayout,
    PluginError,
    UnsupportedError,
    hookimpl,
)
from moe_core.answers import footprint_of, probed, refusal
from moe_core.build import device_of
from moe_core.config import Problem
from moe_core.planner import pair_costs
from moe_core.plugins import registry
from moe_core.types import MODEL_DTYPE_PAYLOAD

NEEDED = {
    DispatchCapabilities: {
        "activation_format": ActivationFormat.STANDARD,
        "dtypes": frozenset({torch.float32}),
        "device_types": frozenset({"cpu"}),
    },
    ExpertsCapabilities: {
        "owns": {ActivationFormat.STANDARD: frozenset({Duty.TOPK_SUM})},
        "dtypes": frozenset({torch.float32}),
        "device_types": frozenset({"cpu"}),
        "activations": frozenset({"silu"}),
    },
}

NOT_A_SET = [torch.float32, {"float32"}, [torch.float32], frozenset(), None]
NOT_NAMES = ["cpu", frozenset(), frozenset({1}), ["cpu"], frozenset({""})]
NOT_A_FLAG = ["no", None, 1]
NOT_A_COUNT = ["16", 0, -1, 1.0, True]
NOT_A_LIMIT = ["all", 0, True, 2.5]

WRONG = [
    (DispatchCapabilities, "activation_format", ["standard", None]),
    (DispatchCapabilities, "dtypes", NOT_A_SET),
    (DispatchCapabilities, "device_types", NOT_NAMES),
    (DispatchCapabilities, "payloads", NOT_NAMES),
    (DispatchCapabilities, "owns", [[Duty.TOPK_SUM], frozenset({"top-k sum"}), {Duty.TOPK_SUM: 1}.values()]),
    (DispatchCapabilities, "id_dtype", [torch.float32, "int32", torch.bool]),
    (DispatchCapabilities, "placements", [frozenset({"linear"}), frozenset()]),
    (DispatchCapabilities, "carries_tokens", NOT_A_FLAG),
    (DispatchCapabilities, "min_ep_size", NOT_A_COUNT),
    (DispatchCapabilities, "max_ep_size", NOT_A_LIMIT),
    (DispatchCapabilities, "max_in_flight", NOT_A_LIMIT),
    (DispatchCapabilities, "max_topk", NOT_A_LIMIT),
    (DispatchCapabilities, "hidden_sizes", [64, frozenset({"64"}), frozenset({0}), [64]]),
    (DispatchCapabilities, "min_compute_capability", [9, (9,), "9.0", (9.0, 0)]),
    (DispatchCapabilities, "refuse", ["no", True]),
    (DispatchCapabilities, "footprint", [12]),
    (ExpertsCapabilities, "owns", [frozenset({Duty.TOPK_SUM}), {"standard": frozenset()}]),
    (ExpertsCapabilities, "owns", [{ActivationFormat.BATCHED: [Duty.TOPK_SUM]}]),
    (ExpertsCapabilities, "activations", ["silu", frozenset({"sliu"}), frozenset()]),
    (ExpertsCapabilities, "gate_up_layouts", [{"gate_up"}, GateUpLayout.GATE_UP]),
    (ExpertsCapabilities, "schemes", NOT_NAMES),
    (ExpertsCapabilities, "weight_layout", ["mine", {"unquantized": 1}]),
    (ExpertsCapabilities, "hidden_alignment", NOT_A_COUNT),
    (ExpertsCapabilities, "intermediate_alignment", NOT_A_COUNT),
]  # fmt: skip


@pytest.mark.parametrize(
    ("record", "field", "value"),
    [(record, field, value) for record, field, values in WRONG for value in values],
    ids=lambda item: item.__name__ if isinstance(item, type) else None,
)
def test_a_wrong_field_is_told_where_it_is_written(record, field, value):
    start = re.escape(f"{record.__name__}.{field} = {value!r}; expected ")
    with pytest.raises(ValueError, match=rf"^{start}.* \(docs/capabilities\.md\)$"):
        record(**{**NEEDED[record], field: value})


@pytest.mark.parametrize("record", NEEDED)
def test_every_field_is_checked_and_defaults_are_right(record):
    made = record(**NEEDED[record])
    attrs.validate(made)
    nonsense = object()
    for field in attrs.fields(record):
        with pytest.raises(ValueError, match=f"{field.name} = <object"):
            attrs.evolve(made, **{field.name: nonsense})


def test_an_availability_is_a_flag_and_a_reason():
    with pytest.raises(ValueError, match=r"Availability.ok = 'yes'; expected True or False"):
        Availability("yes")
    with pytest.raises(ValueError, match=r"Availability.reason = None; expected a str"):
        Availability(False, None)


def broken(answer):
    """A function that answers that, whatever it is asked, or raises it."""

    def function(*_):
        if isinstance(answer, Exception):
            raise answer
        return answer

    return function


PROBES = [
    (True, "its probe (in process) answered True; expected an Availability (docs/hooks.md)"),
    (None, "its probe (in process) answered None; expected an Availability (docs/hooks.md)"),
    (OSError("no driver"), "its probe raised OSError: no driver"),
]
REFUSALS = [
    (True, "its refuse (in process) answered True; expected None or a reason (docs/capabilities.md)"),
    ("", "its refuse (in process) answered ''; expected None or a reason (docs/capabilities.md)"),
    (KeyError("x"), "its refuse (in process) raised KeyError: 'x'; expected None or a reason (docs/capabilities.md)"),
    ("H = 24 is odd to me", "H = 24 is odd to me"),
]


@pytest.mark.parametrize(
    ("kind", "base", "probe", "refuse", "reason"),
    [(kind, base, broken(answer), None, reason)
     for kind, base in (("dispatch", "local"), ("experts", "torch")) for answer, reason in PROBES]
    + [(kind, base, broken(Availability(True)), broken(answer), reason)
       for kind, base in (("dispatch", "local"), ("experts", "torch")) for answer, reason in REFUSALS],
)  # fmt: skip
def test_a_wrong_answer_rejects_its_backend_and_no_other(config, plugin, backend, kind, base, probe, refuse, reason):
    plugin(**{kind: ("broken", *backend(kind, base, refuse=refuse), probe, 1000)})
    layer = moe_core.build_runner(config(), device="cpu")
    assert "broken" not in (layer.plan.dispatch.name, layer.plan.ranges[0].candidate.name)
    told = {item.reason for report in layer.plan.reports for item in report.rejections}
    assert reason in told
    with pytest.raises(UnsupportedError, match=re.escape(f"{kind} broken: {reason}")):
        moe_core.plan(config(), device="cpu", **{kind: "broken"})


@pytest.mark.parametrize(
    ("answer", "says"),
    [(ValueError("odd T"), "raised ValueError: odd T"), (12, "answered 12"), (None, "answered None")],
)
def test_a_broken_footprint_costs_its_own_pairs_only(config, plugin, backend, answer, says):
    plugin(dispatch=("broken", *backend("dispatch", "local", footprint=broken(answer)), broken(Availability(True)), -9))
    reason = f"its footprint (in process) {says} at T = 4; expected a DispatchFootprint (docs/plan.md)"
    costs = {pair.report.dispatch: pair for pair in pair_costs(Problem(config=config(), device=device_of("cpu")), 4)
             if pair.report.experts == "torch"}  # fmt: skip
    assert costs["local"].cost is not None
    assert costs["broken"].cost is None
    assert reason in {item.reason for item in costs["broken"].report.rejections}
    with pytest.raises(PluginError, match=re.escape(f"dispatch broken: {reason}")):
        footprint_of(registry().find("dispatch", "broken"), Problem(config=config()), MODEL_DTYPE_PAYLOAD, 4)


def test_right_answers_pass_unchanged(config):
    local, problem = registry().find("dispatch", "local"), Problem(config=config())
    assert probed(local).availability == Availability(True)
    assert refusal(local, problem) is None
    assert footprint_of(local, problem, MODEL_DTYPE_PAYLOAD, 5).rows == 5
    silent = attrs.evolve(local, capabilities=attrs.evolve(local.capabilities, footprint=None))
    assert footprint_of(silent, problem, MODEL_DTYPE_PAYLOAD, 5) is None


def factory(*_):
    raise AssertionError("a listing builds nothing")


DISPATCH, EXPERTS = (record(**needed) for record, needed in NEEDED.items())
IN_DISPATCH, IN_EXPERTS = "moe_core_register_prepare_finalize", "moe_core_register_experts"
IN_SCHEMES = "moe_core_register_quant_methods"
INT_OR_RANGES = r"an int, or \(\(first_row, priority\), …\) with rising rows"


WRONG_ARGUMENTS = [
    (IN_DISPATCH, ("x", None, DISPATCH), r"dispatch 'x': factory = None; expected a function"),
    (
        IN_DISPATCH,
        ("x", factory, EXPERTS),
        r"dispatch 'x': capabilities = .*…; expected a moe_core.DispatchCapabilities",
    ),
    (IN_DISPATCH, ("x", factory, DISPATCH, True), r"dispatch 'x': probe = True; expected a function"),
    (
        IN_DISPATCH,
        ("x", factory, DISPATCH, factory, "high"),
        rf"dispatch 'x': priority = 'high'; expected {INT_OR_RANGES}",
    ),
    (IN_DISPATCH, ("x", factory, DISPATCH, factory, ()), rf"dispatch 'x': priority = \(\); expected {INT_OR_RANGES}"),
    (IN_EXPERTS, ("x", factory, EXPERTS, factory, ()), rf"experts 'x': priority = \(\); expected {INT_OR_RANGES}"),
    (IN_EXPERTS, ("x", factory, EXPERTS, factory, ((5, 1), (0, 2))), rf"experts 'x': .*; expected {INT_OR_RANGES}"),
    (IN_EXPERTS, (7, factory, EXPERTS), r"experts: name = 7; expected a str, not empty"),
    (IN_SCHEMES, ("x", "y"), r"scheme 'x': factory = 'y'; expected a function"),
    (IN_SCHEMES, ("x", factory, 1), r"scheme 'x': from_checkpoint_config = 1; expected a function, or None"),
    ("moe_core_register_routers", ("x", 1), r"router 'x': factory = 1; expected a function"),
    ("moe_core_register_runners", ("x", 1), r"runner 'x': factory = 1; expected a function"),
]


@pytest.mark.parametrize(("hook", "arguments", "message"), WRONG_ARGUMENTS)
def test_a_wrong_argument_of_register_names_hook_and_backend(hook, arguments, message):
    module = types.ModuleType("acme")
    module.moe_core_api = (1, 0)
    setattr(module, hook, hookimpl(lambda register: register(*arguments)))
    with pytest.raises(PluginError, match=rf"^plugin 'acme': acme, hook {hook}, {message} \(docs/hooks\.md\)$"):
        moe_core.register_plugin(module)


def test_priorities_of_experts_may_rise_with_rows(plugin, backend):
    plugin(experts=("ranged", *backend("experts", "torch"), broken(Availability(True)), ((0, -7), (64, -5))))
    assert registry().find("experts", "ranged").priority == ((0, -7), (64, -5))


HOOK = "@moe_core.hookimpl\ndef moe_core_register_experts(register):\n    {}\n"
NO_HOOK = "acme defines moe_core_register_{}, which is no hook"
HOOKS_ARE = "There are moe_core_register_prepare_finalize, .*moe_core_register_runners"
RAISED = r"acme, hook moe_core_register_experts raised {} at .*acme\.py:7: "
RECORD = "moe_core.ExpertsCapabilities({})"

AUTHORS_ERRORS = [
    (
        "@moe_core.hookimpl\ndef moe_core_register_expert(register): pass\n",
        rf"{NO_HOOK.format('expert')}; did you mean moe_core_register_experts\? {HOOKS_ARE}",
    ),
    (
        "def moe_core_register_dispatch(register): pass\n",
        rf"{NO_HOOK.format('dispatch')}; did you mean moe_core_register_prepare_finalize\? {HOOKS_ARE}",
    ),
    (
        "def moe_core_register_rooters(register): pass\n",
        rf"{NO_HOOK.format('rooters')}; did you mean moe_core_register_routers\? {HOOKS_ARE}",
    ),
    ("@moe_core.hookimpl\ndef setup(register): pass\n", rf"acme defines setup, which is no hook; {HOOKS_ARE}"),
    (
        "def moe_core_register_experts(register): pass\n",
        r"acme defines moe_core_register_experts without @moe_core\.hookimpl; put it above the function",
    ),
    (
        "@moe_core.hookimpl\ndef moe_core_register_experts(regster): pass\n",
        r"acme defines moe_core_register_experts\(regster\); expected moe_core_register_experts\(register\)",
    ),
    (HOOK.format("1 / 0"), RAISED.format("ZeroDivisionError") + "division by zero$"),
    (
        HOOK.format("register('x')"),
        RAISED.format("TypeError") + r"register\(\) missing 2 .*'factory' and 'capabilities'; "
        r"see what register takes in moe_core_register_experts",
    ),
    (
        HOOK.format("register('x', print, caps=1)"),
        RAISED.format("TypeError")
        + r"register\(\) got an unexpected keyword argument 'caps'.*; see what register takes",
    ),
    (
        HOOK.format(RECORD.format("activatons={'silu'}")),
        RAISED.format("TypeError")
        + r"ExpertsCapabilities\.__init__\(\) got .*'activatons'.*; did you mean activations\?",
    ),
    (
        HOOK.format(RECORD.format("")),
        RAISED.format("TypeError")
        + r"ExpertsCapabilities\.__init__\(\) missing .*; its fields are owns, dtypes, .*refuse",
    ),
    (
        HOOK.format(RECORD.format("owns={}, dtypes=torch.float32, device_types={'cpu'}, activations={'silu'}")),
        RAISED.format("ValueError")
        + r"ExpertsCapabilities\.dtypes = torch\.float32; expected a frozenset of torch\.dtype",
    ),
]


@pytest.mark.parametrize(("body", "message"), AUTHORS_ERRORS)
def test_an_authors_error_names_hook_line_and_page_and_no_pip(tmp_path, body, message):
    path = tmp_path / "acme.py"
    path.write_text(f"import moe_core, torch\n\nmoe_core_api = (1, 0)\n\n{body}")
    spec = importlib.util.spec_from_file_location("acme", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(PluginError, match=f"^plugin 'acme': {message}") as told:
        moe_core.register_plugin(module)
    text = str(told.value)
    assert "reinstall" not in text
    assert "<module" not in text
    assert text.endswith((".md)", "division by zero"))
