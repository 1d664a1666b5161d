"""Runs the slots path: two kernels (see `_kernels/slots.py`).

T tokens · H hidden · I intermediate · K top-k.
"""

from __future__ import annotations

import torch

from moe_core.ops._launch import ExpertsProblem, SlotsConfig
from moe_core.ops._runtime import KernelLaunch
from moe_core.ops._weights import LayerWeights, stride_constants

MAX_UNROLLED = 32  # blocks of a dot product: beyond this the unrolled code is larger than what it hides


class SlotsRunner:
    """Two launches with everything but the step's own tensors bound."""

    def __init__(self, weights: LayerWeights, problem: ExpertsProblem, config: SlotsConfig, weight_on_input: bool):
        from moe_core.ops._kernels.slots import slots_down_kernel, slots_up_kernel

        hidden, intermediate, top_k = problem.hidden_size, problem.intermediate_size, problem.top_k
        sizes = {"H": hidden, "I": intermediate, "K": top_k, "WEIGHT_ON_INPUT": weight_on_input, "PDL": config.pdl}
        self._weights = weights
        self._up_blocks = -(-intermediate // config.up_n)
        self._down_blocks = -(-hidden // config.down_n)
        self._top_k = top_k
        self._up = KernelLaunch(
            slots_up_kernel,
            {**sizes, **stride_constants(weights.w13), **weights.activation_constants(), "BN": config.up_n,
             "BK": config.up_k, "UNROLL": hidden // config.up_k <= MAX_UNROLLED},
            warps=config.up_warps, pdl=config.pdl,
        )  # fmt: skip
        preload = min(config.preload, -(-intermediate // config.down_k))
        self._down = KernelLaunch(
            slots_down_kernel,
            {**sizes, **stride_constants(weights.w2), "KP": 1 << (top_k - 1).bit_length(), "BN": config.down_n,
             "BK": config.down_k, "PRELOAD": preload, "UNROLL": intermediate // config.down_k <= MAX_UNROLLED // 2},
            warps=config.down_warps, pdl=config.pdl,
        )  # fmt: skip

    def __call__(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        router_weights: torch.Tensor,
        workspace: dict[str, torch.Tensor],
        out: torch.Tensor,
        num_rows: torch.Tensor | None,
    ) -> None:
        weights = self._weights
        tokens = ids.shape[0]
        act = workspace["act"]
        stride_x, stride_out = x.stride(0), out.stride(0)
        pointers = x.data_ptr() | ids.data_ptr() | router_weights.data_ptr() | act.data_ptr() | out.data_ptr()
        key = None
        if pointers % 16 == 0 and (num_rows is None or num_rows.data_ptr() % 16 == 0):
            key = (stride_x, stride_out, ids.dtype, num_rows is None)
        self._up(
            (self._up_blocks, tokens * self._top_k, 1), key,
            x, ids, router_weights, num_rows, weights.w13, weights.bias13, act, stride_x,
        )  # fmt: skip
        self._down(
            (self._down_blocks, tokens, 1), key,
            act, ids, router_weights, num_rows, weights.w2, weights.bias2, out, stride_out,
        )  # fmt: skip
