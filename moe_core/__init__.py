"""moe-core: Mixture-of-Experts layers for PyTorch inference, in which everything replaceable is a plugin.

Start with `build_runner`, `plan` and `plugins`; a plugin author starts with `hookspecs.py`, then `interfaces.py`.
"""

from moe_core.build import build_runner, plan, plugins
from moe_core.config import ActivationSpec, MoEConfig, MoEParallelConfig, Problem, RouterSpec
from moe_core.errors import (
    CapacityError,
    CheckpointError,
    CollectiveError,
    MoEError,
    PluginError,
    UnsupportedError,
)
from moe_core.hookspecs import PLUGIN_API, hookimpl
from moe_core.interfaces import Experts, Group, MoERunnerInterface, PrepareAndFinalize, Router
from moe_core.plugins import register_plugin, unregister_plugin
from moe_core.quant import UNQUANTIZED, QuantMethod, QuantScheme, QuantSpec, ScaleFormat
from moe_core.select import Plan
from moe_core.shared_experts import SharedExperts
from moe_core.types import (
    ActivationFormat,
    Availability,
    Device,
    DispatchCapabilities,
    Dispatched,
    DispatchFootprint,
    Duty,
    ExpertPlacement,
    ExpertsCapabilities,
    ExpertWeights,
    GateUpLayout,
    RoutedScaling,
    Routing,
    SharedExpertsOrder,
)

__version__ = "0.1.0"

__all__ = [
    "PLUGIN_API",
    "UNQUANTIZED",
    "ActivationFormat",
    "ActivationSpec",
    "Availability",
    "CapacityError",
    "CheckpointError",
    "CollectiveError",
    "Device",
    "DispatchCapabilities",
    "DispatchFootprint",
    "Dispatched",
    "Duty",
    "ExpertPlacement",
    "ExpertWeights",
    "Experts",
    "ExpertsCapabilities",
    "GateUpLayout",
    "Group",
    "MoEConfig",
    "MoEError",
    "MoEParallelConfig",
    "MoERunnerInterface",
    "Plan",
    "PluginError",
    "PrepareAndFinalize",
    "Problem",
    "QuantMethod",
    "QuantScheme",
    "QuantSpec",
    "RoutedScaling",
    "Router",
    "RouterSpec",
    "Routing",
    "ScaleFormat",
    "SharedExperts",
    "SharedExpertsOrder",
    "UnsupportedError",
    "build_runner",
    "hookimpl",
    "plan",
    "plugins",
    "register_plugin",
    "unregister_plugin",
]
