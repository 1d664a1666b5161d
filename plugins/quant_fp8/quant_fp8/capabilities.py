"""What the experts of moe-quant-fp8 can do, and where."""

from __future__ import annotations

import importlib.util

import attrs
import torch

from moe_core.config import GATED_FUNCTIONS, MODEL_DTYPES, UNGATED_FUNCTIONS
from moe_core.ops import FP8_ALIGNMENT
from moe_core.packed import refuse_sizes
from moe_core.types import (
    BATCHED_EXPERTS_DUTIES,
    MODEL_DTYPE_PAYLOAD,
    STANDARD_EXPERTS_DUTIES,
    ActivationFormat,
    Availability,
    ExpertsCapabilities,
    GateUpLayout,
)
from quant_fp8.formats import refuse
from quant_fp8.schemes import ROW_WISE, SCHEMES

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

FP8_TRITON = attrs.evolve(
    FP8_TORCH,
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    device_types=frozenset({"cuda"}),
    min_compute_capability=(8, 9),  # the first with conversions to e4m3 and matrix instructions for it
    router_weight_on_input=False,  # with K > 1 each choice of a token would be quantized anew
    graph_capturable=True,
    hidden_alignment=FP8_ALIGNMENT,
    intermediate_alignment=FP8_ALIGNMENT,
    refuse=refuse,
)


def probe_triton() -> Availability:
    """Whether the compiler is there; the device is asked for by the record."""
    if importlib.util.find_spec("triton") is None:
        return Availability(
            False,
            'triton is not installed: pip install "moe-core[triton]" (CUDA and ROCm builds of torch bring their own)',
        )
    return Availability(True)
