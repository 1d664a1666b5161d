"""Launches the quantizers of activations (see `_kernels/fp8_quantize.py`).

T tokens · E_l local experts · K top-k · C row capacity.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from moe_core.ops._fp8_weights import FP8_GROUP
from moe_core.ops._runtime import KernelLaunch

AMAX_PARTS = 8  # programs that share the rows of one expert


class QuantizeRows:
    """Rows `[rows, length]` → e4m3 and float32 scales, of groups of 128 or of whole rows.

    `beside`: runs beside the kernel before it, which must have nothing to do with it.
    """

    def __init__(self, length: int, *, by_group: bool, power_of_two: bool, pdl: bool, beside: bool = False):
        from moe_core.ops._kernels.fp8_quantize import quantize_kernel

        size = FP8_GROUP if by_group else 1 << (length - 1).bit_length()
        groups = -(-length // size)
        per_program = min(16, 1 << (groups - 1).bit_length()) if by_group else 1
        self._programs = -(-groups // per_program)
        self._launch = KernelLaunch(
            quantize_kernel,
            {"LEN": length, "GS": size, "GROUPS": groups, "BG": per_program, "POWER_OF_TWO": power_of_two, "PDL": pdl,
             "WAIT_LAST": beside},
            warps=min(8, max(1, size * per_program // 512)), pdl=pdl,
        )  # fmt: skip

    def __call__(
        self, x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, key: Hashable,
        row_end: torch.Tensor | None = None, capacity: int = 0,
    ) -> None:  # fmt: skip
        """x: unit stride in its last dim; with `row_end`, rows e * C + i from row_end[e] on are left out."""
        self._launch((x.shape[0], self._programs, 1), key, x, q, scale, row_end, capacity, x.stride(0))


class QuantizeByExpert:
    """The input of each expert, under one scale an expert. K: choices that x's rows stand for; 0: rows are q's own."""

    def __init__(self, length: int, num_experts: int, top_k: int, stride: int, *, pdl: bool):
        from moe_core.ops._kernels.fp8_quantize import quantize_by_expert_kernel

        block = min(2048, 1 << (length - 1).bit_length())
        self._programs = -(-length // block)
        self._launch = KernelLaunch(
            quantize_by_expert_kernel,
            {"LEN": length, "BLOCK": block, "K": max(top_k, 1), "E": num_experts, "SCALE_STRIDE": stride,
             "GATHER": top_k > 0, "PDL": pdl},
            warps=4, pdl=pdl,
        )  # fmt: skip

    def __call__(
        self, x: torch.Tensor, ids: torch.Tensor | None, slot_of_row: torch.Tensor | None,
        row_end: torch.Tensor | None, q: torch.Tensor, q_up: torch.Tensor | None, scale: torch.Tensor,
        scale_up: torch.Tensor | None, num_rows: torch.Tensor | None, capacity: int, key: Hashable,
    ) -> None:  # fmt: skip
        self._launch(
            (q.shape[0], self._programs, 1), key,
            x, ids, slot_of_row, row_end, q, q_up, scale, scale_up, num_rows, capacity, x.stride(0),
        )  # fmt: skip


class ExpertScales:
    """One scale an expert from the rows that it gets. K as for `QuantizeByExpert`."""

    def __init__(self, length: int, num_experts: int, top_k: int, *, batched: bool, pdl: bool):
        from moe_core.ops._kernels.fp8_quantize import expert_amax_kernel, expert_scale_kernel

        block = min(4096, 1 << (length - 1).bit_length())
        self._experts = num_experts
        self._amax = KernelLaunch(
            expert_amax_kernel,
            {"LEN": length, "BLOCK": block, "K": max(top_k, 1), "GATHER": top_k > 0, "PADDED": batched,
             "PARTS": AMAX_PARTS, "PDL": pdl},
            warps=4, pdl=pdl,
        )  # fmt: skip
        self._scale = KernelLaunch(expert_scale_kernel, {"PARTS": AMAX_PARTS, "PDL": pdl}, warps=1, pdl=pdl)

    def __call__(
        self, x: torch.Tensor, slot_of_row: torch.Tensor | None, row_end: torch.Tensor, partial: torch.Tensor,
        scale: torch.Tensor, capacity: int, key: Hashable,
    ) -> None:  # fmt: skip
        grid = (self._experts, AMAX_PARTS, 1)
        self._amax(grid, key, x, slot_of_row, row_end, partial, capacity, x.stride(0))
        self._scale((self._experts, 1, 1), key, partial, scale)
