"""NVFP4 experts on a GPU, by the ops of `moe_core.ops`: weights stay packed, activations stay bfloat16.

Shape letters: R received rows · C row capacity per local expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe_core import ops
from moe_core.config import MoEConfig, MoEParallelConfig, Problem
from moe_core.interfaces import Experts, WorkspaceShapes
from moe_core.types import ActivationFormat, Dispatched, ExpertWeights


class Nvfp4TritonExperts(Experts):
    """STANDARD and BATCHED, W4A16, every activation; reads the weight layout `schemes.MMA_LAYOUT`."""

    def __init__(self, config: MoEConfig, parallel: MoEParallelConfig) -> None:
        spec, problem = config.activation, Problem(config=config, parallel=parallel)
        layout = spec.gate_up_layout
        self._weight_on_input = config.router_weight_on_input and config.top_k > 1  # K = 1 is done by the kernel
        self._activation = ops.Activation(spec.function, layout and layout.value, spec.limit, spec.alpha)
        self._problem = ops.ExpertsProblem(
            num_experts=problem.num_local_experts,
            top_k=config.top_k,
            hidden_size=config.experts_hidden_size,
            intermediate_size=problem.local_intermediate_size,
            all_experts=config.num_experts,
        )
        self._bound: ExpertWeights | None = None
        self._launch: Any = None

    def workspace_shapes(self, rows: int, activation_format: ActivationFormat) -> WorkspaceShapes:
        """The rows between the GEMMs; in STANDARD format also those before the sum over K, and the sort's indices."""
        if activation_format is ActivationFormat.BATCHED:
            return ops.nvfp4_batched_workspace(self._problem, rows)
        return ops.experts_workspace(self._problem, torch.bfloat16, rows)

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
            self._launch = self._bind(weights, batched=counts is not None)
            self._bound = weights
        if counts is not None:
            self._launch(dispatched.x, counts, workspaces, out)
            return
        ids, router_weights = dispatched.topk_ids, dispatched.topk_weights
        assert ids is not None and router_weights is not None, "STANDARD format comes with ids and weights"
        self._launch(dispatched.x, ids, router_weights, workspaces, out, dispatched.num_rows)

    def _bind(self, weights: ExpertWeights, *, batched: bool) -> Any:
        """Prepare the launches for a weights record. Records are compared by identity, so a new one binds anew."""
        if weights.layout is None:
            raise ValueError(
                "nvfp4_triton: the weights are in the order of the checkpoint; after loading, call "
                "routed_experts.pack_weights(), which brings them into the order that the kernels read"
            )
        assert weights.w13_scale is not None and weights.w2_scale is not None
        assert weights.w13_global_scale is not None and weights.w2_global_scale is not None
        packed = ops.Nvfp4Weights(
            w13=weights.w13.detach(),
            w13_scale=weights.w13_scale.detach(),
            w13_global=weights.w13_global_scale.detach(),
            w2=weights.w2.detach(),
            w2_scale=weights.w2_scale.detach(),
            w2_global=weights.w2_global_scale.detach(),
            activation=self._activation,
            bias13=weights.w13_bias,
            bias2=weights.w2_bias,
        )
        if batched:
            return ops.Nvfp4BatchedLauncher(packed)
        return ops.Nvfp4ExpertsLauncher(
            packed,
            top_k=self._problem.top_k,
            weight_on_input=self._weight_on_input,
            all_experts=self._problem.all_experts,
        )
