"""What moe-quant-nvfp4 declares to moe-core. The experts are imported when a plan that uses them is built."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import attrs

from moe_core.config import GATED_FUNCTIONS, MODEL_DTYPES, UNGATED_FUNCTIONS
from moe_core.hookspecs import hookimpl
from moe_core.packed import refuse_sizes
from moe_core.types import BATCHED_EXPERTS_DUTIES as BATCHED_DUTIES
from moe_core.types import STANDARD_EXPERTS_DUTIES as STANDARD_DUTIES
from moe_core.types import ActivationFormat, Availability, ExpertsCapabilities, GateUpLayout
from quant_nvfp4.method import Nvfp4Method, claim
from quant_nvfp4.schemes import NVFP4_W4A4, SCHEMES

moe_core_api = (1, 0)

NVFP4_TORCH = ExpertsCapabilities(
    owns={ActivationFormat.STANDARD: STANDARD_DUTIES, ActivationFormat.BATCHED: BATCHED_DUTIES},
    dtypes=frozenset(MODEL_DTYPES),
    device_types=frozenset({"cpu", "cuda"}),
    activations=frozenset(GATED_FUNCTIONS + UNGATED_FUNCTIONS),
    gate_up_layouts=frozenset(GateUpLayout),
    ungated=True, clamp=True, bias=True, router_weight_on_input=True, deterministic=True,
    schemes=frozenset(scheme.name for scheme in SCHEMES),
    accepts_dropped_ids=True,
    accepts_duplicate_ids=True,
    refuse=refuse_sizes,
)  # fmt: skip
NVFP4_NATIVE = attrs.evolve(
    NVFP4_TORCH,
    schemes=frozenset({NVFP4_W4A4.name}),
    device_types=frozenset({"cuda"}),
    min_compute_capability=(10, 0),  # the first with FP4 tensor cores
)


def _make(config: Any, parallel: Any, scheme: Any, group: Any, placement: Any, *, cached: bool = False) -> Any:
    from moe_core.emulated import EmulatedExperts  # noqa: PLC0415 - only when it is used

    return EmulatedExperts(config, scheme, cached=cached)


@hookimpl
def moe_core_register_experts(register: Callable[..., None]) -> None:
    register("nvfp4_torch", _make, NVFP4_TORCH, priority=0)
    register("nvfp4_torch_cached", functools.partial(_make, cached=True), NVFP4_TORCH, priority=-10)
    missing = Availability(False, "a kernel for native FP4 tensor cores isn't in this release; nvfp4_torch emulates it")
    register("nvfp4_native", _make, NVFP4_NATIVE, lambda: missing, priority=200)


@hookimpl
def moe_core_register_quant_methods(register: Callable[..., None]) -> None:
    for scheme in SCHEMES:
        register(scheme.name, functools.partial(Nvfp4Method, scheme), functools.partial(claim, scheme.name))
