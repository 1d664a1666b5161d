"""What moe-batched declares to moe-core. The implementation is imported when a plan that uses it is built."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from moe_core import types
from moe_core.config import MODEL_DTYPES, MoEConfig, MoEParallelConfig, Problem
from moe_core.hookspecs import hookimpl

moe_core_api = (1, 0)


def _refuse(problem: Problem) -> str | None:
    parallel = problem.parallel
    if parallel.ep_size == 1 or parallel.tokens_are_replicated or problem.config.max_tokens_per_rank is not None:
        return None
    return (
        f"max_tokens_per_rank = None: with tokens of each rank's own (dp_size = {parallel.dp_size}, sp_size = "
        f"{parallel.sp_size}) the row capacity is max_tokens_per_rank · {parallel.ep_size}; set it in MoEConfig"
    )


BATCHED = types.DispatchCapabilities(
    activation_format=types.ActivationFormat.BATCHED,
    dtypes=frozenset(MODEL_DTYPES),
    device_types=frozenset({"cpu", "cuda"}),
    payloads=frozenset({types.MODEL_DTYPE_PAYLOAD, types.ROW_WISE_PAYLOAD}),
    owns=types.BATCHED_FINALIZE_DUTIES,
    accepts_dropped_ids=True,
    accepts_duplicate_ids=True,
    placements=frozenset(types.ExpertPlacement),
    max_ep_size=None,
    carries_tokens=True,
    output_reduced=True,
    local_if_replicated=True,
    split=True,
    max_in_flight=None,
    overlap_safe=True,
    graph_capturable=True,
    deterministic=True,
    refuse=_refuse,
    footprint=lambda *asked: import_module("moe_batched.footprint").footprint(*asked),
)


def _make(config: MoEConfig, parallel: MoEParallelConfig, scheme: Any, group: Any, placement: Any) -> Any:
    from moe_batched.all_to_all import make  # noqa: PLC0415 - only when it is used

    return make(config, parallel, scheme, group, placement)


@hookimpl
def moe_core_register_prepare_finalize(register: Callable[..., None]) -> None:
    # Below `local`: on one rank this is for experts that want the format, not for speed.
    register("batched", _make, BATCHED, priority=-10)
