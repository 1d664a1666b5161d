"""Runs the scan path: three kernels, or two by slot (see `_kernels/scan.py` and `_kernels/reduce.py`).

T tokens · H hidden · I intermediate · E_l local experts · K top-k.
"""

from __future__ import annotations

import torch

from moe_core.ops._launch import MAX_BY_SLOT, ExpertsProblem, ScanConfig
from moe_core.ops._reduce import ReduceLaunch
from moe_core.ops._runtime import KernelLaunch
from moe_core.ops._weights import LayerWeights, stride_constants


class ScanRunner:
    """Two or three launches; the compiled kernels depend on T only through the power of 2 above T·K."""

    def __init__(self, weights: LayerWeights, problem: ExpertsProblem, config: ScanConfig, weight_on_input: bool):
        self._weights = weights
        self._problem = problem
        self._config = config
        self._weight_on_input = weight_on_input
        self._launches: dict[int, tuple[KernelLaunch, KernelLaunch]] = {}
        self._reduce = ReduceLaunch(problem, weight_on_input, config.pdl)

    def _prepare(self, slots: int) -> tuple[KernelLaunch, KernelLaunch]:
        from moe_core.ops._kernels.scan import scan_down_kernel, scan_up_kernel

        problem, config = self._problem, self._config
        sizes = {
            "H": problem.hidden_size, "I": problem.intermediate_size, "K": problem.top_k, "SLOTS": slots,
            "WEIGHT_ON_INPUT": self._weight_on_input, "PRECISION": "ieee", "BY_SLOT": config.by_slot, "PDL": config.pdl,
        }  # fmt: skip
        up, down = config.up, config.down
        return (
            KernelLaunch(
                scan_up_kernel,
                {**sizes, **stride_constants(self._weights.w13), **self._weights.activation_constants(),
                 "BM": up.block_m, "BN": up.block_n, "BK": up.block_k, "STAGES": up.stages,
                 "ARRIVALS": -(-problem.hidden_size // down.block_n) if config.by_slot else 0},
                warps=up.warps, stages=up.stages, pdl=config.pdl,
            ),
            KernelLaunch(
                scan_down_kernel,
                {**sizes, **stride_constants(self._weights.w2), "BM": down.block_m, "BN": down.block_n,
                 "BK": down.block_k, "STAGES": down.stages},
                warps=down.warps, stages=down.stages, pdl=config.pdl,
            ),
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
        weights, problem = self._weights, self._problem
        num_slots = ids.numel()
        padded = 1 << max(num_slots - 1, 15).bit_length()
        launches = self._launches.get(padded)
        if launches is None:
            launches = self._launches[padded] = self._prepare(padded)
        up, down = launches
        act, y = workspace["act"], workspace["y"]
        arrivals = workspace.get("arrivals")
        stride_x, stride_out = x.stride(0), out.stride(0)
        pointers = (
            x.data_ptr() | ids.data_ptr() | router_weights.data_ptr() | act.data_ptr() | y.data_ptr() | out.data_ptr()
        )
        key = None
        if pointers % 16 == 0 and (num_rows is None or num_rows.data_ptr() % 16 == 0):
            key = (stride_x, stride_out, ids.dtype, num_rows is None)
        config = self._config
        if config.by_slot and ids.shape[0] > MAX_BY_SLOT:
            raise ValueError(
                f"ScanConfig.by_slot serves at most {MAX_BY_SLOT} tokens, not {ids.shape[0]}; end its range there"
            )
        programs = num_slots if config.by_slot else problem.num_experts
        up(
            (-(-problem.intermediate_size // config.up.block_n), programs, 1), key,
            x, ids, router_weights, num_rows, weights.w13, weights.bias13, act, arrivals, num_slots, stride_x,
        )  # fmt: skip
        down(
            (-(-problem.hidden_size // config.down.block_n), programs, 1), key,
            act, ids, router_weights, num_rows, weights.w2, weights.bias2, y, out, arrivals, num_slots, stride_out,
        )  # fmt: skip
        if not config.by_slot:
            self._reduce(y, ids, router_weights, None, num_rows, out)
