"""Every hook. A plugin author starts here, then reads `interfaces.py`.

A plugin is a module that sets `moe_core_api = (1, 0)` and defines some of these functions, decorated with
`moe_core.hookimpl`. Its distribution names the module in the entry-point group `moe_core.plugins`. Hooks run once,
at the first build or listing, never on the step; the module imports nothing heavy, its factories do.
"""

from __future__ import annotations

from collections.abc import Callable

import pluggy

PLUGIN_API = (1, 0)
"""(major, minor). A plugin of the same major and of no higher minor loads."""

ENTRY_POINT_GROUP = "moe_core.plugins"

hookspec = pluggy.HookspecMarker("moe_core")
hookimpl = pluggy.HookimplMarker("moe_core")


@hookspec
def moe_core_register_prepare_finalize(register: Callable[..., None]) -> None:
    """Register dispatch backends: `register(name, factory, capabilities: DispatchCapabilities, probe, priority)`."""


@hookspec
def moe_core_register_experts(register: Callable[..., None]) -> None:
    """Register experts backends: `register(name, factory, capabilities: ExpertsCapabilities, probe, priority)`."""


@hookspec
def moe_core_register_quant_methods(register: Callable[..., None]) -> None:
    """Register quantization methods: `register(scheme_name, factory: () -> QuantMethod, from_checkpoint_config)`."""


@hookspec
def moe_core_register_routers(register: Callable[..., None]) -> None:
    """Register routers: `register(name, factory: (MoEConfig) -> Router)`."""


@hookspec
def moe_core_register_runners(register: Callable[..., None]) -> None:
    """Register runners: `register(name, factory)`; the factory takes what `MoERunner` takes."""
