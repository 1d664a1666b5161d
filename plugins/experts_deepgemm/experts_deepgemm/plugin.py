"""What moe-experts-deepgemm declares to moe-core. DeepGEMM is imported when a plan that uses it is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from experts_deepgemm.availability import FP8_SCHEMES, probe, refuse
from moe_core import types
from moe_core.config import GATED_FUNCTIONS, UNGATED_FUNCTIONS
from moe_core.hookspecs import hookimpl

moe_core_api = (1, 0)

DEEPGEMM = types.ExpertsCapabilities(
    owns={
        types.ActivationFormat.STANDARD: types.STANDARD_EXPERTS_DUTIES - {types.Duty.EXPERT_BIAS},
        types.ActivationFormat.BATCHED: types.BATCHED_EXPERTS_DUTIES - {types.Duty.EXPERT_BIAS},
    },
    dtypes=frozenset({torch.bfloat16}),
    device_types=frozenset({"cuda"}),
    activations=frozenset(GATED_FUNCTIONS + UNGATED_FUNCTIONS),
    gate_up_layouts=frozenset(types.GateUpLayout),
    ungated=True,
    clamp=True,
    schemes=FP8_SCHEMES | {"unquantized"},
    payloads=FP8_SCHEMES | {types.MODEL_DTYPE_PAYLOAD},
    accepts_dropped_ids=True,
    accepts_duplicate_ids=True,
    graph_capturable=True,
    deterministic=True,
    hidden_alignment=128,
    intermediate_alignment=128,
    min_compute_capability=(9, 0),
    refuse=refuse,
)


def _make(config: Any, parallel: Any, scheme: Any, group: Any, placement: Any) -> Any:
    from experts_deepgemm.experts import DeepGemmExperts  # noqa: PLC0415 - imports the vendor library

    return DeepGemmExperts(config, parallel, scheme)


@hookimpl
def moe_core_register_experts(register: Callable[..., None]) -> None:
    register("deepgemm", _make, DEEPGEMM, probe, priority=50)
