"""Launches the grouping of slots by expert (see `_kernels/align.py`).

T tokens · E_l local experts · K top-k; slot s = t * K + k.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from moe_core.ops._launch import ExpertsProblem
from moe_core.ops._runtime import KernelLaunch

VECTOR = 128  # ids that a warp loads at a time: 16 bytes a thread
KEPT = 1 << 17  # lines of 128 bytes, 16 MiB: twice as many gained less (H200, 50 MiB of L2)
LISTED = 32  # experts whose tiles one program orders: a histogram of 32 takes one lane each


class AlignLaunch:
    """Fills "slot_of_row", "row_of_slot", "row_end", "tile_expert" and "tile_row" of a workspace from the ids.

    Args:
        problem: sizes.
        block_m: rows of a tile.
        pdl: programmatic dependent launch.
        short: experts whose last tile has so many rows at most, and is not the only one, come before their neighbours.
        keep: ask for the first `KEPT` lines of x into L2.
    """

    def __init__(self, problem: ExpertsProblem, block_m: int, pdl: bool, short: int = 0, keep: bool = False):
        from moe_core.ops._kernels.align import align_kernel

        self._top_k = problem.top_k
        # Alone a program is done sooner; two experts in one save a second program on the same multiprocessor.
        pair = problem.num_experts > problem.num_sms
        programs = -(-problem.num_experts // 2) if pair else problem.num_experts
        lists = -(-problem.num_experts // LISTED) if short else 0
        self._grid = (programs + lists, 1, 1)
        constants = {
            "K": problem.top_k, "E": problem.num_experts, "BM": block_m, "VEC": VECTOR, "PAIR": pair,
            "SHORT": short, "LISTED": LISTED, "PDL": pdl, "H": problem.hidden_size, "KEEP": KEPT if keep else 0,
        }  # fmt: skip
        self._launches = {
            (by_4, warps): KernelLaunch(align_kernel, {**constants, "LANES": warps, "BY_4": by_4}, warps=warps, pdl=pdl)
            for by_4 in (False, True)
            for warps in (16, 32)
        }

    def __call__(
        self,
        ids: torch.Tensor,
        num_rows: torch.Tensor | None,
        workspace: Mapping[str, torch.Tensor],
        key: Hashable,
        x: torch.Tensor | None = None,
    ) -> None:
        """`key` as for `KernelLaunch`; equal keys must mean equal dtypes of ids and strides of x (only with `keep`)."""
        slots = ids.numel()
        by_4 = slots % 4 == 0 and (num_rows is None or self._top_k % 4 == 0)
        # 32 warps were 2 us slower at 8,192 slots, a little faster at 32,768, 5 us faster at 131,072.
        warps = 32 if slots > 16384 else 16
        self._launches[by_4, warps](
            self._grid, key, ids, num_rows, workspace["slot_of_row"], workspace["row_of_slot"], workspace["row_end"],
            workspace["tile_expert"], workspace["tile_row"], slots, x, 0 if x is None else x.stride(0),
        )  # fmt: skip
