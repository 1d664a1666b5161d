"""What an experts backend's record does not say, as layers that it must refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from moe_core.config import GATED_FUNCTIONS, MODEL_DTYPES, ActivationSpec, Problem
from moe_core.quant import QuantScheme
from moe_core.select import Plan, select
from moe_core.testing import claims
from moe_core.testing.experts_bench import ExpertsBench, Setting
from moe_core.testing.oracle import pass_through
from moe_core.types import ActivationFormat, Device, ExpertsCapabilities, GateUpLayout


def problem_of(setting: Setting, device: Device, config: dict[str, Any]) -> Problem:
    problem = setting.problem(device)
    return attrs.evolve(problem, config=attrs.evolve(problem.config, **config))


def planner_of(bench: ExpertsBench, setting: Setting, device: Device, config: dict[str, Any]) -> claims.Planner:
    def make() -> Plan:
        return select(
            problem_of(setting, device, config), [pass_through(setting.format, setting.payloads)], [bench.candidate]
        )

    return make


def unclaimed(
    caps: ExpertsCapabilities, base: Setting, there: Device
) -> Iterator[tuple[str, Setting, Device, dict[str, Any]]]:
    """(what, a setting that needs it, a device, changes of the config) for all that the record does not say."""

    def changed(**changes: Any) -> Setting:
        return attrs.evolve(base, **changes)

    def spec(**changes: Any) -> Setting:
        return attrs.evolve(base, activation=attrs.evolve(base.activation, **changes))

    for taken in ActivationFormat:
        if taken not in caps.owns:
            yield f"{taken.value} format", changed(batched=taken is ActivationFormat.BATCHED), there, {}
    for dtype in MODEL_DTYPES:
        if dtype not in caps.dtypes:
            yield str(dtype).removeprefix("torch."), changed(dtype=dtype), there, {}
    for device_type in ("cpu", "cuda", "xpu"):
        if device_type not in caps.device_types:
            capability = (99, 0) if device_type == "cuda" else None
            yield f"device {device_type}", base, Device(device_type, capability, device_type), {}
    if caps.min_compute_capability is not None:
        yield "an older GPU", base, Device("cuda", (1, 0), "an old GPU"), {}
    for function in GATED_FUNCTIONS:
        if function not in caps.activations:
            layout = next(iter(sorted(caps.gate_up_layouts, key=lambda item: item.value)), GateUpLayout.GATE_UP)
            yield function, changed(activation=ActivationSpec(function, layout)), there, {}
    for layout in GateUpLayout:
        if layout not in caps.gate_up_layouts:
            yield f"layout {layout.value}", changed(activation=ActivationSpec("silu", layout)), there, {}
    if not caps.ungated:
        yield "no gate", changed(activation=ActivationSpec("silu", None)), there, {}
    if not caps.clamp and base.activation.gated:
        yield "a clamp", spec(limit=7.0), there, {}
    if not caps.bias:
        yield "biases", spec(bias=True), there, {}
    yield "a scheme that nobody knows", changed(scheme=QuantScheme("kit_unknown")), there, {}
    if not caps.router_weight_on_input and base.top_k > 1:
        yield "the router weight on the input", changed(on_input=True), there, {}
    if caps.max_topk is not None:
        yield "a larger K", changed(top_k=caps.max_topk + 1, experts=4 * caps.max_topk), there, {}
    if caps.hidden_alignment > 1:
        yield "another H", changed(hidden=base.hidden + 1), there, {}
    if caps.intermediate_alignment > 1:
        yield "another I", changed(inner=base.inner + 1), there, {}
    if not caps.graph_capturable:
        yield "a CUDA graph", base, there, {"cuda_graph": True}
    if not caps.deterministic:
        yield "determinism", changed(deterministic=True), there, {}


def device_of(caps: ExpertsCapabilities, device_type: str | None = None) -> Device:
    """A device as good as it asks for."""
    device_type = device_type or ("cpu" if "cpu" in caps.device_types else sorted(caps.device_types)[0])
    if device_type != "cuda":
        return Device(device_type, None, device_type)
    return Device("cuda", caps.min_compute_capability or (9, 0), "a CUDA device")
