"""The kit's own partners of a backend under test: experts that are the float64 reference, a dispatch that does nothing.

Shape letters: H hidden · E_l local experts · R received rows · C row capacity per local expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe_core import formats
from moe_core.config import GATED_FUNCTIONS, MODEL_DTYPES, UNGATED_FUNCTIONS, ActivationSpec
from moe_core.interfaces import Candidate, Experts, PrepareAndFinalize, WorkspaceShapes
from moe_core.quant import QuantScheme
from moe_core.reference import expert_rows_reference, moe_reference
from moe_core.select import CANONICAL_LAYOUT
from moe_core.types import (
    BATCHED_EXPERTS_DUTIES,
    BATCHED_FINALIZE_DUTIES,
    MODEL_DTYPE_PAYLOAD,
    STANDARD_EXPERTS_DUTIES,
    ActivationFormat,
    DispatchCapabilities,
    Dispatched,
    ExpertPlacement,
    ExpertsCapabilities,
    ExpertWeights,
    GateUpLayout,
    Routing,
)

ANY_DEVICE = frozenset({"cpu", "cuda"})


class OracleExperts(Experts):
    """Computes in float64 and rounds once. What it need not write, it poisons.

    Args:
        activation: of the layer.
        scheme: whose payload it takes.
        poison: stands in rows past an expert's count.
    """

    def __init__(self, activation: ActivationSpec, scheme: QuantScheme, poison: float = torch.nan) -> None:
        self.activation, self.scheme, self.poison = activation, scheme, poison

    def workspace_shapes(self, rows: int, activation_format: ActivationFormat) -> WorkspaceShapes:
        return {}

    def apply(
        self,
        dispatched: Dispatched,
        weights: ExpertWeights,
        workspaces: Mapping[str, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        x = dispatched.x
        if dispatched.x_scale is not None:
            assert self.scheme.activation is not None, "a quantized payload comes with its spec"
            x = formats.dequantize(x, dispatched.x_scale, self.scheme.activation)
        if dispatched.tokens_per_expert is not None:
            counts = dispatched.tokens_per_expert
            out.copy_(expert_rows_reference(x, counts, weights, self.activation, compute_dtype=torch.float64))
            past = torch.arange(x.shape[1], device=x.device) >= counts.unsqueeze(1)
            out.masked_fill_(past.unsqueeze(2), self.poison)
            return
        ids, router_weights = dispatched.topk_ids, dispatched.topk_weights
        assert ids is not None and router_weights is not None, "STANDARD format comes with ids and weights"
        if dispatched.num_rows is not None:
            past = torch.arange(ids.shape[0], device=ids.device) >= dispatched.num_rows
            ids = ids.masked_fill(past.unsqueeze(1), -1)
        result = moe_reference(x, ids, router_weights, weights, self.activation, compute_dtype=torch.float64)
        out.copy_(result)


def oracle_experts(
    activation: ActivationSpec,
    scheme: QuantScheme,
    poison: float = torch.nan,
    *,
    weight_layout: str = CANONICAL_LAYOUT,
) -> Candidate[ExpertsCapabilities]:
    """The oracle as selection takes it: it claims everything. `weight_layout`: what a plan with it asks for."""
    return Candidate(
        name="oracle",
        plugin="conformance kit",
        factory=lambda *_: OracleExperts(activation, scheme, poison),
        capabilities=ExpertsCapabilities(
            owns={
                ActivationFormat.STANDARD: STANDARD_EXPERTS_DUTIES,
                ActivationFormat.BATCHED: BATCHED_EXPERTS_DUTIES,
            },
            dtypes=frozenset(MODEL_DTYPES),
            device_types=ANY_DEVICE,
            activations=frozenset(GATED_FUNCTIONS + UNGATED_FUNCTIONS),
            gate_up_layouts=frozenset(GateUpLayout),
            ungated=True,
            clamp=True,
            bias=True,
            schemes=frozenset({scheme.name}),
            payloads=frozenset({MODEL_DTYPE_PAYLOAD, scheme.name}),
            weight_layout={scheme.name: weight_layout},
            accepts_dropped_ids=True,
            accepts_duplicate_ids=True,
            graph_capturable=True,
            deterministic=True,
        ),
    )


class IdentityExperts(Experts):
    """Every expert returns what it got, without a look at any value on the host: for graph capture."""

    def workspace_shapes(self, rows: int, activation_format: ActivationFormat) -> WorkspaceShapes:
        return {}

    def apply(
        self,
        dispatched: Dispatched,
        weights: ExpertWeights,
        workspaces: Mapping[str, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        if dispatched.tokens_per_expert is not None:
            out.copy_(dispatched.x)
            return
        ids, router_weights = dispatched.topk_ids, dispatched.topk_weights
        assert ids is not None and router_weights is not None, "STANDARD format comes with ids and weights"
        total = router_weights.masked_fill(ids < 0, 0.0).sum(dim=1, keepdim=True)
        empty = (ids < 0).all(dim=1, keepdim=True)
        if dispatched.num_rows is not None:
            past = torch.arange(ids.shape[0], device=ids.device) >= dispatched.num_rows
            empty = empty | past.unsqueeze(1)
        out.copy_((dispatched.x.float() * total).masked_fill(empty, 0.0))


class PassThrough(PrepareAndFinalize):
    """Hands rows on as they are, on one rank. Its BATCHED form is never run: only plans are made with it."""

    def prepare(
        self,
        hidden_states: torch.Tensor,
        routing: Routing,
        *,
        num_experts: int,
        expert_map: torch.Tensor | None,
        payload: str,
    ) -> Dispatched:
        return Dispatched(x=hidden_states, handle=None, topk_ids=routing.topk_ids, topk_weights=routing.topk_weights)

    def expert_output(self, dispatched: Dispatched, out: torch.Tensor) -> torch.Tensor | None:
        return out

    def finalize(self, expert_out: torch.Tensor, handle: Any, routing: Routing, out: torch.Tensor) -> None:
        return None


def pass_through(activation_format: ActivationFormat, payloads: frozenset[str]) -> Candidate[DispatchCapabilities]:
    """A dispatch of either format, as selection takes it."""
    batched = activation_format is ActivationFormat.BATCHED
    return Candidate(
        name="pass through",
        plugin="conformance kit",
        factory=lambda *_: PassThrough(),
        capabilities=DispatchCapabilities(
            activation_format=activation_format,
            dtypes=frozenset(MODEL_DTYPES),
            device_types=ANY_DEVICE,
            payloads=payloads,
            owns=BATCHED_FINALIZE_DUTIES if batched else frozenset(),
            accepts_dropped_ids=True,
            accepts_duplicate_ids=True,
            placements=frozenset(ExpertPlacement),
            max_ep_size=None,
            max_in_flight=None,
            graph_capturable=True,
            deterministic=True,
        ),
    )
