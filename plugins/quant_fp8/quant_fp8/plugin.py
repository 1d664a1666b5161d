"""What moe-quant-fp8 declares to moe-core. The experts are imported when a plan that uses them is built."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from moe_core.hookspecs import hookimpl
from quant_fp8.capabilities import FP8_TORCH, FP8_TRITON, probe_triton
from quant_fp8.method import Fp8Method, claim
from quant_fp8.schemes import SCHEMES

moe_core_api = (1, 0)


def _make_torch(config: Any, parallel: Any, scheme: Any, group: Any, placement: Any, *, cached: bool = False) -> Any:
    from moe_core.emulated import EmulatedExperts  # noqa: PLC0415 - only when it is used

    return EmulatedExperts(config, scheme, cached=cached)


def _make_triton(config: Any, parallel: Any, scheme: Any, group: Any, placement: Any) -> Any:
    from quant_fp8.experts import Fp8TritonExperts  # noqa: PLC0415 - only when it is used

    return Fp8TritonExperts(config, parallel, scheme)


@hookimpl
def moe_core_register_experts(register: Callable[..., None]) -> None:
    register("fp8_triton", _make_triton, FP8_TRITON, probe_triton, priority=100)
    register("fp8_torch", _make_torch, FP8_TORCH, priority=0)
    # Below: it holds the dequantized weights too, which nobody asks for who quantizes to save memory.
    register("fp8_torch_cached", functools.partial(_make_torch, cached=True), FP8_TORCH, priority=-10)


@hookimpl
def moe_core_register_quant_methods(register: Callable[..., None]) -> None:
    for scheme in SCHEMES:
        register(scheme.name, functools.partial(Fp8Method, scheme), functools.partial(claim, scheme.name))
