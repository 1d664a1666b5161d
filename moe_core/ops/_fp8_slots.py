"""Runs the FP8 slots path: two kernels (see `_kernels/fp8_slots.py`).

T tokens · H hidden · I intermediate · K top-k.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_core.ops._fp8_weights import FP8_GROUP, Fp8Weights
from moe_core.ops._launch import ExpertsProblem, SlotsConfig
from moe_core.ops._runtime import KernelLaunch

MAX_UNROLLED = 16  # blocks of the second dot product: beyond this the unrolled code is larger than what it hides


class Fp8SlotsRunner:
    """Two launches with everything but the step's own tensors bound."""

    def __init__(self, weights: Fp8Weights, problem: ExpertsProblem, config: SlotsConfig):
        self._weights, self._problem, self._config = weights, problem, config
        self._blocks = -(-problem.intermediate_size // config.up_n), -(-problem.hidden_size // config.down_n)
        # With one token an expert gets one row, so the scale of its input is the row's.
        self._quant = "row" if weights.format.activations == "tensor" else weights.format.activations
        self._up: dict[bool, KernelLaunch] = {}
        self._down = self._prepare_down()
        self._bound = [
            half for name in ("w13", "scale13", "input13", "bias13") for half in weights.halves(name)
        ]  # fmt: skip

    def _constants(self) -> dict[str, Any]:
        problem, spec = self._problem, self._weights.format
        return {
            "H": problem.hidden_size, "I": problem.intermediate_size, "K": problem.top_k, "WEIGHT": spec.weights,
            "POWER_OF_TWO": spec.power_of_two, "PDL": self._config.pdl,
        }  # fmt: skip

    def _prepare_up(self, given: bool) -> KernelLaunch:
        from moe_core.ops._kernels.fp8_slots import fp8_slots_up_kernel

        config = self._config
        return KernelLaunch(
            fp8_slots_up_kernel,
            {**self._constants(), **self._weights.up_constants(), **self._weights.activation_constants(),
             "QUANT": "given" if given else self._quant, "XG": FP8_GROUP if self._quant == "group" else 0,
             "BN": config.up_n, "BK": config.up_k},
            warps=config.up_warps, pdl=config.pdl,
        )  # fmt: skip

    def _prepare_down(self) -> KernelLaunch:
        from moe_core.ops._kernels.fp8_slots import fp8_slots_down_kernel

        config, top_k = self._config, self._problem.top_k
        return KernelLaunch(
            fp8_slots_down_kernel,
            {**self._constants(), **self._weights.down_constants(), "IE": 1, "QUANT": self._quant,
             "KP": 1 << (top_k - 1).bit_length(), "BN": config.down_n, "BK": config.down_k,
             "UNROLL": self._problem.intermediate_size <= config.down_k * MAX_UNROLLED},
            warps=config.down_warps, pdl=config.pdl,
        )  # fmt: skip

    def __call__(
        self,
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        ids: torch.Tensor,
        router_weights: torch.Tensor,
        workspace: dict[str, torch.Tensor],
        out: torch.Tensor,
        num_rows: torch.Tensor | None,
    ) -> None:
        weights = self._weights
        tokens, top_k = ids.shape
        act = workspace["act"]
        given = x_scale is not None
        up = self._up.get(given)
        if up is None:
            up = self._up[given] = self._prepare_up(given)
        stride_x, stride_out = x.stride(0), out.stride(0)
        stride_xs = 0 if x_scale is None else x_scale.stride(0)
        pointers = x.data_ptr() | ids.data_ptr() | router_weights.data_ptr() | act.data_ptr() | out.data_ptr()
        if x_scale is not None:
            pointers |= x_scale.data_ptr()
        key = None
        if pointers % 16 == 0 and (num_rows is None or num_rows.data_ptr() % 16 == 0):
            key = (stride_x, stride_xs, stride_out, ids.dtype, num_rows is None)
        up(
            (self._blocks[0], tokens * top_k, 1), key,
            x, x_scale, ids, num_rows, *self._bound, act, stride_x, stride_xs,
        )  # fmt: skip
        self._down(
            (self._blocks[1], tokens, 1), key,
            act, ids, router_weights, num_rows, weights.w2, weights.scale2, weights.input2, weights.bias2, out,
            stride_out,
        )  # fmt: skip
