"""Runs the FP8 stream path: up, down (see `_kernels/fp8_stream.py`).

T tokens · H hidden · I intermediate · E_l local experts · K top-k · U distinct experts of a step, its units.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_core.ops._fp8_gemm import e4m3_map
from moe_core.ops._fp8_launch import MAX_STREAM_PROGRAMS, MAX_STREAM_SLOTS, STREAM_TOKENS, Fp8StreamConfig
from moe_core.ops._fp8_scan import step_key
from moe_core.ops._fp8_weights import Fp8Weights
from moe_core.ops._launch import ExpertsProblem
from moe_core.ops._runtime import KernelLaunch

WEIGHT_ROWS = 64  # of one product
REGISTERS = 136
"""A thread's. A multiprocessor has room for one program, and a down program comes as an up program goes. Prototypes
with fewer, two programs beside one another, gave results that differed between runs; the reason was not found."""


class Fp8StreamRunner:
    """Two launches."""

    def __init__(self, weights: Fp8Weights, problem: ExpertsProblem, config: Fp8StreamConfig):
        spec = weights.format
        if not weights.plain or spec.activations not in ("group", "row", "static"):
            raise ValueError(
                f"{config} is for silu(gate) · up of two halves without clamp and biases, and for activations "
                f"quantized by groups, by rows or with static scales; {weights.activation}, {spec} need another path"
            )
        self._weights, self._problem, self._config = weights, problem, config
        self._w13 = e4m3_map(weights.w13.flatten(0, 1), WEIGHT_ROWS)
        self._w2 = e4m3_map(weights.w2.flatten(0, 1), WEIGHT_ROWS)
        self._up_scales = (*weights.halves("scale13"), *weights.halves("input13"))
        self._down_scales = (weights.scale2, weights.scale2, weights.input2, weights.input2)
        self._grid = (min(problem.num_sms, MAX_STREAM_PROGRAMS), 1, 1)
        self._launches: dict[tuple[int, bool], tuple[KernelLaunch, KernelLaunch]] = {}

    def _prepare(self, slots: int, given: bool) -> tuple[KernelLaunch, KernelLaunch]:
        from moe_core.ops._kernels.fp8_stream import fp8_stream_kernel

        problem, weights, config = self._problem, self._weights, self._config
        spec, hidden, inner = weights.format, problem.hidden_size, problem.intermediate_size
        gate = inner if weights.activation.gate_up_layout == "up_gate" else 0
        shared = {"K": problem.top_k, "SLOTS": slots, "WEIGHT": spec.weights, "POWER_OF_TWO": spec.power_of_two,
                  "AMAX": spec.activations == "row", "COUNTERS": _blocks(problem), "PARTS_AT": _parts_at(problem),
                  "AMAX_AT": _amax_at(problem)}  # fmt: skip

        def launch(up: bool, strides: dict[str, int], buffers: int, **own: Any) -> KernelLaunch:
            constants = {
                **shared, **own, "UP": up, "BUFFERS": buffers, "SE": strides["SE"],
                "SN": 0 if spec.weights == "tensor" else strides["SN"],
            }  # fmt: skip
            return KernelLaunch(fp8_stream_kernel, constants, warps=4, pdl=True, registers=REGISTERS)

        up, down = weights.up_constants(), weights.down_constants()
        return (
            launch(True, up, config.up_buffers, QUANT="given" if given else spec.activations, LEN=hidden, N=inner,
                   W_ROWS=2 * inner, FIRST=gate, SECOND=inner - 2 * gate, stride_in=up["IE"]),
            launch(False, down, config.down_buffers, QUANT=spec.activations, LEN=inner, N=hidden, W_ROWS=hidden,
                   FIRST=0, SECOND=WEIGHT_ROWS, stride_in=1),
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
        tokens, slots = ids.shape[0], ids.numel()
        if tokens > STREAM_TOKENS or slots > MAX_STREAM_SLOTS:
            raise ValueError(
                f"Fp8StreamConfig serves at most {STREAM_TOKENS} tokens and {MAX_STREAM_SLOTS} ids, not {tokens} and "
                f"{slots}; end its range there"
            )
        stride_x = x.stride(0)
        if (x.data_ptr() | stride_x * x.element_size()) % 16:
            # Else the compiler loads single elements; y's memory is free on this path.
            x = workspace["y"].view(x.dtype).view(-1, x.shape[1])[:tokens].copy_(x)
            stride_x = x.stride(0)
        act, scratch = workspace["act"], workspace["stream"]  # each costs host time: no others
        key = step_key((x, x_scale, ids, router_weights, out, num_rows), (act, scratch), x, x_scale, ids, out, num_rows)
        padded = 1 << max(slots - 1, 31).bit_length()
        launches = self._launches.get((padded, x_scale is not None))
        if launches is None:
            launches = self._launches[padded, x_scale is not None] = self._prepare(padded, x_scale is not None)
        launches[0](
            self._grid, key,
            x, self._w13, act, x_scale, *self._up_scales, ids, router_weights, num_rows, scratch, slots, tokens,
            stride_x, 0 if x_scale is None else x_scale.stride(0), act.stride(0),
        )  # fmt: skip
        launches[1](
            self._grid, key,
            act, self._w2, out, None, *self._down_scales, ids, router_weights, num_rows, scratch, slots, tokens,
            act.stride(0), 0, out.stride(0),
        )  # fmt: skip


def _blocks(problem: ExpertsProblem) -> int:
    """Blocks of columns that the down kernel's programs share."""
    return -(-problem.hidden_size // (2 * WEIGHT_ROWS))


def _parts_at(problem: ExpertsProblem) -> int:
    """Where in the scratch, behind a counter for each block, the parts of sums begin."""
    return -(-_blocks(problem) // 32) * 32


def _amax_at(problem: ExpertsProblem) -> int:
    """Where behind these the largest values of act begin."""
    return _parts_at(problem) + (MAX_STREAM_PROGRAMS + _blocks(problem)) * 2 * WEIGHT_ROWS * STREAM_TOKENS


def stream_workspace(problem: ExpertsProblem, num_tokens: int) -> tuple[int, int]:
    """(rows of act, float32 values of scratch) that a step of at most `num_tokens` tokens may need."""
    tokens = min(num_tokens, STREAM_TOKENS)
    rows = tokens * min(tokens * problem.top_k, problem.num_experts)
    return rows, _amax_at(problem) + rows * -(-problem.intermediate_size // WEIGHT_ROWS)
