"""What a dispatch costs one rank, in bytes: the arithmetic that backends share when they declare a `footprint`.

Host arithmetic only. What depends on the routing is taken in the mean over uniform routing: every set of K different
experts is equally likely, for every token.

Shape letters: T tokens on this rank · H hidden · E experts, global · E_l local experts · K top-k · W ranks.
"""

from __future__ import annotations

import torch

from moe_core import formats
from moe_core.config import Problem
from moe_core.types import MODEL_DTYPE_PAYLOAD


def payload_row_bytes(problem: Problem, payload: str) -> tuple[int, int]:
    """(bytes of a row's H values, bytes of its scales) as `payload` carries them."""
    hidden, spec = problem.config.experts_hidden_size, problem.scheme.activation
    if payload == MODEL_DTYPE_PAYLOAD or spec is None:
        return hidden * problem.config.dtype.itemsize, 0
    values = hidden // formats.codes_per_byte(spec) * formats.storage_dtype(spec).itemsize
    _, groups = formats.scale_shape(spec.group_shape, 1, hidden)
    return values, groups * formats.scale_dtype(spec).itemsize


def quantizing_bytes(problem: Problem, payload: str, rows: int) -> int:
    """What quantizing rows for `payload` has allocated at most: the result, and five arrays in fp32 of `formats`."""
    if payload == MODEL_DTYPE_PAYLOAD:
        return 0
    row = sum(payload_row_bytes(problem, payload)) + 5 * problem.config.experts_hidden_size * torch.float32.itemsize
    return rows * row


def share_of_tokens(problem: Problem) -> float:
    """The probability that a token has a choice among this rank's experts: 1 - (E - E_l choose K) / (E choose K)."""
    config, own = problem.config, problem.num_local_experts
    none = 1.0
    for taken in range(config.top_k):
        none *= max(config.num_experts - own - taken, 0) / (config.num_experts - taken)
    return 1 - none


def aligned(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment
