"""Selection: a `Problem` and the candidates in, a `Plan` out. Pure: no device call, no environment, no discovery.

Pairs (dispatch, experts) are walked in the order of their priorities; the first without a rejection wins. Every pair
keeps all of its reasons, so that a refusal and a choice are explained by the same table. The dispatch decides the
activation format; the experts must take it.

The winner fixes the dispatch, payload and weight layout. Other experts that can share these with it stand in the same
plan, each for the row bounds at which it is best: by what `moe-core tune` measured, else by declared priority.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from moe_core.answers import refusal
from moe_core.config import MoEConfig, MoEParallelConfig, Problem
from moe_core.errors import UnsupportedError
from moe_core.hookspecs import PLUGIN_API
from moe_core.interfaces import Candidate
from moe_core.quant import QuantScheme
from moe_core.ranges import ExpertsCandidate as ExpertsCandidate  # beside DispatchCandidate, for who calls `select`
from moe_core.ranges import ExpertsRange, choose_ranges, contenders, peak_priority, unmeasured
from moe_core.reports import format_summary, format_table, table
from moe_core.tuned import NOT_TUNED, LaunchTable, Tuned
from moe_core.types import (
    MODEL_DTYPE_PAYLOAD,
    ROW_WISE_PAYLOAD,
    ActivationFormat,
    DispatchCapabilities,
    Duty,
    PairReport,
    Rejection,
    SharedExpertsOrder,
    priority_at,
)

DispatchCandidate = Candidate[DispatchCapabilities]

CANONICAL_LAYOUT = "canonical"


@attrs.frozen(kw_only=True)
class Plan:
    """What selection decided for one layer. Everything that follows from it is derived, never stored elsewhere.

    Attributes:
        problem: what was asked.
        dispatch: the dispatch backend.
        ranges: the experts backends, by row bound, from 0 up.
        fitting: all experts that could stand in `ranges`: the same on every rank, whatever was measured there.
        payload: what goes over the wire: `MODEL_DTYPE_PAYLOAD` or a scheme's name.
        weight_layout: the layout that all experts of this plan read.
        shared_experts_order: when the shared experts run.
        owners: each duty that this layer has → the one stage that does it.
        reports: every candidate pair with its reasons.
        tuned: what this user measured of the layer on this device.
    """

    problem: Problem
    dispatch: DispatchCandidate
    ranges: tuple[ExpertsRange, ...]
    fitting: tuple[ExpertsCandidate, ...]
    payload: str
    weight_layout: str
    shared_experts_order: SharedExpertsOrder
    owners: Mapping[Duty, str]
    reports: tuple[PairReport, ...] = attrs.field(repr=False)
    tuned: Tuned = attrs.field(default=NOT_TUNED, repr=False)

    @property
    def config(self) -> MoEConfig:
        return self.problem.config

    @property
    def scheme(self) -> QuantScheme:
        return self.problem.scheme

    @property
    def parallel(self) -> MoEParallelConfig:
        """The parallel config, resolved: the properties that depend on the dispatch answer from its declaration."""
        return attrs.evolve(self.problem.parallel, dispatch=self.dispatch.capabilities)

    @property
    def activation_format(self) -> ActivationFormat:
        return self.dispatch.capabilities.activation_format

    @property
    def routes_internally(self) -> bool:
        """The experts take logits. Another fact than `runner.is_internal_router`."""
        return self.ranges[0].candidate.capabilities.routes_internally

    @property
    def output_is_reduced(self) -> bool:
        """The kernel's output needs no sum over ranks any more."""
        return self.owners.get(Duty.CROSS_RANK_REDUCE) != "runner"

    @property
    def launch(self) -> Mapping[str, LaunchTable]:
        """Launch parameters that this user measured, by the experts' label."""
        return self.tuned.of(self.activation_format).launch

    @property
    def ranges_by(self) -> str:
        """What the ranges were chosen by, in one sentence."""
        if len(contenders(self.fitting)) == 1:
            return "; ".join(filter(None, ["no other experts to choose among", self.tuned.complaint]))
        complaint = self.tuned.complaint or unmeasured(self.fitting, self.tuned.of(self.activation_format).points)
        if complaint:
            return f"declared priorities; {complaint}"
        return f"times that moe-core tune measured on {self.tuned.date} ({self.tuned.source})"

    def advice(self) -> dict[str, Any]:
        """What the ranks of a layer had better agree on: a difference costs speed and no numbers."""
        return {
            "ranges of experts": [(r.first_row, r.candidate.label) for r in self.ranges],
            "launch parameters measured": self.launch,
        }

    def fingerprint(self) -> dict[str, Any]:
        """What all ranks of a layer must agree on. Ranks, device indices and what was measured are not in it."""
        config, caps, parallel = self.config, self.dispatch.capabilities, self.problem.parallel
        return {
            "api": PLUGIN_API,
            "dispatch": f"{self.dispatch.name} ({self.dispatch.plugin})",
            "experts": sorted(candidate.label for candidate in self.fitting),
            "format": self.activation_format.value,
            "payload": self.payload,
            "dtype": str(config.dtype),
            "scheme": self.scheme.name,
            "num_experts": config.num_experts,
            "top_k": config.top_k,
            "hidden_size": config.experts_hidden_size,
            "intermediate_size": config.intermediate_size,
            "activation": str(config.activation),
            "router": config.router.name,
            "router_weight_on_input": config.router_weight_on_input,
            "routed_scaling": (config.routed_scaling_factor, config.routed_scaling.value),
            "shared_experts": self.shared_experts_order.value,
            "weight_layout": self.weight_layout,
            "parallel": {axis: getattr(parallel, f"{axis}_size") for axis in ("tp", "dp", "ep", "sp")},
            "placement": config.placement.value,
            "max_tokens_per_rank": config.max_tokens_per_rank,
            "owners": {duty.value: owner for duty, owner in self.owners.items()},
            "cuda_graph": config.cuda_graph,
            "split": caps.split,
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan and its reasons, for JSON."""
        config = self.config
        return {
            "layer": {
                "num_experts": config.num_experts,
                "top_k": config.top_k,
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "dtype": str(config.dtype).removeprefix("torch."),
                "activation": config.activation.function,
                "scheme": self.scheme.name,
                "device": self.problem.device.name or self.problem.device.type,
                "ep_size": self.problem.parallel.ep_size,
                "tp_size": self.problem.parallel.tp_size,
            },
            "dispatch": {"name": self.dispatch.name, "plugin": self.dispatch.plugin},
            "experts": [
                {
                    "first_row": r.first_row,
                    "name": r.candidate.name,
                    "plugin": r.candidate.plugin,
                    "why": r.why,
                }
                for r in self.ranges
            ],
            "ranges_by": self.ranges_by,
            "tuned": {"file": self.tuned.source, "date": self.tuned.date, "complaint": self.tuned.complaint},
            "format": self.activation_format.value,
            "payload": self.payload,
            "weight_layout": self.weight_layout,
            "shared_experts_order": self.shared_experts_order.value,
            "output_is_reduced": self.output_is_reduced,
            "owners": {duty.value: owner for duty, owner in self.owners.items()},
            "candidates": table(self.reports),
        }

    def explain(self) -> str:
        """The plan and every candidate pair with its reasons, as text. `to_dict` is the same for machines."""
        return f"{self.choice()}\n{format_table(self.reports)}"

    def choice(self) -> str:
        """What runs, and who owns which duty: `explain` without the other candidates."""
        experts = ", ".join(
            r.candidate.name if len(self.ranges) == 1 else f"{r.candidate.name} from {r.first_row} rows"
            for r in self.ranges
        )
        by = []
        if len(contenders(self.fitting)) > 1 or self.tuned.complaint:
            by = [f"ranges: {self.ranges_by}"]
            by += [
                f"  from {r.first_row} rows: {r.candidate.name}, {r.why}" for r in self.ranges if len(self.ranges) > 1
            ]
        chosen = (
            f"dispatch {self.dispatch.name} · experts {experts} · {self.activation_format.value} format · "
            f"payload {self.payload} · weights {self.weight_layout}"
        )
        if self.config.has_shared_experts:
            chosen += f" · shared experts {self.shared_experts_order.value}"
        if self.launch:
            by.append(f"launch parameters: also measured by moe-core tune, on {self.tuned.date} ({self.tuned.source})")
        several = " or ".join(dict.fromkeys(item.candidate.name for item in self.ranges))  # each of them owns the same
        shown = {d: f"experts {several}" if owner.startswith("experts ") else owner for d, owner in self.owners.items()}
        duties = ", ".join(f"{duty.value} by {owner}" for duty, owner in shown.items())
        return "\n".join([chosen, *by, f"each duty once: {duties}"])


def select(
    problem: Problem,
    dispatch_candidates: Sequence[DispatchCandidate],
    experts_candidates: Sequence[ExpertsCandidate],
    *,
    dispatch: str | None = None,
    experts: str | None = None,
    tuned: Tuned = NOT_TUNED,
) -> Plan:
    """Choose the backends for one layer.

    Args:
        problem: the layer, its spread, its scheme and device.
        dispatch_candidates, experts_candidates: what is registered, with `availability` filled in.
        dispatch, experts: explicit requests by name; honoured or refused, never replaced.
        tuned: what was measured of this layer on this device.

    Raises:
        UnsupportedError: no pair can run; carries and prints the whole table.
    """
    pairs = [
        (d, e)
        for d, e in _in_order(problem, dispatch_candidates, experts_candidates)
        if dispatch in (None, d.name) and experts in (None, e.name)
    ]
    reports = [
        PairReport(d.name, e.name, (_priority_of(problem, d), peak_priority(e)), tuple(_reject_pair(problem, d, e)))
        for d, e in pairs
    ]
    winner = next((i for i, report in enumerate(reports) if not report.rejections), None)
    if winner is None:
        raise _no_pair(reports, dispatch, experts)
    chosen_dispatch, first = pairs[winner]
    payload = _payload(problem, chosen_dispatch, first)
    assert payload is not None, "a pair without a payload must have been rejected"
    for i, (d, e) in enumerate(pairs):
        if d is chosen_dispatch and not reports[i].rejections and (reason := _cannot_share(problem, d, first, e)):
            reports[i] = attrs.evolve(reports[i], rejections=(Rejection("pair", reason),))
    fitting = tuple(
        e for (d, e), report in zip(pairs, reports, strict=True) if d is chosen_dispatch and not report.rejections
    )
    ranges = choose_ranges(fitting, tuned.of(chosen_dispatch.capabilities.activation_format))
    running = {item.candidate.name for item in ranges}
    return Plan(
        problem=problem,
        dispatch=chosen_dispatch,
        ranges=ranges,
        fitting=fitting,
        payload=payload,
        weight_layout=_layout(problem, first),
        shared_experts_order=_shared_order(problem, chosen_dispatch),
        owners={duty: owners[0] for duty, owners in _ledger(problem, chosen_dispatch, first).items()},
        reports=tuple(
            attrs.evolve(report, chosen=report.dispatch == chosen_dispatch.name and report.experts in running)
            for report in reports
        ),
        tuned=tuned,
    )


def _no_pair(reports: Sequence[PairReport], dispatch: str | None, experts: str | None) -> UnsupportedError:
    asked = ", ".join(f"{k} {v!r}" for k, v in (("dispatch", dispatch), ("experts", experts)) if v)
    wanted = f" as asked ({asked})" if asked else ""
    against = format_summary(reports) if asked else format_table(reports)
    return UnsupportedError(f"no pair of backends can run this layer{wanted}:\n{against}", reports)


def _in_order(
    problem: Problem, dispatch_candidates: Sequence[DispatchCandidate], experts_candidates: Sequence[ExpertsCandidate]
) -> Iterator[tuple[DispatchCandidate, ExpertsCandidate]]:
    for d in sorted(dispatch_candidates, key=lambda c: (-_priority_of(problem, c), c.name)):
        for e in sorted(experts_candidates, key=lambda c: (-peak_priority(c), c.name)):
            yield d, e


def _priority_of(problem: Problem, dispatch: DispatchCandidate) -> int:
    return priority_at(dispatch.priority, problem.config.max_tokens_per_rank or 0)


def _cannot_share(
    problem: Problem, d: DispatchCandidate, first: ExpertsCandidate, other: ExpertsCandidate
) -> str | None:
    """Why two experts can't stand in one plan: payload, weight layout and routing are constants of a plan."""
    insist = f"to run it alone, insist on experts = {other.name!r}"
    ours, theirs = _layout(problem, first), _layout(problem, other)
    if ours != theirs:
        return f"reads weights in layout {theirs!r}, and {first.name}, which comes first, in {ours!r}; {insist}"
    ours, theirs = str(_payload(problem, d, first)), str(_payload(problem, d, other))
    if ours != theirs:
        return f"takes rows as {theirs!r}, and {first.name}, which comes first, as {ours!r}; {insist}"
    if first.capabilities.routes_internally != other.capabilities.routes_internally:
        return f"only one of it and {first.name}, which comes first, routes internally; {insist}"
    return None


def _layout(problem: Problem, e: ExpertsCandidate) -> str:
    return e.capabilities.weight_layout.get(problem.scheme.name, CANONICAL_LAYOUT)


def _payload(problem: Problem, d: DispatchCandidate, e: ExpertsCandidate) -> str | None:
    """The scheme's own payload where both can, else the model dtype where both can, else None."""
    both = d.capabilities.payloads & e.capabilities.payloads
    name, activation = problem.scheme.name, problem.scheme.activation
    if activation is not None and name in e.capabilities.payloads:
        row_wise = activation.row_wise and ROW_WISE_PAYLOAD in d.capabilities.payloads
        if row_wise or name in both:
            return name
    return MODEL_DTYPE_PAYLOAD if MODEL_DTYPE_PAYLOAD in both else None


def _shared_order(problem: Problem, d: DispatchCandidate) -> SharedExpertsOrder:
    config = problem.config
    if config.shared_experts_order is not None:
        return config.shared_experts_order
    if not config.has_shared_experts:
        return SharedExpertsOrder.NONE
    hides = d.capabilities.split and d.capabilities.overlap_safe
    return SharedExpertsOrder.INTERNAL if hides else SharedExpertsOrder.SEQUENTIAL


def _ledger(problem: Problem, d: DispatchCandidate, e: ExpertsCandidate) -> dict[Duty, list[str]]:
    """Every duty that this layer has, with all stages that claim it. One claim each is right."""
    config, parallel, caps = problem.config, problem.parallel, d.capabilities
    finalize, experts = f"finalize of {d.name}", f"experts {e.name}"
    claims: dict[str, frozenset[Duty]] = {
        finalize: caps.owns,
        experts: e.capabilities.owns.get(caps.activation_format, frozenset()),
    }
    needed = [Duty.ROUTER_WEIGHT, Duty.TOPK_SUM]
    owned: dict[Duty, list[str]] = {}
    if problem.scheme.activation is not None:
        quantizer = experts if _payload(problem, d, e) in (MODEL_DTYPE_PAYLOAD, None) else f"prepare of {d.name}"
        owned[Duty.INPUT_QUANTIZATION] = [quantizer]
    if config.activation.bias:
        needed.append(Duty.EXPERT_BIAS)
    if config.activation.limit is not None:
        needed.append(Duty.ACTIVATION_CLAMP)
    for duty in needed:
        owned[duty] = [stage for stage, duties in claims.items() if duty in duties]
    if config.router_weight_on_input and config.top_k == 1:
        owned[Duty.ROUTER_WEIGHT] = ["kernel, on the input"]  # every later stage sees weight 1
    extra = {duty: [s for s, duties in claims.items() if duty in duties] for duty in Duty}
    if config.routed_scaling_factor != 1.0:
        owned[Duty.ROUTED_SCALING] = ["runner", *extra[Duty.ROUTED_SCALING]]
    if parallel.ep_size > 1 or parallel.tp_size > 1:
        moves = not (caps.local_if_replicated and parallel.tokens_are_replicated)
        reduced = caps.output_reduced and moves and (parallel.ep_size > 1 or caps.gathers_tokens)
        owned[Duty.CROSS_RANK_REDUCE] = [finalize if reduced else "runner", *extra[Duty.CROSS_RANK_REDUCE]]
    if config.experts_hidden_size != config.hidden_size:
        owned[Duty.PADDING] = ["runner", *extra[Duty.PADDING]]
        owned[Duty.UNPADDING] = ["runner", *extra[Duty.UNPADDING]]
    return owned


def _reject_pair(problem: Problem, d: DispatchCandidate, e: ExpertsCandidate) -> Iterator[Rejection]:
    dispatch_name, experts_name = f"dispatch {d.name}", f"experts {e.name}"
    yield from (Rejection(dispatch_name, reason) for reason in _reject_dispatch(problem, d))
    yield from (Rejection(experts_name, reason) for reason in _reject_experts(problem, e))
    wanted = d.capabilities.activation_format
    if wanted not in e.capabilities.owns:
        takes = ", ".join(sorted(f.value for f in e.capabilities.owns)) or "none"
        yield Rejection(experts_name, f"takes {takes} format, {d.name} delivers {wanted.value}")
        return  # without a common format there is no payload and no ledger to speak of
    if _payload(problem, d, e) is None:
        carried, accepted = sorted(d.capabilities.payloads), sorted(e.capabilities.payloads)
        yield Rejection("pair", f"no common payload: {d.name} carries {carried}, {e.name} accepts {accepted}")
    if e.capabilities.routes_internally and d.capabilities.carries_tokens:
        yield Rejection("pair", f"{e.name} routes internally, so {d.name} would have no ids to dispatch by")
    config = problem.config
    if config.router_weight_on_input and config.top_k > 1 and wanted is ActivationFormat.BATCHED:
        yield Rejection("pair", f"router weight on the input with top_k = {config.top_k} needs standard format")
    for duty, owners in _ledger(problem, d, e).items():
        if len(owners) != 1:
            who = " and ".join(owners) if owners else "nobody"
            yield Rejection("pair", f"{duty.value} must have one owner, but is claimed by {who}")


def _reject_common(problem: Problem, candidate: DispatchCandidate | ExpertsCandidate) -> Iterator[str]:
    config, device, caps = problem.config, problem.device, candidate.capabilities
    if device.type not in caps.device_types:
        yield f"runs on {_listed(caps.device_types)}, not on {device.type}"
    elif caps.min_compute_capability and (device.compute_capability or (0, 0)) < caps.min_compute_capability:
        needed, has = caps.min_compute_capability, device.compute_capability
        yield f"needs compute capability {needed[0]}.{needed[1]}, {device.name or device.type} has {has}"
    if config.dtype not in caps.dtypes:
        supported = _listed(str(dtype).removeprefix("torch.") for dtype in caps.dtypes)
        yield f"dtype {str(config.dtype).removeprefix('torch.')}: supports {supported}"
    if caps.max_topk is not None and config.top_k > caps.max_topk:
        yield f"top_k = {config.top_k}: at most {caps.max_topk}"
    if config.cuda_graph and not caps.graph_capturable:
        yield "cannot be captured in a CUDA graph"
    if config.deterministic and not caps.deterministic:
        yield "is not deterministic"
    if reason := refusal(candidate, problem):
        yield reason


def _reject_dispatch(problem: Problem, d: DispatchCandidate) -> Iterator[str]:
    if not d.availability.ok:
        yield d.availability.reason
    caps, config, parallel = d.capabilities, problem.config, problem.parallel
    yield from _reject_common(problem, d)
    ep = parallel.ep_size
    if ep < caps.min_ep_size or (caps.max_ep_size is not None and ep > caps.max_ep_size):
        low, high = caps.min_ep_size, caps.max_ep_size
        wanted = f"{low} or more" if high is None else str(low) if low == high else f"{low} to {high}"
        here = f"ep = {ep}" if parallel.tp_size == 1 else f"ep = {ep} (tp = {parallel.tp_size})"
        yield f"needs {wanted} expert-parallel rank{'' if wanted == '1' else 's'}; here {here}"
    if ep > 1 and not caps.carries_tokens and not parallel.tokens_are_replicated:
        yield (
            f"carries no tokens between ranks, and with dp_size = {parallel.dp_size}, sp_size = {parallel.sp_size} "
            "each rank has tokens of its own"
        )
    if parallel.tp_size > 1 and parallel.sp_size > 1 and not caps.gathers_tokens:
        yield (
            f"gathers no tokens, and with tp_size = {parallel.tp_size}, sp_size = {parallel.sp_size} each rank has "
            "rows of its own and a part of every expert"
        )
    if config.placement not in caps.placements:
        yield f"placement {config.placement.value}: serves {_listed(p.value for p in caps.placements)}"
    tables = config.placement.value == "round_robin" and caps.needs_round_robin_routing_tables
    if config.num_experts % ep and (caps.needs_equal_shares or tables):
        legal = [n for n in range(1, config.num_experts + 1) if config.num_experts % n == 0]
        yield f"needs equal shares: {config.num_experts} experts on {ep} ranks; ranks that divide them: {legal}"
    if caps.hidden_sizes is not None and config.experts_hidden_size not in caps.hidden_sizes:
        yield f"hidden size {config.experts_hidden_size}: supports {sorted(caps.hidden_sizes)}"
    if caps.max_tokens_per_rank is not None and (
        config.max_tokens_per_rank is None or config.max_tokens_per_rank > caps.max_tokens_per_rank
    ):
        yield f"max_tokens_per_rank = {config.max_tokens_per_rank}: must be set, to at most {caps.max_tokens_per_rank}"
    order = config.shared_experts_order
    if order in (SharedExpertsOrder.INTERNAL, SharedExpertsOrder.MULTI_STREAM) and not caps.overlap_safe:
        yield f"is not declared safe for shared experts in order {order.value}"
    if order is SharedExpertsOrder.MULTI_STREAM and problem.device.type != "cuda":
        yield f"shared experts in order multi_stream need a CUDA device, not {problem.device.type}"


def _reject_experts(problem: Problem, e: ExpertsCandidate) -> Iterator[str]:
    if not e.availability.ok:
        yield e.availability.reason
    caps, config = e.capabilities, problem.config
    yield from _reject_common(problem, e)
    activation = config.activation
    if activation.function not in caps.activations:
        yield f"activation {activation.function}: supports {_listed(caps.activations)}"
    if activation.gate_up_layout is None:
        if not caps.ungated:
            yield "activation without a gate is not supported"
    elif activation.gate_up_layout not in caps.gate_up_layouts:
        supported = _listed(layout.value for layout in caps.gate_up_layouts)
        yield f"gate/up layout {activation.gate_up_layout.value}: supports {supported}"
    if activation.limit is not None and not caps.clamp:
        yield f"activation clamp (limit = {activation.limit}) is not supported"
    if activation.bias and not caps.bias:
        yield "expert biases are not supported"
    if problem.scheme.name not in caps.schemes:
        yield f"scheme {problem.scheme.name}: runs {_listed(caps.schemes)}"
    if config.router_weight_on_input and config.top_k > 1 and not caps.router_weight_on_input:
        yield f"router weight on the input with top_k = {config.top_k} is not supported"
    if caps.routes_internally and problem.routing_is_external:
        yield "routes internally, and here ids and weights come from outside"
    if caps.routes_internally and problem.parallel.ep_size > 1:
        yield f"routes internally, which needs all experts on one rank, not {problem.parallel.ep_size}"
    if config.experts_hidden_size % caps.hidden_alignment:
        yield f"hidden size {config.experts_hidden_size}: must be a multiple of {caps.hidden_alignment}"
    if problem.local_intermediate_size % caps.intermediate_alignment:
        yield (
            f"intermediate size per rank {problem.local_intermediate_size}: must be a multiple of "
            f"{caps.intermediate_alignment}"
        )


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
