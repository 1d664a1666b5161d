"""What each of this package's experts backends can do, and whether it can run here."""

from __future__ import annotations

import importlib.util

import attrs
import torch

from moe_core.config import GATED_FUNCTIONS, MODEL_DTYPES, UNGATED_FUNCTIONS
from moe_core.packed import refuse_sizes
from moe_core.types import (
    BATCHED_EXPERTS_DUTIES,
    STANDARD_EXPERTS_DUTIES,
    ActivationFormat,
    Availability,
    ExpertsCapabilities,
    GateUpLayout,
)
from quant_nvfp4.schemes import MMA_LAYOUT, NVFP4, NVFP4_W4A4, SCHEMES

TORCH = ExpertsCapabilities(
    owns={ActivationFormat.STANDARD: STANDARD_EXPERTS_DUTIES, ActivationFormat.BATCHED: BATCHED_EXPERTS_DUTIES},
    dtypes=frozenset(MODEL_DTYPES),
    device_types=frozenset({"cpu", "cuda"}),
    activations=frozenset(GATED_FUNCTIONS + UNGATED_FUNCTIONS),
    gate_up_layouts=frozenset(GateUpLayout),
    ungated=True,
    clamp=True,
    bias=True,
    router_weight_on_input=True,
    deterministic=True,
    schemes=frozenset(scheme.name for scheme in SCHEMES),
    accepts_dropped_ids=True,
    accepts_duplicate_ids=True,
    refuse=refuse_sizes,
)
TRITON = attrs.evolve(
    TORCH,
    dtypes=frozenset({torch.bfloat16}),
    device_types=frozenset({"cuda"}),
    schemes=frozenset({NVFP4.name}),
    weight_layout={NVFP4.name: MMA_LAYOUT},
    graph_capturable=True,
    hidden_alignment=64,  # a warp multiplies 64 columns of weights at a time
    intermediate_alignment=64,
    min_compute_capability=(8, 0),  # bfloat16 matrix products
)
NATIVE = attrs.evolve(
    TORCH,
    schemes=frozenset({NVFP4_W4A4.name}),
    device_types=frozenset({"cuda"}),
    min_compute_capability=(10, 0),  # the first with FP4 tensor cores
)


def probe_triton() -> Availability:
    if importlib.util.find_spec("triton") is None:
        return Availability(
            False,
            'triton is not installed: pip install "moe-core[triton]" (CUDA and ROCm builds of torch bring their own)',
        )
    return Availability(True)


def probe_native() -> Availability:
    return Availability(
        False, "a kernel for native FP4 tensor cores isn't in this release; nvfp4_torch emulates what they compute"
    )
