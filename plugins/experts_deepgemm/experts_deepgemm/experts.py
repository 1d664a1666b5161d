"""`DeepGemmExperts`: two of the library's grouped GEMMs, with our kernels before, between and after them.

H hidden · I intermediate per rank · E_l local experts · K top-k · R received rows · C row capacity per local expert.

STANDARD: rows are brought into blocks of 128 of one expert (and quantized), GEMM, activation (and quantized), GEMM,
weighted sum. BATCHED: the same with the masked GEMMs, whose experts have C rows each, and without the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from experts_deepgemm import _vendor_api as vendor
from moe_core import ops
from moe_core.config import MoEConfig, MoEParallelConfig, Problem
from moe_core.interfaces import Experts, WorkspaceShapes
from moe_core.ops import contiguous
from moe_core.quant import QuantScheme, ScaleFormat
from moe_core.types import ActivationFormat, Dispatched, ExpertWeights

Multiply = Callable[..., None]
"""One GEMM with its weights bound: (x, x_scale or None, out, what says which rows count)."""


class DeepGemmExperts(Experts):
    """bf16 weights, or FP8 weights in 128×128 blocks with activations in groups of 1×128; STANDARD and BATCHED.

    A shape's kernel is compiled at its first step, which takes seconds: warm up before a graph is captured.
    """

    def __init__(self, config: MoEConfig, parallel: MoEParallelConfig, scheme: QuantScheme) -> None:
        spec, problem = config.activation, Problem(config=config, parallel=parallel)
        vendor.check_alignment()
        layout = spec.gate_up_layout
        self._dtype = config.dtype
        self._activation = ops.Activation(spec.function, layout and layout.value, spec.limit, spec.alpha)
        self._share = config.top_k / config.num_experts
        self._quantize = None
        if scheme.activation is not None:
            self._quantize = ops.RowQuantization(scheme.activation.scale_format is ScaleFormat.UE8M0)
        self._problem = ops.ExpertsProblem(
            num_experts=problem.num_local_experts,
            top_k=config.top_k,
            hidden_size=config.experts_hidden_size,
            intermediate_size=problem.local_intermediate_size,
            gated=spec.gated,
            interleaved=self._activation.gate_up_layout == "interleaved",
        )
        self._standard = ops.ContiguousRows(self._problem, self._activation, self._quantize)
        self._batched = ops.PaddedRows(self._problem, self._activation, self._quantize)
        self._bound: ExpertWeights | None = None
        self._up: Multiply
        self._down: Multiply

    def workspace_shapes(self, rows: int, activation_format: ActivationFormat) -> WorkspaceShapes:
        """Rows of both GEMMs in blocks of 128, and the index arrays of the sort."""
        workspace = ops.padded_workspace if activation_format is ActivationFormat.BATCHED else ops.contiguous_workspace
        return workspace(self._problem, self._dtype, rows, self._quantize)

    def apply(
        self,
        dispatched: Dispatched,
        weights: ExpertWeights,
        workspaces: Mapping[str, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        """See `Experts.apply`. Launches on the current stream and never waits for it."""
        if out.numel() == 0:
            return
        batched = dispatched.tokens_per_expert is not None
        if weights is not self._bound:
            self._up, self._down = self._bind(weights, batched)
            self._bound = weights
        (self._apply_batched if batched else self._apply_standard)(dispatched, workspaces, out)

    def _apply_standard(self, dispatched: Dispatched, space: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        ids, router_weights, num_rows = dispatched.topk_ids, dispatched.topk_weights, dispatched.num_rows
        assert ids is not None and router_weights is not None, "STANDARD format comes with ids and weights"
        which = space["expert_of_row" if self._quantize is None else "ends"]
        self._standard.gather(dispatched.x, dispatched.x_scale, ids, num_rows, space)
        self._up(space["x"], self._scale(space, "x"), space["h"], which)
        self._standard.activate(space)
        self._down(space["act"], self._scale(space, "act"), space["y"], which)
        self._standard.reduce(ids, router_weights, num_rows, space, out)

    def _apply_batched(self, dispatched: Dispatched, space: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        counts = dispatched.tokens_per_expert
        assert counts is not None
        experts, capacity, _ = out.shape
        # The library writes whole blocks, so the last one must not reach into the next expert's rows.
        whole_blocks = capacity % contiguous.BLOCK_ROWS == 0
        rows = {name: space[name].unflatten(0, (experts, -1)) for name in ("x", "h", "act", "y")}
        if self._quantize is None and whole_blocks and dispatched.x.is_contiguous():
            rows["x"] = dispatched.x
        else:
            self._batched.gather(dispatched.x, dispatched.x_scale, counts, space)
        in_place = whole_blocks and out.is_contiguous()
        if in_place:
            rows["y"] = out
        expected = max(1, math.ceil(capacity * self._share))
        self._up(rows["x"], self._scale(space, "x", experts), rows["h"], counts, expected)
        self._batched.activate(counts, space)
        self._down(rows["act"], self._scale(space, "act", experts), rows["y"], counts, expected)
        if not in_place:
            out.copy_(rows["y"][:, :capacity])

    def _scale(self, space: Mapping[str, torch.Tensor], name: str, experts: int | None = None) -> torch.Tensor | None:
        if self._quantize is None:
            return None
        columns = self._problem.hidden_size if name == "x" else self._problem.intermediate_size
        return contiguous.transposed_scale(space[f"{name}_scale"], columns // contiguous.GROUP, experts)

    def _bind(self, weights: ExpertWeights, batched: bool) -> tuple[Multiply, Multiply]:
        """Both GEMMs of a weights record. Records are compared by identity, so a new one binds anew."""
        w13_scale = weights.w13_scale
        if w13_scale is not None:  # each half of w13 has a grid of its own; H and I are whole blocks, so they join
            w13_scale = w13_scale.flatten(1, 2)
        return _bind(weights.w13, w13_scale, batched), _bind(weights.w2, weights.w2_scale, batched)


def _bind(w: torch.Tensor, w_scale: torch.Tensor | None, batched: bool) -> Multiply:
    w = w.detach()
    transposed = w.transpose(1, 2).is_contiguous() and w_scale is None and not batched
    if not (w.is_contiguous() or transposed):
        # The library reads no other strides. A copy that is kept would go stale when the weights are written to.
        return lambda x, x_scale, out, *which: _bind(w.contiguous(), w_scale, batched)(x, x_scale, out, *which)
    if w_scale is None:
        multiply = vendor.masked_bf16 if batched else vendor.contiguous_bf16
        return lambda x, _, out, *which: multiply(x, w, out, *which)
    quantized = vendor.masked_fp8 if batched else vendor.contiguous_fp8
    return lambda x, x_scale, out, *which: quantized(x, x_scale, w, w_scale, out, *which)
