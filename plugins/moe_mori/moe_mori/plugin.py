"""What moe-mori declares to moe-core. The library is imported when a plan that uses it is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_core import types
from moe_core.hookspecs import hookimpl
from moe_mori import limits
from moe_mori.availability import installed_version, probe

moe_core_api = (1, 0)

MORI = types.DispatchCapabilities(
    activation_format=types.ActivationFormat.STANDARD,
    dtypes=frozenset({torch.bfloat16}),
    device_types=frozenset({"cuda"}),  # as ROCm's torch calls it
    payloads=frozenset({types.MODEL_DTYPE_PAYLOAD, types.ROW_WISE_PAYLOAD}),
    id_dtype=torch.int32,
    accepts_dropped_ids=limits.skips_dropped_ids(installed_version()),
    accepts_duplicate_ids=True,
    placements=frozenset(types.ExpertPlacement),
    needs_round_robin_routing_tables=True,
    needs_equal_shares=True,
    min_ep_size=2,
    max_ep_size=limits.MAX_RANKS,
    carries_tokens=True,
    output_reduced=True,
    shared_in_flight=True,
    graph_capturable=True,
    max_topk=limits.MAX_TOPK,
    refuse=limits.refuse,
    footprint=limits.footprint,
)


def _make(config: Any, parallel: Any, scheme: Any, group: Any, placement: Any) -> Any:
    from moe_mori.prepare_finalize import make  # noqa: PLC0415 - only when it is used

    return make(config, parallel, scheme, group, placement)


@hookimpl
def moe_core_register_prepare_finalize(register: Callable[..., None]) -> None:
    # Above `all_gather`: a row travels once to each rank that needs it, and to no other.
    register("mori", _make, MORI, probe, priority=20)
