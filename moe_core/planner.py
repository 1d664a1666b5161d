"""What a layer costs one rank, in bytes and FLOPs, without weights, a group or a device: a dry run of a plan.

Every byte comes from what allocates at run time: weights from the quantization method's `create_weights` on the meta
device, workspaces from the experts' `workspace_shapes`, rows and wire from the dispatch's declared `footprint`. What
depends on the routing is the mean over uniform routing: every set of K different experts equally likely.

Shape letters: T tokens on this rank · H hidden · I intermediate per rank · E experts, global · E_l local experts ·
K top-k · W ranks · R received rows · C row capacity per local expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch

from moe_core.answers import footprint_of, probed
from moe_core.config import Problem
from moe_core.errors import PluginError, UnsupportedError
from moe_core.footprint import payload_row_bytes, share_of_tokens
from moe_core.forms import made_dispatch, made_experts, made_method, who
from moe_core.interfaces import Candidate
from moe_core.kernel import workspace_bytes
from moe_core.plugins import registry
from moe_core.routed_experts import RoutedExperts
from moe_core.select import Plan, select
from moe_core.types import ActivationFormat, Availability, DispatchFootprint, PairReport, Rejection


@attrs.frozen(kw_only=True)
class Cost:
    """One step of one layer on one rank (that of the problem: rank 0 holds the most experts). Bytes, unless said.

    Attributes:
        plan: what runs.
        tokens: T on every rank.
        footprint: the dispatch's share, as it declares it; None: it declares nothing, so what follows from it is None.
        weight_bytes: of the layer on this rank, scales included.
        loading_bytes: what loading needs on top of the weights: one expert, whole, in the model dtype.
        workspace_bytes: what the experts ask for at the row bound; None: they can't be made on this machine.
        output_bytes: the layer's output `[T, H]`.
        expert_output_bytes: what the core allocates for the experts' output.
        reduce_wire_bytes: received in the runner's sum over ranks (a reduce-scatter and an all-gather), if it has one.
        needed_wire_bytes: the least that must cross: each token once to each rank that has an expert of its, and one
            sum back. None where tokens need not move.
        choices: rows that the experts have to compute: (token, expert) pairs.
        slots: rows that they are given: R, or E_l · C.
        filled: those of the slots that hold a row with work.
        active_experts: local experts that at least one token chose.
        flops: of the two GEMMs on `choices` rows.
        traffic_bytes: the least that the experts read and write: weights of the active ones, rows in, rows out.
    """

    plan: Plan
    tokens: int
    footprint: DispatchFootprint | None
    weight_bytes: int
    loading_bytes: int
    output_bytes: int
    reduce_wire_bytes: int
    needed_wire_bytes: int | None
    choices: float
    active_experts: float
    flops: float
    traffic_bytes: float
    workspace_bytes: int | None = None
    expert_output_bytes: int | None = None
    slots: int | None = None
    filled: float | None = None

    @property
    def wire_bytes(self) -> int | None:
        """All that this rank receives in a step, the runner's sum included."""
        if self.footprint is None:
            return None
        return self.footprint.dispatch_wire_bytes + self.footprint.combine_wire_bytes + self.reduce_wire_bytes

    @property
    def step_bytes(self) -> int | None:
        """The most that a step allocates at once: an upper bound, since not all of it lives at the same moment."""
        dispatch, workspace, rows = self.footprint, self.workspace_bytes, self.expert_output_bytes
        if dispatch is None or workspace is None or rows is None:
            return None
        return self.output_bytes + rows + dispatch.held_bytes + max(workspace, dispatch.scratch_bytes)

    @property
    def buffer_bytes(self) -> int | None:
        """Memory that the dispatch keeps for good."""
        return None if self.footprint is None else self.footprint.buffer_bytes

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        shown = attrs.asdict(self, filter=lambda attribute, _: attribute.name not in ("plan", "footprint"))
        shown["footprint"] = None if self.footprint is None else attrs.asdict(self.footprint)
        return shown | {"wire_bytes": self.wire_bytes, "step_bytes": self.step_bytes}


@attrs.frozen(kw_only=True)
class PairCost:
    """A pair of backends, what came of it, and what it costs.

    Attributes:
        report: the verdict with all reasons.
        cost: None where more speaks against it than that it can't be had here.
        missing: what can't be had here, though the layer would suit it, one line each: `cost` is what it would be where
            these are mended.
        broken: which backend of a pair that could run broke its contract, so that there is no cost.
        unusable: which backend of a pair that could run can't be built: its factory makes none. Also among the reasons.
    """

    report: PairReport
    cost: Cost | None
    missing: tuple[str, ...] = ()
    broken: tuple[Rejection, ...] = ()
    unusable: tuple[Rejection, ...] = ()

    @property
    def verdict(self) -> str:
        return "not here" if self.missing else self.report.verdict


class _NotConnected(Exception):
    """A backend's factory got as far as talking to other ranks."""


@attrs.frozen(eq=False)
class _Nobody:
    """Stands for the ranks of a layer that is planned and not run: their number is known, and nobody is there."""

    rank: int
    size: int

    def __getattr__(self, name: str) -> Any:
        raise _NotConnected(name)


def pair_costs(problem: Problem, tokens: int) -> list[PairCost]:
    """Every pair of registered backends for a layer, in the order in which selection walks them.

    A backend that breaks its contract is one more reason against its pair, and the others are costed.

    Args:
        problem: the layer, its spread, its scheme and the device, which need not be here.
        tokens: T, on every rank.
    """
    found = registry()
    dispatches = {name: probed(candidate) for name, candidate in found.dispatch.items()}
    experts = {name: probed(candidate) for name, candidate in found.experts.items()}
    try:
        reports = select(problem, list(dispatches.values()), list(experts.values())).reports
    except UnsupportedError as error:
        reports = tuple(error.rejections)
    unusable = {
        id(candidate): rejection
        for kind, candidates in (("dispatch", dispatches), ("experts", experts))
        for name, candidate in candidates.items()
        if any(getattr(report, kind) == name and not report.rejections for report in reports)
        and (rejection := _unusable(kind, candidate, problem))
    }
    return [_pair_cost(problem, tokens, report, dispatches[report.dispatch], experts[report.experts], unusable)
            for report in reports]  # fmt: skip


def _unusable(kind: str, candidate: Candidate[Any], problem: Problem) -> Rejection | None:
    """Why a backend can't be built: its factory makes none. What it lacks here, ranks say, is no such reason."""
    parallel = problem.parallel
    ranks = max(parallel.ep_size, parallel.tp_size)
    group = None if ranks == 1 else _Nobody(parallel.ep_rank if parallel.ep_size > 1 else parallel.tp_rank, ranks)
    made = made_dispatch if kind == "dispatch" else made_experts
    try:
        made(candidate, (problem.config, parallel, problem.scheme, group, problem.config.placement))
    except PluginError as error:
        owner = who(kind, candidate)
        says, origin = str(error).removeprefix(f"{owner}: "), owner.removeprefix(f"{kind} {candidate.name!r} ")
        return Rejection(f"{kind} {candidate.name}", f"not usable: {says} {origin}")
    except Exception:  # noqa: BLE001 - a vendor's library may raise what it likes where its device or ranks are missing
        return None
    return None


def _pair_cost(
    problem: Problem,
    tokens: int,
    report: PairReport,
    dispatch: Candidate[Any],
    experts: Candidate[Any],
    unusable: Mapping[int, Rejection],
) -> PairCost:
    missing = {
        f"{kind} {candidate.name}": candidate.availability.reason
        for kind, candidate in (("dispatch", dispatch), ("experts", experts))
        if not candidate.availability.ok
    }
    usable = [attrs.evolve(candidate, availability=Availability(True)) for candidate in (dispatch, experts)]
    try:
        plan = select(problem, usable[:1], usable[1:])
    except UnsupportedError:
        return PairCost(report=report, cost=None)
    if not report.rejections and (against := [unusable[id(c)] for c in (dispatch, experts) if id(c) in unusable]):
        told = attrs.evolve(report, rejections=tuple(against))
        return PairCost(report=told, cost=None, unusable=tuple(against))
    shown = tuple(f"{owner}: {reason}" for owner, reason in missing.items())
    try:
        cost = cost_of(plan, tokens)
    except PluginError as error:  # one backend's mistake, which its text names; the other pairs' costs are known
        owner, _, reason = str(error).partition(": ")
        broken = (Rejection(owner, reason),)
        return PairCost(report=attrs.evolve(report, rejections=report.rejections + broken), cost=None, broken=broken)
    return PairCost(report=report, cost=cost, missing=shown)


def cost_of(plan: Plan, tokens: int) -> Cost:
    """What a plan costs one rank at T tokens on every rank.

    Raises:
        PluginError: the dispatch's footprint raised, or is none; or the experts' factory makes none.
    """
    problem, config = plan.problem, plan.config
    parallel, hidden, itemsize = problem.parallel, config.experts_hidden_size, config.dtype.itemsize
    own_tokens = not parallel.tokens_are_replicated
    ranks = max(parallel.ep_size, parallel.tp_size)
    everyones = tokens * ranks if own_tokens else tokens
    share = share_of_tokens(problem)
    choices = everyones * config.top_k * problem.num_local_experts / config.num_experts
    active = problem.num_local_experts * (1 - (1 - config.top_k / config.num_experts) ** everyones)
    weights = weight_bytes(plan)
    row_bytes = sum(payload_row_bytes(problem, plan.payload))
    matrices = 3 if config.activation.gated else 2
    standard = plan.activation_format is ActivationFormat.STANDARD
    rows = everyones * share if standard else choices
    moved = (ranks - 1) * tokens * share if own_tokens else 0
    told = 8 * config.top_k if standard else 0  # an id and a router weight for each choice
    cost = Cost(
        plan=plan,
        tokens=tokens,
        footprint=None,
        weight_bytes=weights,
        loading_bytes=matrices * config.hidden_size * config.intermediate_size * itemsize,
        output_bytes=tokens * hidden * itemsize,
        reduce_wire_bytes=0 if plan.output_is_reduced else _all_reduce(tokens * hidden * itemsize, ranks),
        needed_wire_bytes=round(moved * (row_bytes + hidden * itemsize)) if own_tokens else None,
        choices=choices,
        active_experts=active,
        flops=2.0 * matrices * choices * hidden * problem.local_intermediate_size,
        traffic_bytes=active * weights / problem.num_local_experts + rows * (row_bytes + hidden * itemsize + told),
    )
    footprint = footprint_of(plan.dispatch, problem, plan.payload, tokens)
    if footprint is None:
        return cost
    slots = footprint.rows if standard else footprint.rows * problem.num_local_experts
    return attrs.evolve(
        cost,
        footprint=footprint,
        workspace_bytes=_workspace_bytes(plan, footprint.rows),
        expert_output_bytes=0 if footprint.own_output else slots * hidden * itemsize,
        slots=slots,
        filled=rows,
    )


def weight_bytes(plan: Plan) -> int:
    """One layer's weights on this rank, as its quantization method creates them."""
    method = made_method(registry().find("quant_methods", plan.scheme.name))
    layer = RoutedExperts(plan, method, torch.device("meta"))
    return sum(parameter.nbytes for parameter in layer.parameters())


def _workspace_bytes(plan: Plan, rows: int) -> int | None:
    """Of the experts that serve this row bound; None: what they need to be made is not here.

    Raises:
        PluginError: their factory makes no experts, or they declare no workspaces that can be read.
    """
    chosen = [item for item in plan.ranges if item.first_row <= rows][-1]
    arguments = (plan.config, plan.problem.parallel, plan.scheme, None, plan.config.placement)
    try:
        experts = made_experts(chosen.candidate, arguments)
    except PluginError:
        raise
    except Exception:  # noqa: BLE001 - a vendor's library may raise what it likes where its device is missing
        return None
    return workspace_bytes(chosen.candidate, experts, rows, plan.activation_format)


def _all_reduce(size: int, ranks: int) -> int:
    """Received by each rank: its part of the sum from all others, then all other parts."""
    return 2 * size * (ranks - 1) // ranks
