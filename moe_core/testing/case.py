"""A conformance case, what comes of it, and the report. Cases are plain callables: pytest and a command run them.

A case names the *duty* that a backend breaks if the case fails, and the *claim* that it holds the backend to. A check
raises `Violation` (with a duty of its own where the numbers show a more exact one), or `Skip` where the backend says
that it does not do this.
"""

from __future__ import annotations

import contextlib
import enum
import platform
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from moe_core.hookspecs import PLUGIN_API


class Tier(str, enum.Enum):
    """Who must pass a case."""

    REQUIRED = "required"
    """Every backend of its kind: it follows from the contract alone."""
    OPTIONAL = "optional"
    """Only a backend that claims the capability that the case names."""


class Skip(Exception):
    """The case says nothing about this backend, on this machine. The text says why."""


class Violation(AssertionError):
    """The backend broke its contract.

    Attributes:
        duty: what it should have done, in the words of the report.
    """

    def __init__(self, duty: str, text: str) -> None:
        super().__init__(f"{duty}: {text}")
        self.duty = duty
        self.text = text


@attrs.frozen
class Case:
    """One question to a backend.

    Attributes:
        name: unique among the cases of one backend; the same from run to run and from release to release.
        duty: what a backend that fails it does not do.
        tier: who must pass it.
        claim: the declaration that it holds the backend to; "every backend" where none is needed.
        check: asks. Returns where all is well, raises `Violation` or `Skip` else; any other exception is a failure.
        opens: if it fails, `run_cases` skips those that follow: they would all say the same.
    """

    name: str
    duty: str
    tier: Tier
    claim: str
    check: Callable[[], None]
    opens: bool = False


class Outcome(str, enum.Enum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    XFAILED = "known failure"
    XPASSED = "passed, though listed as a known failure"


@attrs.frozen
class Result:
    """What came of a case. `duty` is the one that was broken; `text` says how, or why it was skipped."""

    case: Case
    outcome: Outcome
    duty: str
    text: str = ""
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        return self.outcome in (Outcome.FAILED, Outcome.XPASSED)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is NaN (bytes: 255), so that who reads it is found out. On CPUs; no-op for CUDA tensors.

    torch does so in its deterministic mode, of which nothing else is wanted here: its warnings stay unheard.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tensors are tiny here, and each virtual rank would bring a pool of threads that wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_case(case: Case, xfail: Mapping[str, str] | None = None) -> Result:
    """Ask one case. Never raises for what a backend does."""
    known = (xfail or {}).get(case.name)
    began = time.perf_counter()
    duty, text, outcome = case.duty, "", Outcome.PASSED
    try:
        with one_thread(), poisoned_memory(), torch.no_grad():
            case.check()
    except Skip as reason:
        outcome, text = Outcome.SKIPPED, str(reason)
    except Violation as violation:
        outcome, duty, text = Outcome.FAILED, violation.duty, violation.text
    except Exception as error:  # noqa: BLE001 - whatever a backend raises where it must not is that backend's failure
        outcome, text = Outcome.FAILED, f"raised {type(error).__name__}: {error}{_where(error)}"
    if known is not None and outcome in (Outcome.FAILED, Outcome.PASSED):
        outcome = Outcome.XFAILED if outcome is Outcome.FAILED else Outcome.XPASSED
        text = f"{known}{f' ({text})' if text else ''}"
    return Result(case, outcome, duty, text, time.perf_counter() - began)


def _where(error: BaseException) -> str:
    error = error.__cause__ or error
    frames = traceback.extract_tb(error.__traceback__)
    return f" (at {frames[-1].name}, line {frames[-1].lineno} of {frames[-1].filename})" if frames else ""


@attrs.frozen
class Report:
    """All results of one backend.

    Attributes:
        subject: "dispatch batched (moe-batched 0.1.0)".
        device: where the cases ran.
        results: in the order of the cases.
    """

    subject: str
    device: str
    results: tuple[Result, ...]

    @property
    def failures(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.bad)

    @property
    def verdict(self) -> str:
        """ "conforms", "fails", or "not exercised": nothing that computes could run on this machine."""
        if self.failures:
            return "fails"
        computed = any(r.outcome is Outcome.PASSED and r.case.duty not in DECLARATION_DUTIES for r in self.results)
        return "conforms" if computed else "not exercised"

    def count(self, *outcomes: Outcome, duty: str | None = None, tier: Tier | None = None) -> int:
        return sum(
            r.outcome in outcomes and duty in (None, r.duty) and tier in (None, r.case.tier) for r in self.results
        )

    def rows(self) -> list[dict[str, Any]]:
        """One row per (duty, tier), in the order of first appearance, with the number of each outcome."""
        keys = dict.fromkeys((r.duty, r.case.tier) for r in self.results)
        return [
            {
                "duty": duty,
                "tier": tier.value,
                "passed": self.count(Outcome.PASSED, duty=duty, tier=tier),
                "failed": self.count(Outcome.FAILED, Outcome.XPASSED, duty=duty, tier=tier),
                "known failures": self.count(Outcome.XFAILED, duty=duty, tier=tier),
                "skipped": self.count(Outcome.SKIPPED, duty=duty, tier=tier),
            }
            for duty, tier in keys
        ]

    def to_dict(self) -> dict[str, Any]:
        """For machines; `docs/conformance.md` says what each field means."""
        return {
            "subject": self.subject,
            "verdict": self.verdict,
            "environment": {
                "plugin_api": ".".join(map(str, PLUGIN_API)),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": self.device,
            },
            "duties": self.rows(),
            "cases": [
                {
                    "name": r.case.name,
                    "duty": r.duty,
                    "tier": r.case.tier.value,
                    "claim": r.case.claim,
                    "outcome": r.outcome.value,
                    "text": r.text,
                }
                for r in self.results
            ],
        }

    def markdown(self) -> str:
        """A table for a README."""
        total = self.count(Outcome.PASSED)
        head = f"`{self.subject}` on {self.device}: **{self.verdict}**, {total} of {len(self.results)} cases passed, "
        lines = [
            f"{head}{self.count(Outcome.SKIPPED)} skipped, {len(self.failures)} failed.",
            "",
            "| duty | tier | passed | failed | known failures | skipped |",
            "|---|---|---|---|---|---|",
        ]
        lines += [f"| {' | '.join(str(value) for value in row.values())} |" for row in self.rows()]
        return "\n".join(lines)


DECLARATION_DUTIES = ("honest claims", "refusals", "one owner for each duty")
"""Duties that are asked of the declaration alone, so that they can be checked where the backend can't run."""


def run_cases(
    cases: Sequence[Case],
    subject: str,
    device: str,
    *,
    xfail: Mapping[str, str] | None = None,
    each: Callable[[Result], None] = lambda result: None,
) -> Report:
    """Ask all cases, in order. `each` is called with every result as soon as it is there."""
    check_xfail(cases, xfail or {})
    results, closed = [], ""
    for case in cases:
        result = Result(case, Outcome.SKIPPED, case.duty, closed) if closed else run_case(case, xfail)
        if case.opens and result.outcome is Outcome.FAILED:
            closed = f"{case.name!r} failed; what follows is asked when it passes"
        each(result)
        results.append(result)
    return Report(subject, device, tuple(results))


def check_xfail(cases: Sequence[Case], xfail: Mapping[str, str]) -> None:
    """A known failure names a case that exists, and why it fails.

    Raises:
        ValueError: it does not.
    """
    names = {case.name for case in cases}
    for name, reason in xfail.items():
        if name not in names:
            raise ValueError(
                f"xfail names the case {name!r}, which this backend does not have; its cases are listed "
                "by moe-core conformance … --json"
            )
        if not reason.strip():
            raise ValueError(f"xfail of the case {name!r} gives no reason; say why it fails and when it will be mended")
