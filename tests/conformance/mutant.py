"""A mutant: a shipped backend that is wrong in exactly one way, and the duty that the report must name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest

from moe_core.testing import Case, Outcome, Result, run_case


@attrs.frozen
class Mutant:
    """
    Attributes:
        name: what is wrong with it.
        duties: any of these is the right name for it.
        cases: () → the kit's cases for it.
    """

    name: str
    duties: tuple[str, ...]
    cases: Callable[[], list[Case]]

    def likely_first(self) -> list[Case]:
        """Its cases, with those of the duty that it breaks in front, so that few have to run."""
        return sorted(self.cases(), key=lambda case: case.duty not in self.duties)

    def caught(self) -> Result | None:
        """The first failure that names the duty."""
        for case in self.likely_first():
            result = run_case(case)
            if result.outcome is Outcome.FAILED and result.duty in self.duties:
                return result
        return None

    def killed_cases(self) -> set[str]:
        """Every case that fails for it."""
        return {case.name for case in self.cases() if run_case(case).outcome is Outcome.FAILED}


def named(mutants: list[Mutant]) -> Any:
    """For `pytest.mark.parametrize`."""
    return pytest.mark.parametrize("mutant", mutants, ids=[mutant.name.replace(" ", "_") for mutant in mutants])
