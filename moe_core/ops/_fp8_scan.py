"""Runs the FP8 scan path: quantize, up, quantize, down, and by expert reduce (see `_kernels/fp8_scan.py`).

T tokens · H hidden · I intermediate · E_l local experts · K top-k.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from moe_core.ops._fp8_quantize import QuantizeByExpert, QuantizeRows
from moe_core.ops._fp8_weights import Fp8Weights, triton_dtype
from moe_core.ops._launch import MAX_BY_SLOT, ExpertsProblem, ScanConfig
from moe_core.ops._reduce import ReduceLaunch
from moe_core.ops._runtime import KernelLaunch


class Fp8ScanRunner:
    """Two to five launches; the compiled kernels depend on T only through the power of 2 above T·K."""

    def __init__(self, weights: Fp8Weights, problem: ExpertsProblem, config: ScanConfig, dtype: torch.dtype):
        self._weights, self._problem, self._config, self._dtype = weights, problem, config, dtype
        spec, pdl = weights.format, config.pdl
        self._quant = spec.activations
        assert self._quant != "tensor", "scales of all rows of an expert belong to the grouped path"
        self._rows_13 = self._rows_2 = self._by_expert = None
        self._buffers = ["act", "y", "arrivals"]  # each costs host time when it is first looked at, so no others
        if self._quant in ("group", "row"):
            self._buffers += ["x_q", "x_scale", "act_q", "act_scale"]
            options = {"by_group": self._quant == "group", "power_of_two": spec.power_of_two, "pdl": pdl}
            self._rows_13 = QuantizeRows(problem.hidden_size, **options)
            self._rows_2 = QuantizeRows(problem.intermediate_size, **options)
        elif self._quant == "static":
            self._buffers += ["act_q"]
            stride = weights.halves("input13")[0].stride(0)
            self._by_expert = QuantizeByExpert(problem.hidden_size, problem.num_experts, problem.top_k, stride, pdl=pdl)
        self._gates = [half for name in ("w13", "scale13", "input13") for half in weights.halves(name)]
        self._launches: dict[int, tuple[KernelLaunch, KernelLaunch]] = {}
        self._reduce = ReduceLaunch(problem, False, pdl)

    def _prepare(self, slots: int) -> tuple[KernelLaunch, KernelLaunch]:
        from moe_core.ops._kernels.fp8_scan import fp8_scan_down_kernel, fp8_scan_up_kernel

        problem, config, weights = self._problem, self._config, self._weights
        sizes: dict[str, Any] = {
            "H": problem.hidden_size, "I": problem.intermediate_size, "K": problem.top_k, "SLOTS": slots,
            "WEIGHT": weights.format.weights, "QUANT": self._quant, "IE2": 1, "BY_SLOT": config.by_slot,
            "PDL": config.pdl,
        }  # fmt: skip
        up, down = config.up, config.down
        return (
            KernelLaunch(
                fp8_scan_up_kernel,
                {**sizes, **weights.up_constants(), **weights.activation_constants(),
                 "DTYPE": triton_dtype(self._dtype), "BM": up.block_m, "BN": up.block_n, "BK": up.block_k,
                 "STAGES": up.stages, "ARRIVALS": -(-problem.hidden_size // down.block_n)},
                warps=up.warps, stages=up.stages, pdl=config.pdl,
            ),
            KernelLaunch(
                fp8_scan_down_kernel,
                {**sizes, **weights.down_constants(), "GROUPS": weights.format.scale_columns(problem.intermediate_size),
                 "BM": down.block_m, "BN": down.block_n, "BK": down.block_k, "STAGES": down.stages},
                warps=down.warps, stages=down.stages, pdl=config.pdl,
            ),
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
        weights, problem, config = self._weights, self._problem, self._config
        num_slots = ids.numel()
        if config.by_slot and ids.shape[0] > MAX_BY_SLOT:
            raise ValueError(
                f"ScanConfig.by_slot serves at most {MAX_BY_SLOT} tokens, not {ids.shape[0]}; end its range there"
            )
        padded = 1 << max(num_slots - 1, 15).bit_length()
        launches = self._launches.get(padded)
        if launches is None:
            launches = self._launches[padded] = self._prepare(padded)
        up, down = launches
        space = {name: workspace[name] for name in self._buffers}
        key = step_key((x, x_scale, ids, router_weights, out, num_rows), space.values(), x, x_scale, ids, out, num_rows)
        act, y, arrivals = space["act"], space["y"], space["arrivals"]
        rows = x_up = x
        act_in, act_scale = act, None
        if self._by_expert is not None:
            rows, x_up = quantized_twice(y, num_slots, problem.hidden_size)
            gate, up_scale = self._gates[4:6]
            self._by_expert(x, ids, None, None, rows, x_up, gate, up_scale, num_rows, 0, key)
            act = act_in = space["act_q"]
        elif self._rows_13 is not None and x_scale is None:
            rows, x_scale = space["x_q"], space["x_scale"]
            self._rows_13(x, rows, x_scale, key)
        programs = num_slots if config.by_slot else problem.num_experts
        up(
            (-(-problem.intermediate_size // config.up.block_n), programs, 1), key,
            rows, x_up, x_scale, ids, num_rows, *self._gates, weights.input2, *weights.halves("bias13"), act,
            arrivals, num_slots, rows.stride(0), 0 if x_scale is None else x_scale.stride(0),
        )  # fmt: skip
        if self._rows_2 is not None:
            act_in, act_scale = space["act_q"], space["act_scale"]
            self._rows_2(act if act.shape[0] == num_slots else act[:num_slots], act_in, act_scale, key)
        down(
            (-(-problem.hidden_size // config.down.block_n), programs, 1), key,
            act_in, act_scale, ids, router_weights, num_rows, weights.w2, weights.scale2, weights.input2, weights.bias2,
            y, out, arrivals, num_slots, out.stride(0),
        )  # fmt: skip
        if not config.by_slot:
            self._reduce(y, ids, router_weights, None, num_rows, out)


def quantized_twice(y: torch.Tensor, rows: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two e4m3 buffers `[rows, hidden]` in the memory of y, which is written only after they were read."""
    both = y.view(torch.float8_e4m3fn).view(-1, hidden)
    return both[:rows], both[rows : 2 * rows]


def step_key(
    given: tuple[torch.Tensor | None, ...], buffers: Iterable[torch.Tensor], x: torch.Tensor,
    x_scale: torch.Tensor | None, ids: torch.Tensor | None, out: torch.Tensor, num_rows: torch.Tensor | None,
) -> tuple[object, ...] | None:  # fmt: skip
    """The key of `KernelLaunch` for a step, None where a pointer is not on a 16-byte border."""
    pointers = 0
    for tensor in given:
        if tensor is not None:
            pointers |= tensor.data_ptr()
    for buffer in buffers:
        pointers |= buffer.data_ptr()
    if pointers % 16:
        return None
    return (
        x.stride(0), None if x_scale is None else x_scale.stride(0), out.stride(0), None if ids is None else ids.dtype,
        num_rows is None,
    )  # fmt: skip
