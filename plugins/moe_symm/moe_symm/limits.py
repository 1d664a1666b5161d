"""What a layer must be like, and what it costs in bytes. Pure arithmetic.

Shape letters: T tokens on this rank · M the largest T of any rank · H hidden · G groups of 128 columns · E_l local
experts · C = W · M row capacity of an expert · K top-k · W ranks.
"""

from __future__ import annotations

import torch

from moe_core.config import Problem
from moe_core.footprint import share_of_tokens
from moe_core.quant import ScaleFormat
from moe_core.types import MODEL_DTYPE_PAYLOAD, DispatchFootprint, Footprint
from moe_symm.availability import Host
from moe_symm.layout import SCALE_GROUP, Form, Layout

MAX_TOKENS = 8192
"""M of the standard form: 1.9 GB a rank, at 4 ranks, H = 7168 and bf16."""
MAX_TOKENS_BY_EXPERT = 1024
"""M of the forms that give each expert rows of its own: at 4 ranks, H = 7168 and 64 experts, 3.8 GB a step in bf16."""
MAX_TOPK = 16
FP8_PAYLOADS = {"fp8_block": ScaleFormat.FP32, "fp8_block_ue8m0": ScaleFormat.UE8M0}
"""Schemes whose activations can be quantized as they are sent, in groups of 128 columns → how scales are stored."""


def layout_of(problem: Problem, form: Form = Form.STANDARD) -> Layout:
    config = problem.config
    assert config.max_tokens_per_rank is not None, "selection asks for it"
    return Layout(
        problem.parallel.ep_size,
        config.max_tokens_per_rank,
        config.experts_hidden_size,
        config.top_k,
        config.dtype.itemsize,
        form,
    )


def refuse(problem: Problem, host: Host) -> str | None:
    """Why a layer can't be served on this host, where no field of the capabilities says it."""
    ranks, scheme = problem.parallel.ep_size, problem.scheme
    if problem.device.name.startswith("AMD"):
        return f"runs on NVIDIA GPUs, not on {problem.device.name}"
    if ranks > 1 and problem.parallel.tokens_are_replicated:
        return f"all {ranks} ranks have the same tokens, so that nothing needs to travel; dispatch local serves that"
    if host.gpus is not None and ranks > host.gpus:
        return f"ep_size = {ranks}, and this host has {host.gpus} GPUs: all ranks must be on one host, one per GPU"
    if scheme.name in FP8_PAYLOADS and scheme.activation and scheme.activation.group_shape != (1, SCALE_GROUP):
        columns = scheme.activation.group_shape[1]
        return f"scheme {scheme.name} with groups of {columns}: rows are quantized in groups of {SCALE_GROUP}"
    return None


def footprint_of(form: Form) -> Footprint:
    """A row per token and rank with a chosen expert, there and back; in the exact form, a row per choice back."""

    def footprint(problem: Problem, payload: str, tokens: int) -> DispatchFootprint:
        config, layout = problem.config, layout_of(problem, form)
        quantized = payload != MODEL_DTYPE_PAYLOAD
        plain = config.experts_hidden_size * config.dtype.itemsize
        row = config.experts_hidden_size + layout.groups * torch.float32.itemsize if quantized else plain
        others = tokens * (layout.ranks - 1)
        arrived = others * share_of_tokens(problem)
        returned = others * config.top_k / layout.ranks if form is Form.EXACT else arrived
        choices = config.top_k * (torch.int32.itemsize + torch.float32.itemsize)
        experts = 0 if form is Form.STANDARD else problem.num_local_experts  # standard: `x` is a view of the buffer
        return DispatchFootprint(
            rows=layout.rows,
            dispatch_wire_bytes=round(arrived * (row + choices)),
            combine_wire_bytes=round(returned * plain),
            held_bytes=experts * (layout.rows * row + torch.int32.itemsize),
            buffer_bytes=layout.total_bytes,
        )

    return footprint
