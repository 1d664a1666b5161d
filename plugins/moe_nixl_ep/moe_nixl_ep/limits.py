"""What NIXL EP's low-latency mode takes, by version, and the sizes that follow. Pure arithmetic.

Shape letters: T tokens on this rank · H hidden · E experts, global · E_l local experts · K top-k · W ranks ·
M the largest T of any rank (`MoEConfig.max_tokens_per_rank`) · S slots per (source rank, local expert), M rounded up.

Source: the library's own checks (`examples/device/ep` of ai-dynamo/nixl, 1.1.0 to 1.5.1) and the wheels' kernels.
"""

from __future__ import annotations

import math

import attrs
import torch

from moe_core.config import Problem
from moe_core.types import MODEL_DTYPE_PAYLOAD, DispatchFootprint

MAX_TOKENS = 1024
"""M: the kernels count arrivals below a tag of this value."""
MAX_EXPERTS = 14 * 132
"""E: one warp group for each expert, on as many streaming multiprocessors as an H100 or H200 has."""
SCALE_GROUP = 128
"""Columns that share a scale of an fp8 payload."""
FP8_PAYLOADS = {"fp8_block": False, "fp8_block_ue8m0": True}
"""Schemes whose activations the library quantizes by itself → does it round scales up to powers of two?"""
WORKSPACE_BYTES = 32 << 20
"""What the library allocates beside the communication buffer."""

Version = tuple[int, ...]


@attrs.frozen
class Limits:
    """What changed between versions and can't be asked of the library.

    Attributes:
        hidden_sizes: the widths of a row that its kernels are compiled for, rising.
        max_topk: K.
    """

    hidden_sizes: tuple[int, ...]
    max_topk: int


_FIRST = Limits((2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192), 11)
_FROM_1_5 = Limits((2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192), 16)


def limits_of(version: Version | None) -> Limits:
    """The limits of a version of the library; of an unknown one (None), those that hold in all."""
    return _FROM_1_5 if version is not None and version >= (1, 5) else _FIRST


def parse_version(text: str) -> Version:
    """ "1.5.1" → (1, 5, 1); what isn't a number ends it."""
    numbers: list[int] = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def wire_hidden(hidden: int, limits: Limits) -> int:
    """The width of a row on the wire: the least that the kernels have and H fits in."""
    return next(size for size in limits.hidden_sizes if size >= hidden)


def slots_per_rank(max_tokens: int, ranks: int) -> int:
    """S: the least number not below M for which S · W is a multiple of 4, as the kernels ask for."""
    step = 4 // math.gcd(ranks, 4)
    return -(-max_tokens // step) * step


def buffer_bytes(slots: int, hidden: int, num_experts: int) -> int:
    """The communication buffer of one rank: send and receive areas of two halves, and their signals."""
    row = hidden * torch.bfloat16.itemsize + hidden // SCALE_GROUP * torch.float32.itemsize
    signals = -(-8 * num_experts // 128) * 128
    return num_experts * slots * row * 4 + 2 * signals


def refuse(problem: Problem, limits: Limits) -> str | None:
    """Why the library can't serve a layer, where no field of the capabilities says it."""
    config, parallel = problem.config, problem.parallel
    ranks, scheme = parallel.ep_size, problem.scheme
    if problem.device.name.startswith("AMD"):
        return f"runs on NVIDIA GPUs, not on {problem.device.name}"
    if ranks > 1 and parallel.tokens_are_replicated:
        return f"all {ranks} ranks have the same tokens, so that nothing needs to travel; dispatch local serves that"
    if ranks > 8 and ranks % 8:
        return f"ep_size = {ranks}: beyond 8 ranks, only multiples of 8"
    if config.experts_hidden_size > limits.hidden_sizes[-1]:
        return f"hidden size {config.experts_hidden_size}: at most {limits.hidden_sizes[-1]}"
    if config.top_k > limits.max_topk:
        return f"top_k = {config.top_k}: at most {limits.max_topk} in this version of NIXL EP"
    if config.num_experts > MAX_EXPERTS:
        return f"num_experts = {config.num_experts}: at most {MAX_EXPERTS}"
    if scheme.name in FP8_PAYLOADS and scheme.activation and scheme.activation.group_shape != (1, SCALE_GROUP):
        columns = scheme.activation.group_shape[1]
        return f"scheme {scheme.name} with groups of {columns}: the library quantizes groups of {SCALE_GROUP}"
    return None


def footprint(problem: Problem, payload: str, tokens: int, limits: Limits) -> DispatchFootprint:
    """One row for each choice, there and back; blocks of S · W slots for each local expert, filled or not."""
    config, ranks = problem.config, problem.parallel.ep_size
    assert config.max_tokens_per_rank is not None, "selection asks for it"
    wire = wire_hidden(config.experts_hidden_size, limits)
    capacity = slots_per_rank(config.max_tokens_per_rank, ranks) * ranks
    slots = problem.num_local_experts * capacity
    plain = wire * torch.bfloat16.itemsize
    quantized = payload != MODEL_DTYPE_PAYLOAD
    wire_scales = wire // SCALE_GROUP * torch.float32.itemsize if quantized else 0
    values = wire if quantized else plain
    scales = -(-config.experts_hidden_size // SCALE_GROUP) * torch.float32.itemsize if quantized else 0
    header = 16  # the token's index travels in front of its row
    remote = tokens * config.top_k * (ranks - 1) / ranks  # of all ranks' choices, those of this rank's experts
    padded = wire != config.experts_hidden_size
    layout = problem.num_local_experts * (ranks * torch.int64.itemsize + torch.int32.itemsize)
    ids = tokens * config.top_k * torch.int32.itemsize
    return DispatchFootprint(
        rows=capacity,
        dispatch_wire_bytes=round(remote * (header + values + wire_scales)),
        combine_wire_bytes=round(remote * plain),
        held_bytes=slots * (values + scales + torch.int32.itemsize + (plain if padded else 0)) + layout + ids,
        scratch_bytes=(tokens * plain if padded else 0) + slots * wire_scales,
        buffer_bytes=buffer_bytes(capacity // ranks, wire, config.num_experts) + WORKSPACE_BYTES,
        own_output=padded,
    )
