"""An experts backend with rows that no dispatch brought: what every experts case stands on.

Shape letters: H hidden · I intermediate per rank · E_l local experts · K top-k · R received rows · C row capacity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch

from moe_core import formats
from moe_core.config import ActivationSpec, MoEConfig, MoEParallelConfig, Problem
from moe_core.emulated import dequantize_weights
from moe_core.errors import UnsupportedError
from moe_core.forms import made_experts, workspace_shapes
from moe_core.interfaces import Experts
from moe_core.plugins import registry
from moe_core.quant import UNQUANTIZED, QuantScheme, QuantSpec
from moe_core.ranges import ExpertsCandidate
from moe_core.reference import activation_reference
from moe_core.routed_experts import RoutedExperts
from moe_core.select import CANONICAL_LAYOUT, Plan, select
from moe_core.testing import material
from moe_core.testing.case import Skip, Violation
from moe_core.testing.compare import Guarded, Truth, check_numbers
from moe_core.testing.material import F64, Problem64
from moe_core.testing.oracle import pass_through
from moe_core.types import (
    MODEL_DTYPE_PAYLOAD,
    ActivationFormat,
    Device,
    Dispatched,
    ExpertWeights,
    GateUpLayout,
    Routing,
)

PLAIN = ActivationSpec("silu")
STEPS = {torch.float32: 64.0, torch.float16: 12.0, torch.bfloat16: 12.0}
"""Roundings that may add up in two GEMMs, an activation and a sum over K, each rounded to the model dtype."""
QUANTIZED_STEPS = {"float8_e4m3fn": 0.06, "float4_e2m1": 0.25}
"""Of a row's size: where activations are quantized, a value on the border of two codes may fall either way."""
COUNTS = {
    "uneven": (3, 0, 7, 1, 2),
    "all to one": (0, 0, 0, 7, 0),
    "full": (7, 7, 7, 7, 7),
    "none": (0, 0, 0, 0, 0),
    "one row": (0, 1, 0, 0, 0),
}
"""Rows of each local expert in turn, with C = 7."""
CAPACITY = 7


@attrs.frozen(kw_only=True)
class Setting:
    """One layer on one rank, and one kind of batch.

    Attributes:
        batched: the format.
        experts: E_l.
        parallel: "none", "ep" (two ranks hold E_l each) or "tp" (each expert is split in two).
        rows: R (STANDARD).
        ids: one of `material.IDS` (STANDARD).
        counts: a key of `COUNTS` (BATCHED).
        payload: rows arrive in the scheme's own payload.
    """

    batched: bool = False
    dtype: torch.dtype = torch.float32
    activation: ActivationSpec = PLAIN
    experts: int = 5
    top_k: int = 2
    hidden: int = 24
    inner: int = 20
    parallel: str = "none"
    rows: int = 9
    ids: str = "distinct"
    counts: str = "uneven"
    scheme: QuantScheme = UNQUANTIZED
    payload: bool = False
    on_input: bool = False
    deterministic: bool = False

    @property
    def format(self) -> ActivationFormat:
        return ActivationFormat.BATCHED if self.batched else ActivationFormat.STANDARD

    @property
    def config(self) -> MoEConfig:
        return MoEConfig(
            num_experts=self.experts * (2 if self.parallel == "ep" else 1),
            top_k=self.top_k,
            hidden_size=self.hidden,
            intermediate_size=self.inner * (2 if self.parallel == "tp" else 1),
            dtype=self.dtype,
            activation=self.activation,
            router_weight_on_input=self.on_input,
            deterministic=self.deterministic,
        )

    def problem(self, device: Device) -> Problem:
        parallel = MoEParallelConfig(
            ep_size=2 if self.parallel == "ep" else 1, tp_size=2 if self.parallel == "tp" else 1
        )
        return Problem(
            config=self.config, parallel=parallel, scheme=self.scheme, device=device, routing_is_external=True
        )

    @property
    def payloads(self) -> frozenset[str]:
        return frozenset({self.scheme.name if self.payload else MODEL_DTYPE_PAYLOAD})


@attrs.frozen(eq=False)
class Rows:
    """A batch as a dispatch would deliver it, on the CPU.

    Attributes:
        x: `[R, H]` or `[E_l, C, H]` in the model dtype; rows that nobody computes are NaN.
        routing: STANDARD; local ids.
        counts: BATCHED, int32 `[E_l]`.
        num_rows: STANDARD, the valid prefix, or None.
    """

    x: torch.Tensor
    routing: Routing | None = None
    counts: torch.Tensor | None = None
    num_rows: int | None = None


@attrs.frozen(eq=False)
class Loaded:
    """A layer's weights, as the backend reads them and as the reference does."""

    layer: RoutedExperts
    weights: ExpertWeights
    true: ExpertWeights


@attrs.frozen(eq=False)
class ExpertsBench:
    """The backend under test.

    Attributes:
        candidate: the backend, probed.
        device: where it runs.
    """

    candidate: ExpertsCandidate
    device: torch.device

    def plan(self, setting: Setting, device: Device | None = None) -> Plan:
        """Raises `UnsupportedError` where the backend can't run it."""
        problem = setting.problem(device or Device.of(self.device))
        return select(problem, [pass_through(setting.format, setting.payloads)], [self.candidate])

    def possible(self, setting: Setting) -> Plan:
        """The plan; `Skip` with the backend's own reason where it refuses."""
        try:
            return self.plan(setting)
        except UnsupportedError as error:
            reasons = dict.fromkeys(item.reason for report in error.rejections for item in report.rejections)
            raise Skip("; ".join(reasons)) from None

    def make(self, setting: Setting) -> Experts:
        plan = self.possible(setting)
        parallel, config = plan.problem.parallel, plan.config
        return made_experts(self.candidate, (config, parallel, plan.scheme, None, config.placement))

    def load(self, setting: Setting, seed: int = 0) -> Loaded:
        """Random weights, in the scheme and the layout that the plan's experts read."""
        plan = self.possible(setting)
        layer = fill(RoutedExperts(plan, _method(plan.scheme), self.device), seed)
        canonical = layer
        if plan.weight_layout != CANONICAL_LAYOUT:
            twin = attrs.evolve(plan, weight_layout=CANONICAL_LAYOUT)
            canonical = fill(RoutedExperts(twin, _method(plan.scheme), self.device), seed)
        true = canonical.weights
        if plan.scheme.weight is not None:
            true = dequantize_weights(true, plan.scheme.weight)
            true = attrs.evolve(
                true, w13_input_scale=canonical.weights.w13_input_scale, w2_input_scale=canonical.weights.w2_input_scale
            )
        return Loaded(layer, layer.weights, material.mapped(true, lambda tensor: tensor.cpu()))

    def batch(self, setting: Setting, seed: int = 0) -> Rows:
        if setting.batched:
            counts = (COUNTS[setting.counts] * -(-setting.experts // 5))[: setting.experts]
            x = material.tokens(setting.experts * CAPACITY, setting.hidden, setting.dtype, seed)
            x = x.view(setting.experts, CAPACITY, setting.hidden)
            held = torch.tensor(counts, dtype=torch.int32)
            past = torch.arange(CAPACITY) >= held.unsqueeze(1)
            return Rows(x.masked_fill(past.unsqueeze(2), torch.nan), counts=held)
        x = material.tokens(setting.rows, setting.hidden, setting.dtype, seed)
        routing = material.choose(setting.ids, setting.rows, setting.experts, setting.top_k, seed)
        nobody = (routing.topk_ids < 0).all(dim=1, keepdim=True)
        return Rows(x.masked_fill(nobody, torch.nan), Routing(routing.topk_ids.int(), routing.topk_weights))

    def delivered(self, setting: Setting, rows: Rows, pad: int = 0) -> Dispatched:
        """`pad`: columns between the rows of x."""
        x, scale = rows.x, None
        if setting.payload:
            assert setting.scheme.activation is not None, "a payload is the activations' format"
            x, scale = formats.quantize(x, setting.scheme.activation)
            scale = scale.to(self.device)
        if pad:
            x = torch.cat([x, torch.full_like(x[..., :pad], 3)], dim=-1)[..., : x.shape[-1]]
        ids, weights = (None, None) if rows.routing is None else (rows.routing.topk_ids, rows.routing.topk_weights)
        return Dispatched(
            x=x.to(self.device) if not pad or self.device.type == "cpu" else _padded_to(x, self.device, pad),
            handle=None,
            x_scale=scale,
            topk_ids=None if ids is None else ids.to(self.device),
            topk_weights=None if weights is None else weights.to(self.device),
            num_rows=None
            if rows.num_rows is None
            else torch.tensor([rows.num_rows], dtype=torch.int32).to(self.device),
            tokens_per_expert=None if rows.counts is None else rows.counts.to(self.device),
        )

    def run(
        self,
        setting: Setting,
        experts: Experts,
        weights: ExpertWeights,
        rows: Rows,
        *,
        fill_byte: int = 255,
        pad: int = 0,
        dispatched: Dispatched | None = None,
    ) -> torch.Tensor:
        """One `apply`, in guarded memory of exactly the declared sizes; the result on the CPU."""
        dispatched = dispatched or self.delivered(setting, rows, pad)
        shape = (*rows.x.shape[:-1], setting.hidden)
        bound = rows.x.shape[1 if setting.batched else 0]
        spaces = self.workspaces(setting, experts, bound, fill_byte)
        out = Guarded(shape, setting.dtype, self.device, pad=pad)
        handed = {name: space.tensor for name, space in spaces.items()}
        returned: Any = experts.apply(dispatched, weights, handed, out.tensor)
        if returned is not None:
            raise Violation(
                "out is written whole",
                f"apply returned a {type(returned).__name__}; the contract is to write into out, and to return nothing "
                "(Experts.apply, docs/api.md)",
            )
        out.check("out is written whole", "out")
        for name, space in spaces.items():
            space.check("workspaces", f"workspace {name!r}, {tuple(space.tensor.shape)} {space.tensor.dtype}")
        return out.tensor.cpu()

    def workspaces(self, setting: Setting, experts: Experts, bound: int, fill_byte: int) -> Mapping[str, Guarded]:
        shapes = workspace_shapes(self.candidate, experts, bound, setting.format)
        return {
            name: Guarded(tuple(shape), dtype, self.device, fill=fill_byte) for name, (shape, dtype) in shapes.items()
        }

    def check(
        self, setting: Setting, out: torch.Tensor, rows: Rows, loaded: Loaded, duty: str, *, explain: bool = False
    ) -> None:
        """Hold a result to the truth; in STANDARD format also the rows of nobody, which are zero.

        `explain`: look for the mistake that gives such numbers, and name its duty instead.
        """
        problem, got = self.problem64(setting, out, rows, loaded)
        explanations = problem.expert_explanations() if explain else None
        spec = setting.scheme.activation
        if spec is None:
            check_numbers(got, problem.truth, duty=duty, steps=STEPS[setting.dtype], explanations=explanations)
            return
        terms = quantized_terms(problem, spec, setting.dtype)
        truth = Truth.of(terms.sum(0), terms)
        steps = QUANTIZED_STEPS[spec.dtype] / 2.0**-24
        check_numbers(got, truth, duty=duty, steps=steps, dtype=torch.float32, explanations=explanations)

    def problem64(
        self, setting: Setting, out: torch.Tensor, rows: Rows, loaded: Loaded
    ) -> tuple[Problem64, torch.Tensor]:
        """The batch as tokens with choices, and the rows of `out` that are theirs."""
        true = loaded.true
        if rows.counts is not None:
            kept = torch.arange(rows.x.shape[1]) < rows.counts.unsqueeze(1)
            expert = torch.arange(setting.experts).unsqueeze(1).expand(kept.shape)[kept].unsqueeze(1)
            routing = Routing(expert, torch.ones(expert.shape))
            return Problem64(rows.x[kept], routing, true, setting.activation), out[kept]
        assert rows.routing is not None
        ids = rows.routing.topk_ids.long()
        if rows.num_rows is not None:
            ids = ids.masked_fill((torch.arange(ids.shape[0]) >= rows.num_rows).unsqueeze(1), -1)
        routing = Routing(ids, rows.routing.topk_weights)
        return Problem64(rows.x, routing, true, setting.activation, setting.on_input), out


def _padded_to(x: torch.Tensor, device: torch.device, pad: int) -> torch.Tensor:
    wide = torch.full((*x.shape[:-1], x.shape[-1] + pad), 3, dtype=x.dtype, device=device)
    wide[..., : x.shape[-1]] = x.to(device)
    return wide[..., : x.shape[-1]]


def fill(layer: RoutedExperts, seed: int = 0) -> RoutedExperts:
    """Load random weights of every expert on this rank, then pack."""
    config = layer.config
    source = material.random_weights(
        config.num_experts, config.hidden_size, config.intermediate_size, config.activation, config.dtype, seed
    )
    activation = layer.quant_method.scheme.activation
    for expert in layer.expert_map.local_experts:
        for name, tensor in material.gate_and_up(source, expert).items():
            layer.load_expert(expert, name, tensor)
            if activation is not None and (activation.second_level or not activation.dynamic) and "bias" not in name:
                largest = formats.E4M3_MAX * (formats.E2M1_MAX if activation.second_level else 1)
                layer.load_expert(expert, f"{name}_input_scale", torch.tensor(6.0 / largest))
    layer.pack_weights()
    return layer


def _method(scheme: QuantScheme) -> Any:
    return registry().find("quant_methods", scheme.name).factory()


def quantized_terms(problem: Problem64, spec: QuantSpec, dtype: torch.dtype) -> torch.Tensor:
    """`Problem64.terms` of a scheme that quantizes what goes into each GEMM, as the rows of one expert, in float64."""
    ids, weights, true = problem.routing.topk_ids, problem.routing.topk_weights.to(F64), problem.weights
    terms = torch.zeros((ids.shape[1], *problem.x.shape), dtype=F64)
    for expert in range(true.w13.shape[0]):
        row, choice = torch.where(ids == expert)
        if not len(row):
            continue
        scale = weights[row, choice].unsqueeze(1)
        x = problem.x[row].to(F64) * scale if problem.on_input else problem.x[row].to(F64)
        h = _first(x.to(dtype), true, expert, spec)
        if true.w13_bias is not None:
            h = h + true.w13_bias[expert].to(F64)
        act = activation_reference(h, attrs.evolve(problem.activation, gate_up_layout=true.gate_up_layout))
        y = _quantized(act.to(dtype), spec, true.w2_input_scale, expert, 0) @ true.w2[expert].to(F64).T
        if true.w2_bias is not None:
            y = y + true.w2_bias[expert].to(F64)
        terms[choice, row] = y if problem.on_input else y * scale
    return terms


def _first(x: torch.Tensor, true: ExpertWeights, expert: int, spec: QuantSpec) -> torch.Tensor:
    """The first GEMM; gate and up may have input scales of their own."""
    w13 = true.w13[expert].to(F64)
    if true.gate_up_layout is None or true.w13_input_scale is None:
        return _quantized(x, spec, true.w13_input_scale, expert, 0) @ w13.T
    inner = w13.shape[0] // 2
    interleaved = true.gate_up_layout is GateUpLayout.INTERLEAVED
    h = torch.empty(x.shape[0], w13.shape[0], dtype=F64)
    for half in range(2):
        rows = slice(half, None, 2) if interleaved else slice(half * inner, (half + 1) * inner)
        h[:, rows] = _quantized(x, spec, true.w13_input_scale, expert, half) @ w13[rows].T
    return h


def _quantized(x: torch.Tensor, spec: QuantSpec, scales: torch.Tensor | None, expert: int, half: int) -> torch.Tensor:
    scale = None if scales is None else scales[expert, half]
    if spec.second_level:
        return formats.quantize_dequantize(x, spec, global_scale=scale).to(F64)
    static = None if spec.dynamic or scale is None else scale.reshape(1, 1)
    return formats.quantize_dequantize(x, spec, scale=static).to(F64)
