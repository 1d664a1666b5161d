"""FP8 experts on a GPU, by the Triton ops of `moe_core.ops`.

Shape letters: H hidden · I intermediate per rank · E_l local experts · K top-k · R received rows ·
C row capacity per local expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from moe_core.config import MoEConfig, MoEParallelConfig, Problem
from moe_core.interfaces import Experts, WorkspaceShapes
from moe_core.ops import (
    Activation,
    ExpertsProblem,
    Fp8BatchedLauncher,
    Fp8ExpertsLauncher,
    Fp8SpecializedConfig,
    Fp8StreamConfig,
    Fp8Weights,
    ScanConfig,
    SlotsConfig,
    TileConfig,
    fp8_batched_config,
    fp8_batched_workspace,
    fp8_plan,
    fp8_workspace,
)
from moe_core.quant import QuantScheme
from moe_core.types import ActivationFormat, Device, Dispatched, ExpertWeights, GateUpLayout, LaunchRange
from quant_fp8.formats import format_of


class Fp8TritonExperts(Experts):
    """STANDARD and BATCHED, bf16 and fp16, every activation and every scheme that `format_of` knows.

    What is known of the layer is prepared once per weights record; a step then costs a few launches of host time.
    """

    def __init__(self, config: MoEConfig, parallel: MoEParallelConfig, scheme: QuantScheme) -> None:
        spec, problem = config.activation, Problem(config=config, parallel=parallel)
        layout = spec.gate_up_layout
        found = format_of(scheme)
        assert not isinstance(found, str), "selection refuses schemes without kernels"
        self._format = found
        self._dtype = config.dtype
        self._activation = Activation(spec.function, layout and layout.value, spec.limit, spec.alpha)
        halves = layout in (GateUpLayout.GATE_UP, GateUpLayout.UP_GATE)
        self._plain = spec.function == "silu" and halves and spec.limit is None and not spec.bias
        self._problem = ExpertsProblem(
            num_experts=problem.num_local_experts,
            top_k=config.top_k,
            hidden_size=config.experts_hidden_size,
            intermediate_size=problem.local_intermediate_size,
            itemsize=1,
            gated=spec.gated,
            all_experts=config.num_experts,
        )
        self._bound: ExpertWeights | None = None
        self._launch: Any = None

    def workspace_shapes(self, rows: int, activation_format: ActivationFormat) -> WorkspaceShapes:
        """The rows between the GEMMs, quantized rows with their scales, and the index arrays of the sort."""
        workspace = fp8_batched_workspace if activation_format is ActivationFormat.BATCHED else fp8_workspace
        return workspace(self._problem, self._format, self._dtype, rows)

    def apply(
        self,
        dispatched: Dispatched,
        weights: ExpertWeights,
        workspaces: Mapping[str, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        """See `Experts.apply`. Launches on the current stream and never waits for it."""
        counts = dispatched.tokens_per_expert  # a plan has one format, so one launcher a layer
        if weights is not self._bound:
            packed = self._packed(weights)
            if counts is None:
                self._launch = Fp8ExpertsLauncher(
                    packed, top_k=self._problem.top_k, dtype=self._dtype, all_experts=self._problem.all_experts
                )
            else:
                self._launch = Fp8BatchedLauncher(packed, dtype=self._dtype)
            self._bound = weights
        if counts is not None:
            scale = dispatched.x_scale
            self._launch(
                _rows_first(dispatched.x), counts, workspaces, out, None if scale is None else _rows_first(scale)
            )
            return
        ids, router_weights = dispatched.topk_ids, dispatched.topk_weights
        assert ids is not None and router_weights is not None, "STANDARD format comes with ids and weights"
        self._launch(dispatched.x, ids, router_weights, workspaces, out, dispatched.num_rows, dispatched.x_scale)

    def launch_ranges(self, activation_format: ActivationFormat, device: Device) -> tuple[LaunchRange, ...]:
        """The kernels of each range of T."""
        problem = self._problem
        if device.compute_capability is not None:
            problem = replace(problem, capability=device.compute_capability)
        if activation_format is ActivationFormat.BATCHED:
            shown = _shown(fp8_batched_config(problem, self._format, 128))
            return (LaunchRange(0, f"{shown} at C = 128", "heuristics"),)
        ranges, first = [], 0
        for end, config in fp8_plan(problem, self._format, self._plain):
            ranges.append(LaunchRange(first, _shown(config), "heuristics"))
            first = first if end is None else end + 1
        return tuple(ranges)

    def _packed(self, weights: ExpertWeights) -> Fp8Weights:
        """The record as the kernels read it. Records are compared by identity, so a new one binds anew."""
        assert weights.w13_scale is not None and weights.w2_scale is not None, "packed weights come with scales"
        static = self._format.activations == "static"
        return Fp8Weights(
            weights.w13.detach(),
            weights.w2.detach(),
            weights.w13_scale.detach(),
            weights.w2_scale.detach(),
            self._format,
            self._activation,
            bias13=weights.w13_bias,
            bias2=weights.w2_bias,
            input13=weights.w13_input_scale if static else None,
            input2=weights.w2_input_scale if static else None,
        )


def _rows_first(tensor: torch.Tensor) -> torch.Tensor:
    """`[E_l, C, …]` with one stride between all rows, as the kernels read it: experts side by side are copied."""
    experts, capacity, _ = tensor.shape
    one_stride = experts == 1 or tensor.stride(0) == capacity * tensor.stride(1)
    return tensor if one_stride else tensor.contiguous()


def _tile(part: Any) -> str:
    if isinstance(part, TileConfig):
        return f"{part.block_m}x{part.block_n}x{part.block_k}"
    if isinstance(part, Fp8SpecializedConfig):
        return f"{part.block_m}x256x128, loading warps{', halves' if part.halves else ''}"
    return f"alternating, columns {part.block_n}"


def _shown(config: Any) -> str:
    """A configuration in one line: "grouped, up 64x128x128, down 64x128x128"."""
    if isinstance(config, SlotsConfig | Fp8StreamConfig):
        return config.path
    tiles = [_tile(part) for part in (config.up, config.down)]
    path = "scan by slot" if isinstance(config, ScanConfig) and config.by_slot else config.path
    return f"{path}, up {tiles[0]}, down {tiles[1]}"
