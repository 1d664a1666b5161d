"""Whole models: attach a loaded one, or plan one from its config alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers

from moe_core.build import device_of
from moe_core.errors import MoEError, UnsupportedError
from moe_core.integrations.transformers.architectures import check_architecture
from moe_core.integrations.transformers.foreign import top_k_of
from moe_core.integrations.transformers.layer import layer_for
from moe_core.integrations.transformers.plans import Request, make_plan, with_notes
from moe_core.integrations.transformers.quantized import loading_notes, refuse_lost_scales
from moe_core.plugins import registry
from moe_core.select import Plan
from moe_core.types import Device

IMPLEMENTATION = "moe_core"
"""The name in transformers' registries: `experts_implementation="moe_core"`."""

_UNKNOWN_TOP_K = "K is not to be found in the model's config or modules, so this plan is made for K = 1 until a call"


def attach(
    model: torch.nn.Module, *, dispatch: str | None = None, experts: str | None = None, debug: bool = False
) -> dict[str, Plan]:
    """Let moe-core run every MoE layer of a loaded transformers model, and plan each now rather than at its first call.

    Attaching again changes the backends that are insisted on; copies of the model honour them too.

    Args:
        model: a `PreTrainedModel`.
        dispatch, experts: names of backends to insist on; None: selection decides.
        debug: check ids and shapes on every step, which reads values on the host.

    Returns:
        module name → plan. The plan of a layer whose gate is not one of `ActivationSpec`, or that has a norm per
        expert, is a `BridgePlan` whose notes (and `explain()`) say that it runs unfused, and why.

    Raises:
        UnsupportedError: the architecture keeps its experts to itself, or a layer cannot run, or not as asked.
    """
    _check_names(dispatch, experts)
    modules = check_architecture(model)
    if any(hasattr(module, "packed") for module in modules.values()):
        raise UnsupportedError(
            f"{type(model).__name__}: its experts are packed, and run by their plans already (packed.packed_plans "
            "tells them); to insist on backends, load it with packed.from_pretrained(…, dispatch=…, experts=…)"
        )
    refuse_lost_scales(type(model).__name__, getattr(model, "config", None))
    layers = {name: layer_for(module) for name, module in modules.items()}
    before = {name: layer.requested for name, layer in layers.items()}
    plans: dict[str, Plan] = {}
    try:
        for name, layer in layers.items():
            layer.request(Request(dispatch, experts, debug))
            top_k = top_k_of(model, name)
            plan = _named(name, functools.partial(layer.plan, top_k or 1))
            plans[name] = with_notes(plan, _UNKNOWN_TOP_K) if top_k is None else plan
    except MoEError:
        for name, layer in layers.items():
            layer.request(before[name])  # a model that was refused runs on as it did
        raise
    model.set_experts_implementation(IMPLEMENTATION)  # type: ignore[operator]
    for name, module in modules.items():
        chosen = module.config._experts_implementation  # type: ignore[union-attr]
        if chosen != IMPLEMENTATION:
            raise MoEError(
                f"{name}: set_experts_implementation('{IMPLEMENTATION}') left its config at {chosen!r}; set it on the "
                "submodel that holds this layer"
            )
    return plans


def layer_plans(
    config: Any,
    *,
    dispatch: str | None = None,
    experts: str | None = None,
    device: torch.device | str | Device | None = None,
    scheme: str | None = None,
) -> dict[str, Plan]:
    """What `attach` would answer for a model of this config. Loads no weights: the model is made on the meta device.

    Args:
        config: a transformers config.
        dispatch, experts: names of backends to insist on; None: selection decides.
        device: where it will run, also one that is not here; None: "cuda" where there is one, else "cpu".
        scheme: the quantization scheme that the experts stay packed in; None: unquantized.

    Returns:
        module name → plan.

    Raises:
        UnsupportedError: as for `attach`; also for a checkpoint format that would not reach the bridge unpacked.
    """
    _check_names(dispatch, experts)
    where = device_of(device)
    notes = loading_notes(config, where)
    try:
        model = _on_meta(config)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"{type(config).__name__}: transformers cannot make a model of this config ({type(error).__name__}: "
            f"{error}); complete its config.json"
        ) from error
    plans: dict[str, Plan] = {}
    for name, module in check_architecture(model).items():
        top_k = top_k_of(model, name)
        request = Request(dispatch, experts, scheme=scheme)
        plan = _named(name, functools.partial(make_plan, module, top_k or 1, request, where))
        plans[name] = with_notes(plan, *notes, *((_UNKNOWN_TOP_K,) if top_k is None else ()))
    return plans


def _check_names(dispatch: str | None, experts: str | None) -> None:
    """An unknown backend is told before any layer is named with it."""
    for kind, name in (("dispatch", dispatch), ("experts", experts)):
        if name is not None:
            registry().find(kind, name)


def _named(name: str, make: Callable[[], Plan]) -> Plan:
    """The plan that `make` makes; a refusal gets the module's name in front."""
    try:
        return make()
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}", error.rejections) from error


def _on_meta(config: Any) -> torch.nn.Module:
    """The model of a config, without storage."""
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # planned for what the experts are after loading
    names = list(getattr(config, "architectures", None) or ())
    with torch.device("meta"):
        for name in names:
            cls = getattr(transformers, name, None)
            if cls is not None and hasattr(cls, "_from_config"):
                model: torch.nn.Module = cls._from_config(config)
                return model
        for auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel"):
            mapping = getattr(transformers, auto, None)
            if mapping is not None and type(config) in mapping._model_mapping:
                model = mapping.from_config(config)
                return model
    raise UnsupportedError(
        f"no model class of transformers {transformers.__version__} takes a {type(config).__name__} (architectures = "
        f"{names}); a model that brings code of its own is loaded first, and then passed to attach"
    )
