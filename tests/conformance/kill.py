"""Which mutant kills which case: a case that no mutant fails asks nothing."""

from __future__ import annotations

from collections.abc import Iterable

from moe_core.testing import Case, Outcome, run_case
from tests.conformance.mutant import Mutant


def survivors(cases: Iterable[Case], mutants: list[Mutant]) -> list[str]:
    """Names of those cases that every mutant passes. For each case the last killer is tried first."""
    of_mutant = [{case.name: case for case in mutant.cases()} for mutant in mutants]
    order = list(range(len(mutants)))
    alive = []
    for case in cases:
        for index in order:
            mutated = of_mutant[index].get(case.name)
            if mutated is not None and run_case(mutated).outcome is Outcome.FAILED:
                order.remove(index)
                order.insert(0, index)
                break
        else:
            alive.append(case.name)
    return alive
