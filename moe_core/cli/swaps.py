"""One step of one MoE layer, run again with some of its stages swapped for a reference's.

Three stages can be swapped, each alone: the dispatch, the experts, and what the quantization method made of the
checkpoint. A reference stage is written anew here or in `reference.py`, in plain torch; none imports a backend.

Shape letters: T tokens · H hidden · E_l local experts · K top-k · C row capacity per local expert.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch

from moe_core import formats
from moe_core.checkpoint import RULES, Checkpoint, expert_blocks, load_experts, packed_rules
from moe_core.emulated import EmulatedExperts
from moe_core.errors import CheckpointError, MoEError
from moe_core.forms import made_method
from moe_core.interfaces import Experts, PrepareAndFinalize, WorkspaceShapes
from moe_core.kernel import MoEKernel
from moe_core.packed import PackedMethod
from moe_core.plugins import registry
from moe_core.quant import QuantMethod, QuantSpec
from moe_core.reference import expert_rows_reference, moe_reference
from moe_core.routed_experts import RoutedExperts
from moe_core.select import CANONICAL_LAYOUT, Plan
from moe_core.types import MODEL_DTYPE_PAYLOAD, ActivationFormat, Dispatched, ExpertWeights, Routing

STAGES = ("dispatch", "quantization", "experts")
Stages = tuple[str, ...]


@attrs.frozen(kw_only=True, eq=False)
class Step:
    """What a layer got, and what it made of it.

    Attributes:
        module: the experts module's name.
        plan: by which it ran.
        weights: with which it ran.
        hidden_states: `[T, H]`.
        routing: `[T, K]`.
        out: `[T, H]`.
    """

    module: str
    plan: Plan
    weights: ExpertWeights
    hidden_states: torch.Tensor
    routing: Routing
    out: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.hidden_states.shape[0]


@attrs.frozen(kw_only=True)
class Verdict:
    """What came of comparing a step with the reference.

    Attributes:
        module: the experts module's name.
        plan: by which it ran.
        error: |out - reference| / |reference|; None: it could not be compared.
        allowed: the most that passes.
        swapped: stages that were the reference's → the error then; empty where nothing had to be swapped.
        blame: which stage is wrong, in one sentence; "" where none is.
        notes: what a reader must know.
    """

    module: str
    plan: Plan
    error: float | None
    allowed: float
    swapped: Mapping[Stages, float] = attrs.field(factory=dict)
    blame: str = ""
    notes: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        return self.error is not None and not self.error <= self.allowed  # NaN differs

    def to_dict(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "dispatch": self.plan.dispatch.name,
            "experts": [item.candidate.name for item in self.plan.ranges],
            "scheme": self.plan.scheme.name,
            "error": self.error,
            "allowed": self.allowed,
            "differs": self.differs,
            "swapped": {" and ".join(stages): error for stages, error in self.swapped.items()},
            "blame": self.blame,
            "notes": list(self.notes),
        }


def record(model: Any, modules: Sequence[str], ids: Sequence[int]) -> list[Step]:
    """Run the model once over a prompt; the steps of the named experts modules, in the order in which they ran."""
    from moe_core.integrations.transformers import layer_for  # noqa: PLC0415 - needs transformers

    steps: list[Step] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Any, ...], named: dict[str, Any], out: torch.Tensor) -> None:
            hidden, top_ids, top_weights = (*arguments, *named.values())
            routing = Routing(
                top_ids.reshape(-1, top_ids.shape[-1]), top_weights.reshape(-1, top_ids.shape[-1]).float()
            )
            if hasattr(module, "packed"):
                plan, weights = module.packed.kernel.plan, module.packed.weights
            else:
                layer = layer_for(module)
                plan, weights = layer.plan(top_ids.shape[-1]), layer.weights
            flat = hidden.reshape(-1, hidden.shape[-1]).to(plan.config.dtype)
            steps.append(Step(module=name, plan=plan, weights=weights, hidden_states=flat.clone(), routing=routing,
                              out=out.reshape(flat.shape).clone()))  # fmt: skip

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in modules]
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([list(ids)], device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return steps


def judge(step: Step, checkpoint: Checkpoint, allowed: float) -> Verdict:
    """Compare a step with the reference; where they differ, swap stages until they don't."""
    verdict = Verdict(module=step.module, plan=step.plan, error=None, allowed=allowed)
    if getattr(step.plan, "own_gate", False):
        return attrs.evolve(
            verdict, notes=(f"{step.module}: its gate is the module's own; there is no reference for it",)
        )
    weights: ExpertWeights | None = None
    notes: tuple[str, ...] = ()
    try:
        weights = weights_of(step, checkpoint)
    except (CheckpointError, MoEError) as problem:
        notes = (f"{step.module}: weights as they were loaded, so quantization is not judged: {problem}",)
    if weights is None and step.plan.weight_layout != CANONICAL_LAYOUT:
        return attrs.evolve(verdict, notes=notes)  # what lies there, its experts alone can read
    expected = _run(step, STAGES, weights)
    error = _relative(step.out, expected)
    verdict = attrs.evolve(verdict, error=error, notes=notes)
    if not verdict.differs:
        return verdict
    swapped: dict[Stages, float] = {(): _relative(_run(step, (), weights), expected)}
    singles, pairs = (list(itertools.combinations(_swappable(step, weights), count)) for count in (1, 2))
    for stages in (*singles, *pairs):
        kept = _together(step, stages)
        if kept not in swapped:
            swapped[kept] = _relative(_run(step, kept, weights), expected)
    mended = [stages for stages, found in swapped.items() if stages and found <= allowed]
    shown = {stages or ("none",): found for stages, found in swapped.items()}
    return attrs.evolve(verdict, swapped=shown, blame=_blame(step, swapped[()] <= allowed, mended))


def _swappable(step: Step, weights: ExpertWeights | None) -> list[str]:
    return [stage for stage in STAGES if stage != "quantization" or weights is not None]


def _together(step: Step, stages: Stages) -> Stages:
    """Experts with a weight layout of their own read no other weights, and nobody else reads theirs."""
    if step.plan.weight_layout == CANONICAL_LAYOUT or not {"quantization", "experts"} & set(stages):
        return stages
    return tuple(stage for stage in STAGES if stage in {*stages, "quantization", "experts"})


def _blame(step: Step, unreproduced: bool, mended: list[Stages]) -> str:
    plan = step.plan
    called = {
        "dispatch": f"dispatch {plan.dispatch.name} ({plan.dispatch.plugin})",
        "quantization": f"quantization: what was made of the checkpoint in scheme {plan.scheme.name}",
        "experts": "experts " + ", ".join(dict.fromkeys(item.candidate.label for item in plan.ranges)),
    }
    if unreproduced:
        return (
            "no stage: run again on its own with the same input, the layer is right; look for what differs between "
            "runs (memory that another kernel writes, a race, a step that is not deterministic)"
        )
    if not mended:
        return "more than one stage, or the kernel that joins them: no swap mends it"
    least = min(map(len, mended))
    return " or ".join(" and ".join(called[stage] for stage in stages) for stages in mended if len(stages) == least)


def _relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.float()
    return float((out.float() - expected).norm() / expected.norm().clamp(min=1e-30))


@torch.no_grad()
def _run(step: Step, stages: Stages, weights: ExpertWeights | None) -> torch.Tensor:
    """The step with some stages the reference's: `[T, H]`."""
    plan = step.plan
    if "dispatch" in stages:
        plan = attrs.evolve(plan, dispatch=attrs.evolve(plan.dispatch, factory=lambda *_: ReferenceDispatch(plan)))
    if "experts" in stages:
        swapped = [
            attrs.evolve(item, candidate=attrs.evolve(item.candidate, factory=lambda *_: reference_experts(plan)))
            for item in plan.ranges
        ]
        plan = attrs.evolve(plan, ranges=tuple(swapped))
    taken = weights if "quantization" in stages and weights is not None else step.weights
    out, _ = MoEKernel(plan)(step.hidden_states, step.routing, taken)
    return out


def weights_of(step: Step, checkpoint: Checkpoint) -> ExpertWeights:
    """A layer's weights, read anew from the files, in the canonical layout, by the core's own loader.

    A packed scheme's tensors keep their bytes: the plugin is only asked what checkpoints call them.

    Raises:
        CheckpointError: the files hold something else than the scheme says.
    """
    plan = attrs.evolve(step.plan, weight_layout=CANONICAL_LAYOUT)
    named = made_method(registry().find("quant_methods", plan.scheme.name))
    method = named if plan.scheme.weight is None else _core_method(plan, named)
    layer = RoutedExperts(plan, method, step.hidden_states.device)
    rules = (*RULES, *packed_rules(method.checkpoint_suffixes))
    blocks = {numbers_of(name): name for name in expert_blocks(checkpoint, rules)}
    if numbers_of(step.module) not in blocks:
        raise CheckpointError(f"no experts of {step.module} in {checkpoint.folder}; there are {list(blocks.values())}")
    load_experts(checkpoint, blocks[numbers_of(step.module)], layer, rules)
    return layer.weights


def _core_method(plan: Plan, named: QuantMethod) -> QuantMethod:
    class Method(PackedMethod):
        """The core's own loader, under the plugin's names."""

        checkpoint_suffixes: ClassVar[Mapping[str, str]] = named.checkpoint_suffixes

    return Method(plan.scheme)


def numbers_of(module: str) -> tuple[int, ...]:
    """What stays the same where transformers renames a block: its layer's number."""
    return tuple(int(number) for number in re.findall(r"\d+", module))


def reference_experts(plan: Plan) -> Experts:
    """In fp32: packed weights by the formulas of their scheme, others by the dense reference."""
    if plan.scheme.weight is not None:
        return EmulatedExperts(plan.config, plan.scheme)
    return ReferenceExperts(plan)


class ReferenceExperts(Experts):
    """The dense reference as an experts backend: both formats, unquantized weights."""

    def __init__(self, plan: Plan) -> None:
        self._config = plan.config

    def workspace_shapes(self, rows: int, activation_format: ActivationFormat) -> WorkspaceShapes:
        return {}

    def apply(
        self, dispatched: Dispatched, weights: ExpertWeights, workspaces: Mapping[str, torch.Tensor], out: torch.Tensor
    ) -> None:
        activation = attrs.evolve(self._config.activation, gate_up_layout=weights.gate_up_layout)
        if dispatched.tokens_per_expert is not None:
            out.copy_(expert_rows_reference(dispatched.x, dispatched.tokens_per_expert, weights, activation))
            return
        ids, router_weights = dispatched.topk_ids, dispatched.topk_weights
        assert ids is not None and router_weights is not None, "STANDARD format comes with ids and weights"
        if dispatched.num_rows is not None:
            ids = ids.clone()
            ids[int(dispatched.num_rows) :] = -1
        on_input = self._config.router_weight_on_input and self._config.top_k > 1  # K = 1 is done by the kernel
        out.copy_(
            moe_reference(dispatched.x, ids, router_weights, weights, activation, router_weight_on_input=on_input)
        )


class ReferenceDispatch(PrepareAndFinalize):
    """One rank, expert by expert, in the format and with the payload of a plan. C is the fullest expert's count."""

    def __init__(self, plan: Plan) -> None:
        self._format = plan.activation_format
        self._experts = plan.problem.num_local_experts
        self._payload: QuantSpec | None = None if plan.payload == MODEL_DTYPE_PAYLOAD else plan.scheme.activation

    def prepare(
        self,
        hidden_states: torch.Tensor,
        routing: Routing,
        *,
        num_experts: int,
        expert_map: torch.Tensor | None,
        payload: str,
    ) -> Dispatched:
        assert expert_map is None, "a model that was loaded here has all experts on one rank"
        x, scale = (hidden_states, None) if self._payload is None else formats.quantize(hidden_states, self._payload)
        if self._format is ActivationFormat.STANDARD:
            return Dispatched(x=x, x_scale=scale, handle=(), topk_ids=routing.topk_ids,
                              topk_weights=routing.topk_weights)  # fmt: skip
        rows = [torch.where((routing.topk_ids == expert).any(dim=1))[0] for expert in range(self._experts)]
        capacity = max(1, *map(len, rows))
        return Dispatched(
            x=_packed(x, rows, capacity),
            x_scale=None if scale is None else _packed(scale, rows, capacity),
            handle=rows,
            tokens_per_expert=torch.tensor([len(own) for own in rows], dtype=torch.int32, device=x.device),
        )

    def finalize(self, expert_out: torch.Tensor, handle: Any, routing: Routing, out: torch.Tensor) -> None:
        if self._format is ActivationFormat.STANDARD:
            out.copy_(expert_out)
            return
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        for expert, rows in enumerate(handle):
            share = torch.where(routing.topk_ids[rows] == expert, routing.topk_weights[rows], 0.0).sum(dim=1)
            total[rows] += expert_out[expert, : len(rows)].float() * share.unsqueeze(1)
        out.copy_(total)


def _packed(values: torch.Tensor, rows: Sequence[torch.Tensor], capacity: int) -> torch.Tensor:
    """Rows `[T, …]` as `[E_l, C, …]`."""
    packed = values.new_zeros((len(rows), capacity, values.shape[1]))
    for expert, own in enumerate(rows):
        packed[expert, : len(own)] = values[own]
    return packed
