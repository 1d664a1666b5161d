"""Cases about a declaration: what is claimed can be had, what is not claimed is refused with a reason.

They need no device: plans are made from descriptions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from moe_core.config import Problem
from moe_core.errors import UnsupportedError
from moe_core.interfaces import Candidate
from moe_core.select import Plan
from moe_core.testing.case import Case, Tier, Violation
from moe_core.types import Availability

Planner = Callable[[], Plan]
"""Makes a plan, or raises `UnsupportedError`."""

PROBE_S = 5.0
"""A probe runs in every listing."""


def declaration_cases(candidate: Candidate[Any], problem: Problem) -> list[Case]:
    """Of any backend: its probe and its `refuse`."""
    claim = "every backend"
    required = Tier.REQUIRED

    def probe_answers() -> None:
        began = time.perf_counter()
        answer = candidate.probe()
        if not isinstance(answer, Availability):
            raise Violation("honest claims", f"the probe returned {answer!r}; the contract is an Availability")
        if not answer.ok and not answer.reason.strip():
            raise Violation("honest claims", "the probe says no without a reason that a user can act on")
        if time.perf_counter() - began > PROBE_S:
            raise Violation("honest claims", f"the probe took more than {PROBE_S} s, and every listing asks it")

    def refuse_answers() -> None:
        answers = [_answer(candidate, problem) for _ in range(2)]
        if answers[0] != answers[1]:
            raise Violation("refusals", f"refuse is not pure: it answered {answers[0]!r}, then {answers[1]!r}")

    return [
        Case("declaration: the probe answers", "honest claims", required, claim, probe_answers),
        Case("declaration: refuse is pure", "refusals", required, claim, refuse_answers),
    ]


def _answer(candidate: Candidate[Any], problem: Problem) -> str | None:
    """What `refuse` itself says: selection makes a reason of whatever it answers or raises."""
    refuse = candidate.capabilities.refuse
    answer: Any = None if refuse is None else refuse(problem)
    if answer is None or (isinstance(answer, str) and answer.strip()):
        return answer
    raise Violation("refusals", f"refuse answered {answer!r}; the contract is None or a reason")


def claimed(name: str, claim: str, planners: Sequence[Planner]) -> Case:
    """At least one layer that needs the claim gets a plan."""

    def check() -> None:
        reasons: dict[str, None] = {}
        for make in planners:
            try:
                make()
                return
            except UnsupportedError as error:
                reasons |= dict.fromkeys(item.reason for report in error.rejections for item in report.rejections)
        raise Violation(
            "honest claims", f"{claim} is declared, and every layer with it is refused: {'; '.join(reasons)}"
        )

    return Case(f"claimed: {name}", "honest claims", Tier.REQUIRED, claim, check)


def one_owner(name: str, claim: str, make: Planner) -> Case:
    """A layer that has the duty gets a plan, in which exactly one stage does it."""

    def check() -> None:
        try:
            make()
        except UnsupportedError as error:
            reasons = dict.fromkeys(item.reason for report in error.rejections for item in report.rejections)
            raise Violation("one owner for each duty", "; ".join(reasons)) from None

    return Case(f"one owner: {name}", "one owner for each duty", Tier.REQUIRED, claim, check)


def refused(name: str, kind: str, candidate: Candidate[Any], problem: Problem, make: Planner) -> Case:
    """A layer that needs what is not claimed is refused, by this backend or its pair, with a reason that says so.

    Its `refuse` is asked about that layer too: it must answer, whatever layer it is.
    """
    backend = candidate.name

    def check() -> None:
        _answer(candidate, problem)
        try:
            make()
        except UnsupportedError as error:
            rejections = [item for report in error.rejections for item in report.rejections]
            if not any(item.candidate in (f"{kind} {backend}", "pair") for item in rejections):
                raise Violation("refusals", f"nothing is said against {kind} {backend}, only {rejections}") from None
            for item in rejections:
                if not isinstance(item.reason, str) or not item.reason.strip():
                    raise Violation("refusals", f"{item.candidate} gives the reason {item.reason!r}") from None
            return
        raise Violation("refusals", f"{name} is not declared, and is not refused")

    return Case(f"refused: {name}", "refusals", Tier.REQUIRED, "what is not claimed", check)


def available(candidate: Candidate[Any]) -> Candidate[Any]:
    """The candidate as it is where its library is installed: what it declares is about that place."""
    return attrs.evolve(candidate, availability=Availability(True))
