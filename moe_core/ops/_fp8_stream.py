"""Runs the FP8 stream path: quantize, up, quantize, down (see `_kernels/fp8_stream.py`).

T tokens · H hidden · I intermediate · E_l local experts · K top-k · U distinct experts of a step, its units.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_core.ops._fp8_gemm import e4m3_map
from moe_core.ops._fp8_launch import MAX_STREAM_SLOTS, STREAM_TOKENS, Fp8StreamConfig
from moe_core.ops._fp8_quantize import QuantizeRows, QuantizeUnits
from moe_core.ops._fp8_scan import step_key
from moe_core.ops._fp8_weights import Fp8Weights
from moe_core.ops._launch import ExpertsProblem
from moe_core.ops._runtime import KernelLaunch

WEIGHT_ROWS = 64  # of one product
BUFFERS = ("act", "act_q", "act_scale", "parts", "arrivals")


class Fp8StreamRunner:
    """Four launches, three where x comes quantized."""

    def __init__(self, weights: Fp8Weights, problem: ExpertsProblem, config: Fp8StreamConfig):
        spec = weights.format
        if not weights.plain or spec.activations not in ("group", "row"):
            raise ValueError(
                f"{config} is for silu(gate) · up of two halves without clamp and biases, and for activations "
                f"quantized by groups or rows; {weights.activation}, {spec} need another path"
            )
        self._weights, self._problem, self._config = weights, problem, config
        options = {"by_group": spec.activations == "group", "power_of_two": spec.power_of_two}
        self._quantize_x = QuantizeRows(problem.hidden_size, **options, pdl=True)
        self._quantize_act = QuantizeUnits(problem.intermediate_size, STREAM_TOKENS, **options)
        self._w13 = e4m3_map(weights.w13.flatten(0, 1), WEIGHT_ROWS)
        self._w2 = e4m3_map(weights.w2.flatten(0, 1), WEIGHT_ROWS)
        self._gate_and_up = weights.halves("scale13")
        self._launches: dict[tuple[int, bool], tuple[KernelLaunch, KernelLaunch]] = {}

    def _prepare(self, slots: int, given: bool) -> tuple[KernelLaunch, KernelLaunch]:
        from moe_core.ops._kernels.fp8_stream import fp8_stream_kernel

        problem, weights, config = self._problem, self._weights, self._config
        hidden, inner = problem.hidden_size, problem.intermediate_size
        gate = inner if weights.activation.gate_up_layout == "up_gate" else 0
        shared = {"K": problem.top_k, "SLOTS": slots, "WEIGHT": weights.format.weights,
                  "COUNTERS": -(-hidden // (2 * WEIGHT_ROWS))}  # fmt: skip

        def launch(up: bool, strides: dict[str, int], buffers: int, pdl: bool, **own: Any) -> KernelLaunch:
            constants = {**shared, **own, "SE": strides["SE"], "SN": strides["SN"], "UP": up, "BUFFERS": buffers}
            return KernelLaunch(fp8_stream_kernel, constants, warps=4, pdl=pdl, registers=config.registers)

        return (
            # A kernel of somebody else's may let this one come before ids are there: then it comes after.
            launch(True, weights.up_constants(), config.up_buffers, not given, LEN=hidden, N=inner, W_ROWS=2 * inner,
                   FIRST=gate, SECOND=inner - 2 * gate),
            launch(False, weights.down_constants(), config.down_buffers, True, LEN=inner, N=hidden, W_ROWS=hidden,
                   FIRST=0, SECOND=WEIGHT_ROWS),
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
        weights, problem, given = self._weights, self._problem, x_scale is not None
        act, act_q, act_scale, parts, arrivals = buffers = [workspace[name] for name in BUFFERS]
        rows = x
        if x_scale is None:
            rows, x_scale = workspace["x_q"][:tokens], workspace["x_scale"]
            buffers += [rows, x_scale]
        elif (x.data_ptr() | x.stride(0)) % 16:
            # A tensor map wants rows on 16-byte borders.
            rows = workspace["x_q"][:tokens].copy_(x)
        key = step_key((x, x_scale, ids, router_weights, out, num_rows), buffers, x, x_scale, ids, out, num_rows)
        if not given:
            self._quantize_x(x, rows, x_scale, key)
        padded = 1 << max(slots - 1, 31).bit_length()
        launches = self._launches.get((padded, given))
        if launches is None:
            launches = self._launches[padded, given] = self._prepare(padded, given)
        up, down = launches
        units = min(slots, problem.num_experts)
        up(
            (problem.num_sms, 1, 1), key,
            e4m3_map(rows, STREAM_TOKENS), self._w13, act, x_scale, *self._gate_and_up, ids, router_weights, num_rows,
            parts, arrivals, slots, tokens, x_scale.stride(0), act.stride(0),
        )  # fmt: skip
        self._quantize_act(act, act_q, act_scale, units, tokens, key)
        down(
            (problem.num_sms, 1, 1), key,
            e4m3_map(act_q, STREAM_TOKENS), self._w2, out, act_scale, weights.scale2, weights.scale2, ids,
            router_weights, num_rows, parts, arrivals, slots, tokens, act_scale.stride(0), out.stride(0),
        )  # fmt: skip


def stream_workspace(problem: ExpertsProblem, num_tokens: int) -> tuple[int, int]:
    """(rows of act, float32 values of parts) that a step of at most `num_tokens` tokens may need."""
    tokens = min(num_tokens, STREAM_TOKENS)
    blocks = -(-problem.hidden_size // (2 * WEIGHT_ROWS))
    parts = problem.num_sms + blocks
    return STREAM_TOKENS * min(tokens * problem.top_k, problem.num_experts), parts * 2 * WEIGHT_ROWS * STREAM_TOKENS
