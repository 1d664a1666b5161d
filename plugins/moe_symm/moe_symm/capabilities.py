"""What each form of the dispatch declares. Imports no kernels."""

from __future__ import annotations

import attrs
import torch

from moe_core import types
from moe_symm import limits
from moe_symm.availability import this_host
from moe_symm.layout import LANES, MAX_RANKS, Form

SYMM = types.DispatchCapabilities(
    activation_format=types.ActivationFormat.STANDARD,
    dtypes=frozenset({torch.bfloat16, torch.float16, torch.float32}),
    device_types=frozenset({"cuda"}),
    payloads=frozenset({types.MODEL_DTYPE_PAYLOAD, *limits.FP8_PAYLOADS}),
    accepts_dropped_ids=True,
    accepts_duplicate_ids=True,
    placements=frozenset(types.ExpertPlacement),
    min_ep_size=2,
    max_ep_size=MAX_RANKS,
    carries_tokens=True,
    output_reduced=True,
    split=True,
    max_in_flight=LANES,
    shared_in_flight=True,
    overlap_safe=True,
    graph_capturable=True,
    deterministic=True,
    max_topk=limits.MAX_TOPK,
    max_tokens_per_rank=limits.MAX_TOKENS,
    min_compute_capability=(9, 0),
    refuse=lambda problem: limits.refuse(problem, this_host()),
    footprint=limits.footprint_of(Form.STANDARD),
)
BY_EXPERT = attrs.evolve(
    SYMM,
    activation_format=types.ActivationFormat.BATCHED,
    owns=types.BATCHED_FINALIZE_DUTIES,
    accepts_duplicate_ids=False,
    max_tokens_per_rank=limits.MAX_TOKENS_BY_EXPERT,
    footprint=limits.footprint_of(Form.BATCHED),
)
EXACT = attrs.evolve(BY_EXPERT, footprint=limits.footprint_of(Form.EXACT))
