"""What cases are made of: weights, tokens, ids of every troublesome kind, and the float64 truth about them.

Shape letters: T tokens · H hidden · I intermediate · E experts · K top-k. Everything is drawn from seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from moe_core.config import ActivationSpec
from moe_core.reference import moe_reference, split_gate_up
from moe_core.testing.compare import Explanations, Truth
from moe_core.types import ExpertWeights, GateUpLayout, Routing

F64 = torch.float64


def generator(*seed: int) -> torch.Generator:
    number = 0
    for part in seed:
        number = number * 1009 + part + 1
    return torch.Generator().manual_seed(number)


def random_weights(
    experts: int, hidden: int, inner: int, activation: ActivationSpec, dtype: torch.dtype, seed: int = 0
) -> ExpertWeights:
    """E experts, with gate and up where the activation says. Sizes are such that outputs and biases are about 1."""
    draw = generator(seed, 1)
    rows = 2 * inner if activation.gated else inner

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) * scale).to(dtype)

    return ExpertWeights(
        w13=normal(experts, rows, hidden, scale=1.5 / hidden**0.5),
        w2=normal(experts, hidden, inner, scale=1.5 / inner**0.5),
        gate_up_layout=activation.gate_up_layout,
        w13_bias=normal(experts, rows, scale=0.7) if activation.bias else None,
        w2_bias=normal(experts, hidden, scale=0.7) if activation.bias else None,
    )


def mapped(weights: ExpertWeights, change: Callable[[torch.Tensor], torch.Tensor]) -> ExpertWeights:
    """The same record with `change` applied to each tensor."""
    changes: dict[str, Any] = {name: change(tensor) for name, tensor in tensors_of(weights).items()}
    return attrs.evolve(weights, **changes)


def tensors_of(record: Any) -> dict[str, torch.Tensor]:
    """The tensors in an attrs record, by field."""
    fields = {field.name: getattr(record, field.name) for field in attrs.fields(type(record))}
    return {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}


def of_experts(weights: ExpertWeights, experts: Sequence[int], device: torch.device) -> ExpertWeights:
    """Some experts' weights, as a rank holds them."""
    index = torch.tensor(list(experts), dtype=torch.int64)
    return mapped(weights, lambda tensor: tensor.index_select(0, index).to(device))


def part_of_inner(weights: ExpertWeights, rank: int, size: int) -> ExpertWeights:
    """One tp rank's part of I of every expert (GATE_UP or ungated)."""
    part = slice(rank * (weights.w2.shape[2] // size), (rank + 1) * (weights.w2.shape[2] // size))
    halves = weights.w13.chunk(2, dim=1) if weights.gate_up_layout is not None else (weights.w13,)
    return ExpertWeights(
        w13=torch.cat([half[:, part] for half in halves], dim=1),
        w2=weights.w2[:, :, part],
        gate_up_layout=weights.gate_up_layout,
    )


def tokens(count: int, hidden: int, dtype: torch.dtype, *seed: int) -> torch.Tensor:
    return torch.randn(count, hidden, generator=generator(2, *seed)).to(dtype)


IDS = ("distinct", "dropped", "all dropped", "duplicates", "one expert", "last expert", "every expert", "mixed")
IDS_OF_SOMEBODY = tuple(kind for kind in IDS if kind != "all dropped")
"""Those that compute something."""


def choose(kind: str, count: int, experts: int, top_k: int, *seed: int) -> Routing:
    """Ids and weights of one of the `IDS`; int64, on the CPU. Beside a -1 the weight is NaN: nobody may read it."""
    draw = generator(3, *seed)
    ids = torch.rand(count, experts, generator=draw).topk(top_k, dim=1).indices if count else _no_ids(top_k)
    weights = torch.rand(count, top_k, generator=draw) * 0.8 + 0.2
    row, column = torch.arange(count).unsqueeze(1), torch.arange(top_k).unsqueeze(0)
    if kind in ("dropped", "mixed"):
        ids = ids.masked_fill((row + column) % 3 == 1, -1)
        ids = ids.masked_fill(row % 5 == 3, -1)  # a whole row of nothing
    if kind == "all dropped":
        ids = torch.full_like(ids, -1)
    if kind == "duplicates" or (kind == "mixed" and top_k > 1):
        ids = torch.where((column == top_k - 1) & (row % 2 == 0), ids[:, :1], ids)
    if kind in ("one expert", "last expert"):
        ids = torch.full_like(ids, -1)
        ids[:, 0] = 0 if kind == "one expert" else experts - 1
    if kind == "every expert":
        ids = (row * top_k + column) % experts
    return Routing(ids, weights.masked_fill(ids < 0, torch.nan))


def _no_ids(top_k: int) -> torch.Tensor:
    return torch.empty(0, top_k, dtype=torch.int64)


@attrs.frozen(eq=False)
class Problem64:
    """A batch and its experts, from which truths and their false variants are computed in float64.

    Attributes:
        x: `[T, H]`.
        routing: global ids, -1 = none.
        weights: all E experts, unquantized.
        activation: of the layer.
        on_input: the router weight multiplies the input.
    """

    x: torch.Tensor
    routing: Routing
    weights: ExpertWeights
    activation: ActivationSpec
    on_input: bool = False

    def terms(
        self,
        ids: torch.Tensor | None = None,
        router_weights: torch.Tensor | None = None,
        weights: ExpertWeights | None = None,
        activation: ActivationSpec | None = None,
    ) -> torch.Tensor:
        """`[K, T, H]`: what each choice adds."""
        ids = self.routing.topk_ids if ids is None else ids
        router_weights = self.routing.topk_weights if router_weights is None else router_weights
        return torch.stack(
            [
                moe_reference(
                    self.x,
                    ids[:, k : k + 1],
                    router_weights[:, k : k + 1],
                    weights or self.weights,
                    activation or self.activation,
                    router_weight_on_input=self.on_input,
                    compute_dtype=F64,
                )
                for k in range(ids.shape[1])
            ]
        )

    @property
    def truth(self) -> Truth:
        terms = self.terms()
        return Truth.of(terms.sum(0), terms)

    def explanations(self) -> Explanations:
        """What would come out of common mistakes with the routing, by the duty that they break."""
        ids, weights = self.routing.topk_ids, self.routing.topk_weights.nan_to_num(0.5)
        experts = self.weights.w13.shape[0]
        again = torch.zeros_like(ids, dtype=torch.bool)
        for k in range(1, ids.shape[1]):
            again[:, k] = (ids[:, :k] == ids[:, k : k + 1]).any(dim=1)
        found = {
            "rows: the row is zero": lambda: torch.zeros(self.x.shape, dtype=F64),
            "dropped ids: -1 was taken as the last expert": lambda: self.terms(
                torch.where(ids < 0, experts - 1, ids), weights
            ).sum(0),
            "duplicate ids: only the first of equal ids was counted": lambda: self.terms(
                ids.masked_fill(again, -1)
            ).sum(0),
            "router weight: it was not applied": lambda: self.terms(router_weights=torch.ones_like(weights)).sum(0),
            "router weight: it was applied twice": lambda: self.terms(router_weights=weights.square()).sum(0),
        }
        for k in range(ids.shape[1] if ids.shape[1] > 1 else 0):
            found[f"top-k sum: choice {k} is missing"] = functools.partial(self._all_but, k)
        found["top-k sum: it is a mean"] = lambda: self.terms().sum(0) / max(ids.shape[1], 1)
        return found

    def _all_but(self, choice: int) -> torch.Tensor:
        terms = self.terms()
        return terms.sum(0) - terms[choice]

    def expert_explanations(self) -> Explanations:
        """The same for mistakes inside the experts."""
        spec, weights = self.activation, self.weights
        found: dict[str, Callable[[], torch.Tensor]] = {}
        if weights.w13_bias is not None and weights.w2_bias is not None:
            without = {
                "the first projection's": attrs.evolve(weights, w13_bias=torch.zeros_like(weights.w13_bias)),
                "the second projection's": attrs.evolve(weights, w2_bias=torch.zeros_like(weights.w2_bias)),
            }
            for what, changed in without.items():
                found[f"expert biases: {what} is missing"] = functools.partial(self._sum_with, changed)
        if spec.limit is not None:
            free = attrs.evolve(spec, limit=None)
            found["activation clamp: it was not applied"] = lambda: self.terms(activation=free).sum(0)
        for layout in GateUpLayout if spec.gated else ():
            if layout is not weights.gate_up_layout:
                read = attrs.evolve(weights, gate_up_layout=layout)
                found[f"gate/up layout: read as {layout.value}"] = functools.partial(self._sum_with, read)
        if spec.function == "swiglu_oai":
            plain = attrs.evolve(spec, alpha=1.0)
            found["activation: alpha was not applied"] = lambda: self.terms(activation=plain).sum(0)
        return {**found, **self.explanations()}

    def _sum_with(self, weights: ExpertWeights) -> torch.Tensor:
        return self.terms(weights=weights).sum(0)


def gate_and_up(weights: ExpertWeights, expert: int) -> dict[str, torch.Tensor]:
    """One expert's tensors under the names that `load_expert` takes."""
    named: dict[str, torch.Tensor] = {"down": weights.w2[expert]}
    pieces = [("", weights.w13[expert].T)]
    if weights.w13_bias is not None and weights.w2_bias is not None:
        pieces.append(("_bias", weights.w13_bias[expert]))
        named["down_bias"] = weights.w2_bias[expert]
    for suffix, tensor in pieces:
        if weights.gate_up_layout is None:
            halves: tuple[torch.Tensor, ...] = (tensor,)
        else:
            halves = split_gate_up(tensor, weights.gate_up_layout)
        for name, half in zip(("up",) if len(halves) == 1 else ("gate", "up"), halves, strict=True):
            named[name + suffix] = half.T if suffix == "" else half
    return named
