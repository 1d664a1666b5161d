"""What `moe-core explain` tells of a kind of layers in a scheme: the plan, every pair, and what each would cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from moe_core.build import plan as plan_layer
from moe_core.cli.devices import Sheet, times
from moe_core.cli.layers import spread_over
from moe_core.cli.plan_details import PlanDetails, plan_details
from moe_core.cli.plan_output import UNKNOWN, percent, size
from moe_core.config import Problem
from moe_core.errors import UnsupportedError
from moe_core.forms import made_method
from moe_core.planner import PairCost, cost_of, pair_costs
from moe_core.plugins import registry
from moe_core.reports import format_summary, format_table, table
from moe_core.select import Plan
from moe_core.types import PairReport


@attrs.frozen(kw_only=True)
class Asked:
    """What explain was asked for.

    Attributes:
        dispatch, experts: backends to insist on; None: selection decides.
        world, spread: ranks, and how a layer lies on them.
        tokens: each T for which costs are told.
        sheet: the device's figures; None: not known.
    """

    dispatch: str | None = None
    experts: str | None = None
    world: int = 1
    spread: str = "ep"
    tokens: tuple[int, ...] = (1,)
    sheet: Sheet | None = None


@attrs.frozen(kw_only=True)
class SchemeTable:
    """One kind of layers in one scheme.

    Attributes:
        scheme: its name.
        plan: what runs; None: nothing can.
        details: kernels and workspaces of the plan.
        reports: every pair with its reasons.
        costs: T → what each pair would cost, for those that could run.
        uncosted: why a pair that could run has no cost, one line each: a backend of it broke its contract.
        unbuildable: the pairs that selection takes and that can't be built; what they lack is among the reasons.
    """

    scheme: str
    plan: Plan | None
    details: PlanDetails | None
    reports: tuple[PairReport, ...]
    costs: dict[int, dict[tuple[str, str], PairCost]]
    uncosted: tuple[str, ...] = ()
    unbuildable: tuple[str, ...] = ()

    def verdict(self, report: PairReport) -> str:
        """Of a pair: also "not here", if nothing else speaks against it."""
        cost = self.costs[max(self.costs)].get((report.dispatch, report.experts)) if self.costs else None
        return report.verdict if cost is None else cost.verdict

    def to_dict(self, sheet: Sheet | None) -> dict[str, Any]:
        shown = {"scheme": self.scheme} if self.plan is None else self.plan.to_dict()
        if self.details is not None:
            shown |= self.details.to_dict()
        costs = [
            {
                "tokens": tokens,
                "dispatch": dispatch,
                "experts": experts,
                "verdict": pair.verdict,
                "missing": list(pair.missing),
                **({} if pair.cost is None else pair.cost.to_dict()),
                "seconds": None if sheet is None or pair.cost is None else attrs.asdict(times(pair.cost, sheet)),
            }
            for tokens, pairs in self.costs.items()
            for (dispatch, experts), pair in pairs.items()
        ]
        told = {"candidates": table(self.reports), "costs": costs, "costs_missing": list(self.uncosted)}
        return {**shown, **told, "not_usable": list(self.unbuildable)}

    def lines(self, *, whole: bool) -> list[str]:
        """For people, but for the costs. `whole`: every pair with every reason, else each refused backend once."""
        if whole:
            candidates = format_table(self.reports).splitlines()
        else:
            candidates = [
                *format_summary(self.reports, self.verdict).splitlines(),
                f"  (each of the {len(self.reports)} pairs with every reason: --all)",
            ]
        if self.plan is None:
            return [f"scheme {self.scheme}: no pair of backends can run it", *candidates]
        choice = self.plan.choice().splitlines()
        if self.unbuildable:
            choice = [f"selection takes {', '.join(self.unbuildable)}, which can't be built: no layer runs so"]
        return [*choice, *candidates, *(self.details.lines() if self.details else [])]


def scheme_table(base: Plan, scheme: str, asked: Asked, *, strict: bool) -> SchemeTable:
    """A layer's plan on one rank, made again for another scheme or more ranks.

    Args:
        base: the layer's plan as it is.
        scheme: the scheme to plan for.
        asked: the rest.
        strict: a refusal is raised; if not, it is part of the answer.

    Raises:
        ValueError: the layer runs by a module's own functions, which no other plan knows.
        UnsupportedError: strict, and nothing can run it so.
    """
    own_gate = bool(getattr(base, "own_gate", False))
    if own_gate and (asked.world > 1 or scheme != base.scheme.name):
        raise ValueError(
            "layers that run unfused, by their module's own functions, are explained on one rank as they are"
        )
    plan: Plan | None = base
    reports = base.reports
    if not own_gate and (asked.world > 1 or scheme != base.scheme.name):
        try:
            problem = _problem(base, scheme, asked)
            plan = plan_layer(
                problem.config, parallel=problem.parallel, scheme=problem.scheme, dispatch=asked.dispatch,
                experts=asked.experts, device=problem.device, routing_is_external=problem.routing_is_external,
            )  # fmt: skip
            reports = plan.reports
        except UnsupportedError as error:
            if strict:
                raise
            plan, reports = None, tuple(error.rejections)
    problem = _problem(base, scheme, asked)
    pairs = {tokens: _pairs(problem, plan, tokens, reports) for tokens in sorted(asked.tokens)}
    costs = {
        tokens: {key: pair for key, pair in of_pairs.items() if pair.cost is not None}
        for tokens, of_pairs in pairs.items()
    }
    uncosted = [
        f"{' + '.join(key)}: {item.candidate}: {item.reason}"
        for of_pairs in pairs.values()
        for key, pair in of_pairs.items()
        for item in pair.broken
    ]
    reports = _with_unusable(reports, pairs[max(pairs)].values())
    unbuildable = tuple(f"{report.dispatch} + {report.experts}" for report in reports if report.unbuildable)
    return SchemeTable(
        scheme=scheme,
        plan=plan,
        details=None if plan is None or unbuildable else plan_details(plan, asked.tokens),
        reports=reports,
        costs=costs,
        uncosted=tuple(dict.fromkeys(uncosted)),
        unbuildable=unbuildable,
    )


def _with_unusable(reports: Sequence[PairReport], pairs: Iterable[PairCost]) -> tuple[PairReport, ...]:
    """The reports, with what keeps a backend from being built as a reason in each of its pairs."""
    unusable = {item.candidate: item for pair in pairs for item in pair.unusable}
    told = []
    for report in reports:
        names = (f"dispatch {report.dispatch}", f"experts {report.experts}")
        against = [unusable[name] for name in names if name in unusable]
        told.append(attrs.evolve(report, rejections=(*report.rejections, *against)))
    return tuple(told)


def _problem(base: Plan, scheme: str, asked: Asked) -> Problem:
    """The layer spread over the ranks; buffers between ranks are sized for the largest T."""
    config = base.config if asked.world == 1 else attrs.evolve(base.config, max_tokens_per_rank=max(asked.tokens))
    return attrs.evolve(
        base.problem,
        config=config,
        parallel=spread_over(asked.world, asked.spread, config),
        scheme=made_method(registry().find("quant_methods", scheme)).scheme,
    )


def _pairs(
    problem: Problem, plan: Plan | None, tokens: int, reports: Sequence[PairReport]
) -> dict[tuple[str, str], PairCost]:
    if plan is not None and getattr(plan, "own_gate", False):
        chosen = next(report for report in reports if report.chosen)
        return {(chosen.dispatch, chosen.experts): PairCost(report=chosen, cost=cost_of(plan, tokens))}
    listed = {(report.dispatch, report.experts): report for report in reports}
    return {
        key: attrs.evolve(pair, report=listed[key])
        for pair in pair_costs(problem, tokens)
        if (key := (pair.report.dispatch, pair.report.experts)) in listed
    }


def cost_rows(found: SchemeTable) -> tuple[list[str], list[list[str]]]:
    """The costs as a table: header and rows, one for each pair that could run."""
    header = ["pair", "", "buffers"]
    for tokens in found.costs:
        header += [f"wire at T = {tokens:,}", "step memory", "filled"]
    rows = []
    for report in found.reports:
        key = (report.dispatch, report.experts)
        at = [pairs[key].cost if key in pairs else None for pairs in found.costs.values()]
        if any(at):
            held = next(cost.buffer_bytes for cost in reversed(at) if cost)
            row = [" + ".join(key), found.verdict(report), size(held)]
            for cost in at:  # None: its footprint breaks its contract at this T, and `uncosted` says how
                row += (
                    [size(cost.wire_bytes), size(cost.step_bytes), percent(cost.filled, cost.slots)]
                    if cost
                    else [UNKNOWN, "", ""]
                )
            rows.append(row)
    return header, rows
