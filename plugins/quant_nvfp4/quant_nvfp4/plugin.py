"""What moe-quant-nvfp4 declares to moe-core. The experts are imported when a plan that uses them is built."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from moe_core.hookspecs import hookimpl
from quant_nvfp4.capabilities import NATIVE, TORCH, TRITON, probe_native, probe_triton
from quant_nvfp4.method import Nvfp4Method, claim
from quant_nvfp4.schemes import SCHEMES

moe_core_api = (1, 0)


def _make(config: Any, parallel: Any, scheme: Any, group: Any, placement: Any, *, cached: bool = False) -> Any:
    from moe_core.emulated import EmulatedExperts  # noqa: PLC0415 - only when it is used

    return EmulatedExperts(config, scheme, cached=cached)


def _make_triton(config: Any, parallel: Any, scheme: Any, group: Any, placement: Any) -> Any:
    from quant_nvfp4.experts import Nvfp4TritonExperts  # noqa: PLC0415 - only when it is used

    return Nvfp4TritonExperts(config, parallel)


@hookimpl
def moe_core_register_experts(register: Callable[..., None]) -> None:
    register("nvfp4_triton", _make_triton, TRITON, probe_triton, priority=100)
    register("nvfp4_torch", _make, TORCH, priority=0)
    register("nvfp4_torch_cached", functools.partial(_make, cached=True), TORCH, priority=-10)
    register("nvfp4_native", _make, NATIVE, probe_native, priority=200)


@hookimpl
def moe_core_register_quant_methods(register: Callable[..., None]) -> None:
    for scheme in SCHEMES:
        register(scheme.name, functools.partial(Nvfp4Method, scheme), functools.partial(claim, scheme.name))
