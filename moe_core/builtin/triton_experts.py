"""Experts on a GPU, by the Triton ops of `moe_core.ops`.

Shape letters: H hidden · I intermediate per rank · E_l local experts · K top-k · R received rows ·
C row capacity per local expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe_core import ops
from moe_core.config import MoEConfig, MoEParallelConfig, Problem
from moe_core.interfaces import Experts, WorkspaceShapes
from moe_core.types import ActivationFormat, Dispatched, ExpertWeights


class TritonExperts(Experts):
    """STANDARD and BATCHED, bf16, fp16 and fp32, every activation, weights as they lie (also transposed views).

    What is known of the layer is prepared once per weights record; a step then costs a few launches of host time.
    """

    def __init__(self, config: MoEConfig, parallel: MoEParallelConfig) -> None:
        spec, problem = config.activation, Problem(config=config, parallel=parallel)
        layout = spec.gate_up_layout
        self._dtype = config.dtype
        self._top_k = config.top_k
        self._weight_on_input = config.router_weight_on_input and config.top_k > 1  # K = 1 is done by the kernel
        self._activation = ops.Activation(spec.function, layout and layout.value, spec.limit, spec.alpha)
        self._problem = ops.ExpertsProblem(
            num_experts=problem.num_local_experts,
            top_k=config.top_k,
            hidden_size=config.experts_hidden_size,
            intermediate_size=problem.local_intermediate_size,
            itemsize=config.dtype.itemsize,
            gated=spec.gated,
            interleaved=self._activation.gate_up_layout == "interleaved",
        )
        self._bound: ExpertWeights | None = None
        self._launch: Any = None

    def workspace_shapes(self, rows: int, activation_format: ActivationFormat) -> WorkspaceShapes:
        """The rows between the GEMMs, the rows before the sum over K, and the index arrays of the sort.

        They follow from the layer's sizes alone: launch parameters and the strides of the weights change no buffer.
        """
        if activation_format is ActivationFormat.BATCHED:
            return ops.batched_workspace(self._problem, self._dtype, rows)
        return ops.experts_workspace(self._problem, self._dtype, rows)

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
            self._launch = self._bind_standard(weights) if counts is None else self._bind_batched(weights)
            self._bound = weights
        if counts is not None:
            self._launch(dispatched.x, counts, workspaces, out)
            return
        ids, router_weights = dispatched.topk_ids, dispatched.topk_weights
        assert ids is not None and router_weights is not None, "STANDARD format comes with ids and weights"
        self._launch(dispatched.x, ids, router_weights, workspaces, out, dispatched.num_rows)

    def _bind_standard(self, weights: ExpertWeights) -> ops.ExpertsLauncher:
        """Prepare the launches for a weights record. Records are compared by identity, so a new one binds anew."""
        return ops.ExpertsLauncher(
            weights.w13.detach(),
            weights.w2.detach(),
            top_k=self._top_k,
            activation=self._activation,
            bias13=weights.w13_bias,
            bias2=weights.w2_bias,
            weight_on_input=self._weight_on_input,
        )

    def _bind_batched(self, weights: ExpertWeights) -> ops.BatchedExpertsLauncher:
        return ops.BatchedExpertsLauncher(
            weights.w13.detach(),
            weights.w2.detach(),
            activation=self._activation,
            bias13=weights.w13_bias,
            bias2=weights.w2_bias,
        )
