"""What moe-symm declares to moe-core. The kernels are imported when a plan that uses them is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_core import types
from moe_core.hookspecs import hookimpl
from moe_symm import limits
from moe_symm.availability import probe, this_host
from moe_symm.layout import LANES, MAX_RANKS

moe_core_api = (1, 0)

SYMM = types.DispatchCapabilities(
    activation_format=types.ActivationFormat.STANDARD,
    dtypes=frozenset({torch.bfloat16, torch.float16, torch.float32}),
    device_types=frozenset({"cuda"}),
    accepts_dropped_ids=True,
    accepts_duplicate_ids=True,
    placements=frozenset(types.ExpertPlacement),
    min_ep_size=2,
    max_ep_size=MAX_RANKS,
    carries_tokens=True,
    output_reduced=True,
    max_in_flight=LANES,
    overlap_safe=True,
    graph_capturable=True,
    deterministic=True,
    max_topk=limits.MAX_TOPK,
    max_tokens_per_rank=limits.MAX_TOKENS,
    min_compute_capability=(9, 0),
    refuse=lambda problem: limits.refuse(problem, this_host()),
    footprint=limits.footprint,
)


def _make(config: Any, parallel: Any, scheme: Any, group: Any, placement: Any) -> Any:
    from moe_symm.peers import connect  # noqa: PLC0415 - only when it is used
    from moe_symm.prepare_finalize import make  # noqa: PLC0415

    return make(config, parallel, group, placement, connect=connect)


@hookimpl
def moe_core_register_prepare_finalize(register: Callable[..., None]) -> None:
    # Below `nixl_ep` and `all_gather`: to be asked for by name, until whole layers have run with it on GPUs.
    register("symm", _make, SYMM, probe, priority=-6)
