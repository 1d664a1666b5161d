"""Experts that call a foreign module's own gate and post norm: for what `ActivationSpec` cannot describe.

Shape letters: T tokens · H hidden · I intermediate per rank · E_l local experts · K top-k · R received rows ·
C row capacity per local expert · S choices, sorted by expert.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch.nn import functional

from moe_core.config import GATED_FUNCTIONS, MODEL_DTYPES, UNGATED_FUNCTIONS
from moe_core.errors import MoEError
from moe_core.integrations.transformers.gates import gate_function
from moe_core.interfaces import Candidate, Experts, WorkspaceShapes
from moe_core.types import (
    BATCHED_EXPERTS_DUTIES,
    STANDARD_EXPERTS_DUTIES,
    ActivationFormat,
    Availability,
    Dispatched,
    ExpertsCapabilities,
    ExpertWeights,
    GateUpLayout,
)

NAME = "transformers_module"


class ModuleExperts(Experts):
    """Our dispatch and GEMMs around the module's own `_apply_gate` (or `act_fn`) and `post_expert_norm`.

    The counts per expert are read on the host once a step, so this is not for CUDA graphs. It allocates what it
    needs: the width of a foreign gate's scratch is not ours to declare.

    Args:
        module: whose functions; not kept alive.
    """

    def __init__(self, module: weakref.ref[torch.nn.Module]) -> None:
        self._module = module

    def workspace_shapes(self, rows: int, activation_format: ActivationFormat) -> WorkspaceShapes:
        return {}

    @torch.no_grad()
    def apply(
        self,
        dispatched: Dispatched,
        weights: ExpertWeights,
        workspaces: Mapping[str, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        """See `Experts.apply`."""
        module = self._module()
        if module is None:
            raise MoEError("the transformers module whose gate this layer calls has been deleted; attach a live model")
        if dispatched.tokens_per_expert is None:
            self._apply_standard(module, dispatched, weights, out)
            return
        counts = dispatched.tokens_per_expert.tolist()
        for expert, count in enumerate(counts):
            if count:
                out[expert, :count] = _run(module, [expert], [count], dispatched.x[expert, :count], weights)

    def _apply_standard(
        self, module: torch.nn.Module, dispatched: Dispatched, weights: ExpertWeights, out: torch.Tensor
    ) -> None:
        ids, router_weights = dispatched.topk_ids, dispatched.topk_weights
        assert ids is not None and router_weights is not None, "STANDARD format comes with ids and weights"
        if dispatched.num_rows is not None:
            rows = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
            ids = ids.masked_fill(rows >= dispatched.num_rows, -1)
        flat = ids.reshape(-1)
        order = torch.sort(flat, stable=True).indices
        # -1 is counted first, and sorted first
        dropped, *counts = torch.bincount(flat + 1, minlength=weights.w2.shape[0] + 1).tolist()
        order = order[dropped:]
        source = order.div(ids.shape[1], rounding_mode="floor")
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        experts = [expert for expert, count in enumerate(counts) if count]
        if experts:
            y = _run(module, experts, [counts[expert] for expert in experts], dispatched.x[source], weights)
            total.index_add_(0, source, y.float() * router_weights.reshape(-1, 1)[order])
        out.copy_(total)


def _run(
    module: torch.nn.Module, experts: list[int], sizes: list[int], x: torch.Tensor, weights: ExpertWeights
) -> torch.Tensor:
    """`[S, H]` → `[S, H]`, raw. Gate and norm see all rows at once, as in transformers' own implementations."""
    h = _linear(x, experts, sizes, weights.w13, weights.w13_bias)
    y = _linear(gate_function(module)(h), experts, sizes, weights.w2, weights.w2_bias)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)  # type: ignore[operator]
    return y


def _linear(
    x: torch.Tensor, experts: list[int], sizes: list[int], weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`x [S, in]`, sorted by expert, times each expert's `weight [E_l, out, in]` plus its `bias [E_l, out]`."""
    parts = torch.split(x, sizes)
    return torch.cat(
        [
            functional.linear(part, weight[expert], None if bias is None else bias[expert])
            for expert, part in zip(experts, parts, strict=True)
        ]
    )


def module_candidate(module: torch.nn.Module, device_type: str) -> Candidate[ExpertsCapabilities]:
    """`ModuleExperts` of one module as a candidate for selection: it fits every problem that this module poses."""
    reference = weakref.ref(module)

    def make(*_: Any) -> ModuleExperts:
        return ModuleExperts(reference)

    capabilities = ExpertsCapabilities(
        owns={
            ActivationFormat.STANDARD: STANDARD_EXPERTS_DUTIES,
            ActivationFormat.BATCHED: BATCHED_EXPERTS_DUTIES,
        },
        dtypes=frozenset(MODEL_DTYPES),
        device_types=frozenset({device_type}),
        activations=frozenset(GATED_FUNCTIONS + UNGATED_FUNCTIONS),
        gate_up_layouts=frozenset(GateUpLayout),
        ungated=True,
        clamp=True,
        bias=True,
        accepts_dropped_ids=True,
        accepts_duplicate_ids=True,
    )
    return Candidate(name=NAME, plugin="moe-core transformers bridge", factory=make, capabilities=capabilities)


def refused(candidate: Candidate[ExpertsCapabilities], reason: str) -> Candidate[ExpertsCapabilities]:
    """The same candidate, out of the question, with the reason in the table."""
    return attrs.evolve(candidate, availability=Availability(False, reason))
