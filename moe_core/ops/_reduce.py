"""Launches the weighted sum over each token's K expert rows (see `_kernels/reduce.py`).

T tokens · H hidden · K top-k.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from moe_core.ops._launch import ExpertsProblem
from moe_core.ops._runtime import KernelLaunch


class ReduceLaunch:
    """out[t] = sum over k of router_weights[t, k] * y[row of slot t * K + k], in the order of k."""

    def __init__(self, problem: ExpertsProblem, weight_on_input: bool, pdl: bool):
        from moe_core.ops._kernels.reduce import reduce_kernel

        # 1024 columns are 16 bytes a thread with 4 warps in 16-bit types; fewer only where H is small.
        block = min(1024, max(64, 1 << (problem.hidden_size - 1).bit_length()))
        self._blocks = -(-problem.hidden_size // block)
        self._launch = KernelLaunch(
            reduce_kernel,
            {"H": problem.hidden_size, "K": problem.top_k, "WEIGHT_ON_INPUT": weight_on_input, "BH": block, "PDL": pdl},
            warps=4, pdl=pdl,
        )  # fmt: skip

    def __call__(
        self,
        y: torch.Tensor,
        ids: torch.Tensor,
        router_weights: torch.Tensor,
        row_of_slot: torch.Tensor | None,
        num_rows: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        stride_out = out.stride(0)
        pointers = y.data_ptr() | ids.data_ptr() | router_weights.data_ptr() | out.data_ptr()
        key = None
        if pointers % 16 == 0 and (num_rows is None or num_rows.data_ptr() % 16 == 0):
            key = (stride_out, ids.dtype, num_rows is None)
        grid = (ids.shape[0], self._blocks, 1)
        self._launch(grid, key, y, ids, router_weights, row_of_slot, num_rows, out, stride_out)


class ReduceFewLaunch:
    """The same where `num_rows` is given: most rows may not be there, as where ranks share buffers."""

    def __init__(self, problem: ExpertsProblem, pdl: bool):
        from moe_core.ops._kernels.reduce import reduce_few_kernel

        block = min(1024, max(64, 1 << (problem.hidden_size - 1).bit_length()))
        self._blocks = -(-problem.hidden_size // block)
        constants = {"H": problem.hidden_size, "K": problem.top_k, "BH": block, "PDL": pdl}
        self._launch = KernelLaunch(reduce_few_kernel, constants, warps=4, pdl=pdl)

    def __call__(
        self,
        y: torch.Tensor,
        ids: torch.Tensor,
        router_weights: torch.Tensor,
        row_of_slot: torch.Tensor,
        num_rows: torch.Tensor,
        out: torch.Tensor,
        key: Hashable,
    ) -> None:
        """`key` as for `KernelLaunch`; equal keys must mean equal dtypes of ids."""
        grid = (ids.shape[0], self._blocks, 1)
        self._launch(grid, key, y, ids, router_weights, row_of_slot, num_rows, out, out.stride(0))
