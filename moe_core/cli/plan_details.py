"""What a plan's experts will do at which row bound, and the memory that they ask for: from the experts themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from moe_core.errors import PluginError
from moe_core.forms import made_experts
from moe_core.interfaces import Experts
from moe_core.kernel import row_bound, workspace_bytes_by_name
from moe_core.select import Plan
from moe_core.types import LaunchRange

TOKENS = (1, 64, 4096)
"""T for which workspaces are shown, where nobody asked for others."""


@attrs.frozen
class Workspaces:
    """The scratch memory of a step's experts: bytes by name, at T tokens, which are a row bound of `rows`."""

    tokens: int
    rows: int
    experts: str
    by_name: dict[str, int]


@attrs.frozen
class PlanDetails:
    """What selection's own explanation does not hold.

    Attributes:
        launch: (experts, which kernels from which row bound on), for experts that have more than one way.
        workspaces: one for each T.
        missing: why there is nothing of some experts, one line each.
    """

    launch: tuple[tuple[str, LaunchRange], ...]
    workspaces: tuple[Workspaces, ...]
    missing: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "launch": [{"experts": name, **attrs.asdict(item)} for name, item in self.launch],
            "workspaces": [{**attrs.asdict(item), "bytes": sum(item.by_name.values())} for item in self.workspaces],
            "details_missing": list(self.missing),
        }

    def lines(self) -> list[str]:
        """For people."""
        unit = "T" if all(item.tokens == item.rows for item in self.workspaces) else "rows"
        found = []
        for name in dict.fromkeys(name for name, _ in self.launch):
            found.append(f"kernels of {name} by {unit}:")
            mine = [item for owner, item in self.launch if owner == name]
            found += [f"  from {max(item.first_row, 1)}: {item.what} ({item.source})" for item in mine]
        for item in self.workspaces:
            parts = ", ".join(f"{name} {_size(size)}" for name, size in item.by_name.items()) or "none"
            total = _size(sum(item.by_name.values()))
            found.append(f"workspaces of {item.experts} at T = {item.tokens}: {total} ({parts})")
        return found + list(self.missing)


def plan_details(plan: Plan, tokens: Sequence[int] = TOKENS) -> PlanDetails:
    """Ask the plan's experts. None of it needs the device; experts that can't be made here are named with why."""
    experts: dict[str, Experts] = {}
    launch: list[tuple[str, LaunchRange]] = []
    missing = []
    for candidate in {item.candidate.name: item.candidate for item in plan.ranges}.values():
        arguments = (plan.config, plan.problem.parallel, plan.scheme, None, plan.config.placement)
        try:
            made = made_experts(candidate, arguments)
            if table := plan.launch.get(candidate.label):
                made.use_launch(table)
            ranges = made.launch_ranges(plan.activation_format, plan.problem.device)
        except PluginError as error:
            missing.append(str(error))
        except Exception as error:  # noqa: BLE001 - a vendor's library may be missing where a plan is only explained
            missing.append(f"experts {candidate.name} cannot be made here: {type(error).__name__}: {error}")
        else:
            experts[candidate.name] = made
            launch += [(candidate.name, item) for item in ranges]
    workspaces, unknown = _workspaces(plan, experts, tokens)
    return PlanDetails(tuple(launch), tuple(workspaces), (*missing, *unknown))


def _workspaces(
    plan: Plan, experts: Mapping[str, Experts], tokens: Sequence[int]
) -> tuple[list[Workspaces], list[str]]:
    """At each T; and why not, where they can't be told."""
    workspaces: list[Workspaces] = []
    for count in sorted(set(tokens)):
        try:
            rows = row_bound(plan, count)
            if rows is None:
                says = "does not say how many rows it delivers, so workspaces are unknown"
                return workspaces, [f"dispatch {plan.dispatch.name} {says}"]
            serving = [item for item in plan.ranges if item.first_row <= rows][-1].candidate
            if serving.name in experts:
                by_name = workspace_bytes_by_name(serving, experts[serving.name], rows, plan.activation_format)
                workspaces.append(Workspaces(count, rows, serving.name, by_name))
        except PluginError as error:
            return workspaces, [str(error)]
    return workspaces, []


def _size(num_bytes: int) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes} B"
