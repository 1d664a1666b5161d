"""What `moe-core explain` tells of a kind of layers in a scheme: the plan, every pair, and what each would cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from moe_core.build import plan as plan_layer
from moe_core.cli.devices import Sheet, times
from moe_core.cli.layers import spread_over
from moe_core.cli.plan_details import PlanDetails, plan_details
from moe_core.cli.plan_output import percent, size
from moe_core.config import Problem
from moe_core.errors import UnsupportedError
from moe_core.planner import PairCost, cost_of, pair_costs
from moe_core.plugins import registry
from moe_core.select import Plan, format_table, table
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
    """

    scheme: str
    plan: Plan | None
    details: PlanDetails | None
    reports: tuple[PairReport, ...]
    costs: dict[int, dict[tuple[str, str], PairCost]]

    def verdict(self, report: PairReport) -> str:
        """Of a pair: also "not here", where nothing else speaks against it."""
        first = next(iter(self.costs.values()), {}).get((report.dispatch, report.experts))
        return report.verdict if first is None else first.verdict

    def to_dict(self, sheet: Sheet | None) -> dict[str, Any]:
        shown = {"scheme": self.scheme, "candidates": table(self.reports)} if self.plan is None else self.plan.to_dict()
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
        return {**shown, "costs": costs}

    def lines(self) -> list[str]:
        """For people, but for the costs."""
        if self.plan is None:
            return [f"scheme {self.scheme}: no pair of backends can run it", *format_table(self.reports).splitlines()]
        return [*self.plan.explain().splitlines(), *(self.details.lines() if self.details else [])]


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
            problem = _problem(base, scheme, asked, max(asked.tokens))
            plan = plan_layer(
                problem.config, parallel=problem.parallel, scheme=problem.scheme, dispatch=asked.dispatch,
                experts=asked.experts, device=problem.device, routing_is_external=problem.routing_is_external,
            )  # fmt: skip
            reports = plan.reports
        except UnsupportedError as error:
            if strict:
                raise
            plan, reports = None, tuple(error.rejections)
    details = None if plan is None else plan_details(plan, asked.tokens)
    costs = {
        tokens: _costs(_problem(base, scheme, asked, tokens), plan, tokens, reports) for tokens in sorted(asked.tokens)
    }
    return SchemeTable(scheme=scheme, plan=plan, details=details, reports=reports, costs=costs)


def _problem(base: Plan, scheme: str, asked: Asked, tokens: int) -> Problem:
    """The layer spread over the ranks; buffers between ranks are sized for T."""
    config = base.config if asked.world == 1 else attrs.evolve(base.config, max_tokens_per_rank=tokens)
    return attrs.evolve(
        base.problem,
        config=config,
        parallel=spread_over(asked.world, asked.spread, config),
        scheme=registry().find("quant_methods", scheme).factory().scheme,
    )


def _costs(
    problem: Problem, plan: Plan | None, tokens: int, reports: Sequence[PairReport]
) -> dict[tuple[str, str], PairCost]:
    if plan is not None and getattr(plan, "own_gate", False):
        chosen = next(report for report in reports if report.chosen)
        return {(chosen.dispatch, chosen.experts): PairCost(report=chosen, cost=cost_of(plan, tokens))}
    listed = {(report.dispatch, report.experts): report for report in reports}
    return {
        key: attrs.evolve(pair, report=listed[key])
        for pair in pair_costs(problem, tokens)
        if pair.cost is not None and (key := (pair.report.dispatch, pair.report.experts)) in listed
    }


def cost_rows(found: SchemeTable) -> tuple[list[str], list[list[str]]]:
    """The costs as a table: header and rows, one for each pair that could run."""
    header = ["pair", "", "buffers"]
    for tokens in found.costs:
        header += [f"wire at T = {tokens:,}", "step memory", "filled"]
    rows = []
    for key, first in next(iter(found.costs.values()), {}).items():
        row = [" + ".join(key), first.verdict, ""]
        for pairs in found.costs.values():
            cost = pairs[key].cost
            assert cost is not None, "only pairs that could run are here"
            row[2] = size(cost.buffer_bytes)
            row += [size(cost.wire_bytes), size(cost.step_bytes), percent(cost.filled, cost.slots)]
        rows.append(row)
    return header, rows
