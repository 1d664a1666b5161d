"""From a config to something that runs: `plan`, `build_runner` and `plugins`, the library's front door."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from moe_core.answers import probed
from moe_core.config import MoEConfig, MoEParallelConfig, Problem
from moe_core.errors import MoEError, UnsupportedError
from moe_core.forms import claimed, made_method, made_router, made_runner, registered_as
from moe_core.interfaces import Group, MoERunnerInterface, Router
from moe_core.plugins import PluginRecord, registry
from moe_core.quant import UNQUANTIZED, QuantMethod, QuantScheme
from moe_core.routed_experts import RoutedExperts
from moe_core.select import Plan, select
from moe_core.shared_experts import SharedExperts
from moe_core.tuned import read_tuned
from moe_core.types import Device


def plugins() -> list[PluginRecord]:
    """Every plugin that was found, also those that could not be loaded, with what each registers and why not."""
    return list(registry().plugins)


def plan(
    config: MoEConfig,
    *,
    parallel: MoEParallelConfig | None = None,
    scheme: QuantScheme | str | None = None,
    dispatch: str | None = None,
    experts: str | None = None,
    device: torch.device | str | Device | None = None,
    routing_is_external: bool = False,
) -> Plan:
    """Choose the backends for one layer, and say why. What `moe-core tune` measured of it on this device is used.

    Args:
        config: the layer.
        parallel: its spread over ranks; None: one rank.
        scheme: a quantization scheme or its name; None: unquantized.
        dispatch, experts: names of backends to insist on.
        device: where it will run, also one that is not here (a `Device`); None: "cuda" where there is one, else "cpu".
        routing_is_external: ids and weights will come from outside.

    Raises:
        UnsupportedError: nothing can run it, or a name is unknown. The text holds every candidate with its reasons.
    """
    found = registry()
    if dispatch is not None:
        found.find("dispatch", dispatch)
    if experts is not None:
        found.find("experts", experts)
    problem = Problem(
        config=config,
        parallel=parallel or MoEParallelConfig(),
        scheme=_scheme(scheme),
        device=device_of(device),
        routing_is_external=routing_is_external,
    )
    return select(
        problem,
        [probed(candidate) for candidate in found.dispatch.values()],
        [probed(candidate) for candidate in found.experts.values()],
        dispatch=dispatch,
        experts=experts,
        tuned=read_tuned(problem),
    )


def build_runner(
    config: MoEConfig,
    *,
    parallel: MoEParallelConfig | None = None,
    scheme: QuantScheme | str | None = None,
    quant_method: QuantMethod | None = None,
    dispatch: str | None = None,
    experts: str | None = None,
    group: Group | None = None,
    device: torch.device | str | None = None,
    gate: torch.nn.Module | None = None,
    shared_experts: torch.nn.Module | None = None,
    correction_bias: torch.Tensor | None = None,
    routed_input_transform: torch.nn.Module | None = None,
    routed_output_transform: torch.nn.Module | None = None,
    runner: str = "default",
) -> MoERunnerInterface:
    """Build one MoE layer with empty weights; fill them with `runner.routed_experts.load_expert`, then `pack_weights`.

    Args:
        config: the layer.
        parallel: its spread over ranks; None: one rank.
        scheme: a quantization scheme or its name; None: unquantized.
        quant_method: what reads the checkpoint, where `method_for_checkpoint` made one; its scheme is the layer's.
        dispatch, experts: names of backends to insist on; None: selection decides.
        group: the ranks of this layer; needed where there is more than one.
        device: where it runs; None: "cuda" where there is one, else "cpu".
        gate: `[T, H] → [T, E]`, if the runner is to hold it.
        shared_experts: a module that every token visits, or a `SharedExperts` around one.
        correction_bias: `[E]` float32, for routers that choose by biased scores.
        routed_input_transform, routed_output_transform: modules around the routed experts only (latent MoE).
        runner: which registered runner.

    Raises:
        UnsupportedError: nothing can run it.
    """
    parallel = parallel or MoEParallelConfig()
    _check_group(parallel, group)
    target = torch.device(device_of(device).type if device is None else device)
    replan = functools.partial(
        plan, config, parallel=parallel, dispatch=dispatch, experts=experts, device=Device.of(target)
    )
    chosen = replan(scheme=scheme if quant_method is None else _scheme_of(quant_method, scheme))
    method = quant_method or made_method(registry().find("quant_methods", chosen.scheme.name))
    if shared_experts is not None and not isinstance(shared_experts, SharedExperts):
        shared_experts = SharedExperts(shared_experts)
    return made_runner(
        registry().find("runners", runner),
        registered_as("runner", runner),
        chosen,
        RoutedExperts(chosen, method, target),
        _router(config, target),
        replan=replan,
        group=group,
        gate=gate,
        shared_experts=shared_experts,
        correction_bias=correction_bias,
        routed_input_transform=routed_input_transform,
        routed_output_transform=routed_output_transform,
    )


def _router(config: MoEConfig, device: torch.device) -> Router:
    name = config.router.name
    router = made_router(registry().find("routers", name), config, registered_as("router", name))
    return router.for_device(device, config.num_experts)


def _check_group(parallel: MoEParallelConfig, group: Group | None) -> None:
    ranks = max(parallel.ep_size, parallel.tp_size)
    if ranks > 1 and group is None:
        raise MoEError(f"this layer is spread over {ranks} ranks, and group is None: pass the ranks' Group")


def method_for_floats(scheme: str) -> QuantMethod:
    """The quantization method that takes a checkpoint's floating-point experts, quantizing them while they load.

    Raises:
        UnsupportedError: there is no such scheme, or it needs values that no floating-point checkpoint has.
    """
    method = made_method(registry().find("quant_methods", scheme))
    needed = [kind.strip("_").replace("_", " ") for kind in method.required_kinds(packed=False) if kind]
    if needed:
        others = sorted(
            name
            for name, other in registry().quant_methods.items()
            if (made := made_method(other)).scheme.weight is not None and not any(made.required_kinds(packed=False))
        )
        raise UnsupportedError(
            f"scheme {scheme!r} needs {', '.join(needed)} from a calibration, and a checkpoint of floating-point "
            f"weights has none; schemes that need none: {', '.join(others)}"
        )
    return method


def method_for_checkpoint(config: Mapping[str, Any], scheme: str | None = None) -> QuantMethod:
    """The quantization method that reads a checkpoint's experts, from config.json's `quantization_config`.

    Args:
        config: the `quantization_config`.
        scheme: the scheme to run it in, where more than one can (weight-only, say); None: the first that claims it, in
            the order of registration.

    Raises:
        UnsupportedError: nobody claims it; the text holds everybody's reason.
    """
    entries = registry().quant_methods
    if scheme is not None:
        entries = {scheme: registry().find("quant_methods", scheme)}
    reasons = []
    for name, entry in entries.items():
        if entry.from_checkpoint_config is None:
            continue
        answer = claimed(entry, config)
        if isinstance(answer, QuantMethod):
            return answer
        reasons.append(f"  {name} ({entry.plugin}): {answer}")
    asked = f"as scheme {scheme!r}" if scheme is not None else "by any scheme that is installed"
    shown = "\n".join(reasons) or "  none of the schemes here reads checkpoints"
    raise UnsupportedError(
        f"quantization_config with quant_method = {config.get('quant_method')!r} is not read {asked}:\n{shown}\n"
        "Schemes come with packages named moe-quant-…"
    )


def _scheme_of(method: QuantMethod, scheme: QuantScheme | str | None) -> QuantScheme:
    if scheme is not None and _scheme(scheme) != method.scheme:
        raise MoEError(f"scheme = {scheme!r} and a quant_method of scheme {method.scheme.name!r}; pass one of the two")
    return method.scheme


def _scheme(scheme: QuantScheme | str | None) -> QuantScheme:
    if isinstance(scheme, str):
        return made_method(registry().find("quant_methods", scheme)).scheme
    return scheme or UNQUANTIZED


def device_of(device: torch.device | str | Device | None) -> Device:
    """A device's description; None: "cuda" where there is one, else "cpu"."""
    if isinstance(device, Device):
        return device
    return Device.of(device or ("cuda" if torch.cuda.is_available() else "cpu"))
