"""Plans of a whole model, as text and JSON: layers with the same plan are shown once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from moe_core.cli.plan_details import TOKENS, plan_details
from moe_core.reports import format_summary
from moe_core.select import Plan

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)|(?<=^layers\.)\d+(?=\.)")


@attrs.frozen
class PlanGroup:
    """Layers that share a plan.

    Attributes:
        modules: names of the experts modules.
        layers: their layer numbers; empty where the names have none.
        pattern: the names, with N for the layer number.
        plan: what they share.
    """

    modules: tuple[str, ...]
    layers: tuple[int, ...]
    pattern: str
    plan: Plan

    @property
    def title(self) -> str:
        if not self.layers:
            return ", ".join(self.modules)
        word = "layer" if len(self.layers) == 1 else "layers"
        return f"{word} {ranges(self.layers)} ({self.pattern})"

    def to_dict(self, tokens: Sequence[int] = TOKENS) -> dict[str, Any]:
        """For JSON; with the workspaces at each T of `tokens`."""
        plan = {**self.plan.to_dict(), **plan_details(self.plan, tokens).to_dict()}
        return {"layers": list(self.layers), "modules": list(self.modules), "plan": plan}


def group_plans(plans: Mapping[str, Plan]) -> list[PlanGroup]:
    """Group modules whose plans, with every reason, are the same, and whose names differ in the layer number only."""
    groups: dict[tuple[str, str], list[str]] = {}
    for module, plan in plans.items():
        key = (_LAYER.sub("N", module, count=1), json.dumps(plan.to_dict(), sort_keys=True))
        groups.setdefault(key, []).append(module)
    return [
        PlanGroup(
            tuple(modules),
            tuple(sorted(int(found[0]) for module in modules if (found := _LAYER.search(module)))),
            pattern,
            plans[modules[0]],
        )
        for (pattern, _), modules in groups.items()
    ]


def layer_facts(plan: Plan) -> str:
    """The layer that a plan is for, in one line."""
    of = plan.to_dict()["layer"]
    return (
        f"{of['num_experts']} experts, top {of['top_k']}, H = {of['hidden_size']}, I = {of['intermediate_size']}, "
        f"{of['dtype']}, activation {of['activation']}, scheme {of['scheme']}, on {of['device']}"
    )


def explain_plans(plans: Mapping[str, Plan], tokens: Sequence[int] = TOKENS) -> str:
    """What runs in each layer, and why; which kernels, and the memory that they ask for at each T of `tokens`.

    In short: `moe-core explain --all` shows every pair.
    """
    lines: list[str] = []
    for group in group_plans(plans):
        details = plan_details(group.plan, tokens).lines()
        candidates = format_summary(group.plan.reports)
        told = (layer_facts(group.plan), *group.plan.choice().splitlines(), *candidates.splitlines(), *details)
        lines += [group.title, *(f"  {line}" for line in told)]
    return "\n".join(lines)


def backends(plans: Mapping[str, Plan]) -> str:
    """The backends of all layers in one line, such as "local + torch"."""
    pairs = {
        f"{plan.dispatch.name} + {' / '.join(dict.fromkeys(r.candidate.name for r in plan.ranges))}"
        for plan in plans.values()
    }
    return ", ".join(sorted(pairs))


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] → "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
