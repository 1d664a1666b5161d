"""From a foreign experts module to the `Plan` that its layer runs by."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from moe_core.answers import probed
from moe_core.build import device_of
from moe_core.build import plan as plan_layer
from moe_core.config import ActivationSpec, Problem
from moe_core.errors import UnsupportedError
from moe_core.integrations.transformers.foreign import Tensors, check_supported, config_of
from moe_core.integrations.transformers.gates import recognise_gate
from moe_core.integrations.transformers.unfused import module_candidate, refused
from moe_core.plugins import registry
from moe_core.select import Plan, select
from moe_core.types import Device, GateUpLayout


@attrs.frozen
class Request:
    """What is asked: backends by name (None: selection decides), debug mode, and the scheme of packed experts."""

    dispatch: str | None = None
    experts: str | None = None
    debug: bool = False
    scheme: str | None = None


@attrs.frozen(kw_only=True)
class BridgePlan(Plan):
    """A plan with something to say about the module it is for.

    Attributes:
        notes: what a reader of the plan must know, one line each.
        own_gate: the experts call the module's own gate (and post norm), and `config.activation` is a stand-in.
    """

    notes: tuple[str, ...] = ()
    own_gate: bool = False

    def to_dict(self) -> dict[str, Any]:
        shown = super().to_dict()
        if self.own_gate:
            shown["layer"]["activation"] = "the module's own"
        return {**shown, "notes": list(self.notes)}

    def choice(self) -> str:
        return "\n".join([super().choice(), *(f"note: {note}" for note in self.notes)])


def with_notes(plan: Plan, *notes: str, own_gate: bool = False) -> Plan:
    """The plan, with notes added to those it has; the plan itself where there are none."""
    if not notes:
        return plan
    fields = {field.name: getattr(plan, field.name) for field in attrs.fields(Plan)}
    if isinstance(plan, BridgePlan):
        notes, own_gate = (*plan.notes, *notes), own_gate or plan.own_gate
    return BridgePlan(**fields, notes=notes, own_gate=own_gate)


def make_plan(
    module: torch.nn.Module, top_k: int, request: Request, device: torch.device | str | Device | None = None
) -> Plan:
    """Plan one experts module.

    Args:
        module: on any device, also "meta".
        top_k: K of the calls to come.
        request: backends to insist on.
        device: where it will run; None: where its parameters are (for "meta": "cuda" where there is one, else "cpu").

    Raises:
        UnsupportedError: it would come out wrong, or nothing can run it, or not as asked.
    """
    check_supported(module)
    down = Tensors.of(module).down
    if device is None and down.device.type != "meta":
        device = down.device
    intermediate = down.shape[1 if module.is_transposed else 2]
    gate = recognise_gate(module, intermediate)
    if getattr(module, "has_post_expert_norm", False):
        norm = type(module.post_expert_norm).__name__
        gate = f"each expert's output passes through {norm} before it is weighted, which no experts backend does"
    if isinstance(gate, str):
        return _plan_unfused(module, top_k, request, device, gate)
    return plan_layer(
        config_of(module, top_k, gate, request.debug),
        scheme=request.scheme,
        dispatch=request.dispatch,
        experts=request.experts,
        device=device,
        routing_is_external=True,
    )


def _plan_unfused(
    module: torch.nn.Module,
    top_k: int,
    request: Request,
    device: torch.device | str | Device | None,
    reason: str,
) -> Plan:
    """A plan whose experts are the module's own functions; every other candidate is in the table with the reason."""
    found = registry()
    if request.dispatch is not None:
        found.find("dispatch", request.dispatch)
    if request.experts is not None:
        found.find("experts", request.experts)
        raise UnsupportedError(
            f"experts {request.experts!r} cannot run {type(module).__name__}: {reason}; leave experts unset, and the "
            "module's own functions run behind the plan's dispatch"
        )
    where = device_of(device)
    layout = (
        (GateUpLayout.GATE_UP if getattr(module, "is_concatenated", True) else GateUpLayout.INTERLEAVED)
        if module.has_gate
        else None
    )
    stand_in = ActivationSpec("silu", layout, bias=bool(getattr(module, "has_bias", False)))
    plan = select(
        Problem(config=config_of(module, top_k, stand_in, request.debug), device=where, routing_is_external=True),
        [probed(candidate) for candidate in found.dispatch.values()],
        [module_candidate(module, where.type), *(refused(item, reason) for item in found.experts.values())],
        dispatch=request.dispatch,
    )
    return with_notes(plan, f"runs unfused, by the module's own functions: {reason}", own_gate=True)
