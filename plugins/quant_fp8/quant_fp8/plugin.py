"""What moe-quant-fp8 declares to moe-core. The experts are imported when a plan that uses them is built."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from moe_core.config import GATED_FUNCTIONS, MODEL_DTYPES, UNGATED_FUNCTIONS
from moe_core.hookspecs import hookimpl
from moe_core.packed import refuse_sizes
from moe_core.types import (
    BATCHED_EXPERTS_DUTIES,
    MODEL_DTYPE_PAYLOAD,
    STANDARD_EXPERTS_DUTIES,
    ActivationFormat,
    ExpertsCapabilities,
    GateUpLayout,
)
from quant_fp8.method import Fp8Method, claim
from quant_fp8.schemes import ROW_WISE, SCHEMES

moe_core_api = (1, 0)

FP8_TORCH = ExpertsCapabilities(
    owns={ActivationFormat.STANDARD: STANDARD_EXPERTS_DUTIES, ActivationFormat.BATCHED: BATCHED_EXPERTS_DUTIES},
    dtypes=frozenset(MODEL_DTYPES),
    device_types=frozenset({"cpu", "cuda"}),
    activations=frozenset(GATED_FUNCTIONS + UNGATED_FUNCTIONS),
    gate_up_layouts=frozenset(GateUpLayout),
    ungated=True,
    clamp=True,
    bias=True,
    schemes=frozenset(scheme.name for scheme in SCHEMES),
    payloads=ROW_WISE | {MODEL_DTYPE_PAYLOAD},
    router_weight_on_input=True,
    accepts_dropped_ids=True,
    accepts_duplicate_ids=True,
    deterministic=True,
    refuse=refuse_sizes,
)


def _make(config: Any, parallel: Any, scheme: Any, group: Any, placement: Any, *, cached: bool = False) -> Any:
    from moe_core.emulated import EmulatedExperts  # noqa: PLC0415 - only when it is used

    return EmulatedExperts(config, scheme, cached=cached)


@hookimpl
def moe_core_register_experts(register: Callable[..., None]) -> None:
    register("fp8_torch", _make, FP8_TORCH, priority=0)
    # Below: it holds the dequantized weights too, which nobody asks for who quantizes to save memory.
    register("fp8_torch_cached", functools.partial(_make, cached=True), FP8_TORCH, priority=-10)


@hookimpl
def moe_core_register_quant_methods(register: Callable[..., None]) -> None:
    for scheme in SCHEMES:
        register(scheme.name, functools.partial(Fp8Method, scheme), functools.partial(claim, scheme.name))
