"""Which experts of a plan run from which row bound on: by what was measured, else by declared priority. Pure.

The row bound is known on the host: T locally, the capacity C after a dispatch in BATCHED format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import attrs

from moe_core.interfaces import Candidate
from moe_core.tuned import TunedFormat, TunedPoint
from moe_core.types import ExpertsCapabilities, priority_at

ExpertsCandidate = Candidate[ExpertsCapabilities]

MEASURED_MARGIN = 1.03
"""Experts of lower priority take a range only where they were faster by more than this: above the noise of a run."""


@attrs.frozen
class ExpertsRange:
    """The experts that run when the row bound is at least `first_row`.

    Attributes:
        first_row: where the range begins; it ends where the next one begins.
        candidate: what runs.
        why: by priority, or by which measurement.
    """

    first_row: int
    candidate: ExpertsCandidate
    why: str = ""


def contenders(fitting: Sequence[ExpertsCandidate]) -> list[ExpertsCandidate]:
    """Those that a measurement may choose among: all but the last resorts, whose priority is negative everywhere.

    What speaks against these (memory, say) is no matter of speed.
    """
    first_class = [e for e in fitting if peak_priority(e) >= 0]
    return first_class or list(fitting)


def peak_priority(candidate: ExpertsCandidate) -> int:
    """The highest priority that experts have at any row bound."""
    priority = candidate.priority
    return priority if isinstance(priority, int) else max(value for _, value in priority)


def choose_ranges(fitting: Sequence[ExpertsCandidate], measured: TunedFormat) -> tuple[ExpertsRange, ...]:
    """The best experts from each row bound on at which others become best, from 0 up.

    Args:
        fitting: experts that can share a plan; at least one.
        measured: times in the plan's activation format; without any, or without one of `fitting`, priorities decide.
    """
    rivals = contenders(fitting)
    by_measurement = len(rivals) > 1 and not unmeasured(fitting, measured.points)
    best = _by_measurement(rivals, measured.points) if by_measurement else _by_priority(fitting)
    ranges: list[ExpertsRange] = []
    for item in best:
        if not ranges or ranges[-1].candidate is not item.candidate:
            ranges.append(item)
    return tuple(ranges)


def unmeasured(fitting: Sequence[ExpertsCandidate], points: Sequence[TunedPoint]) -> str:
    """Why the points can't choose among these experts; "": they can.

    They must know all contenders, or a backend that was installed later would be left out without a word.
    """
    rivals = contenders(fitting)
    if not points:
        return "moe-core tune has not measured this layer here"
    missing = sorted({e.label for e in rivals for point in points if not point.knows(e.label)})
    if missing:
        return f"moe-core tune has not measured {', '.join(missing)}: run it again"
    if not all(any(e.label in point.microseconds for e in rivals) for point in points):
        return "at some row bound moe-core tune found no experts that run: run it again and see what it says"
    return ""


def _by_measurement(rivals: Sequence[ExpertsCandidate], points: Sequence[TunedPoint]) -> Iterator[ExpertsRange]:
    """At each point the fastest; two neighbouring points are parted at their geometric mean."""
    before: TunedPoint | None = None
    for point in points:
        first_row = 0 if before is None else math.isqrt(before.rows * point.rows) + 1
        times = point.microseconds
        ranked = [e for e in _ranked(rivals, point.rows) if e.label in times]
        fastest = min(times[e.label] for e in ranked)
        best = next(e for e in ranked if times[e.label] <= fastest * MEASURED_MARGIN)
        shown = ", ".join(
            f"{e.name} {times[e.label]:.1f} us" if e.label in times else f"{e.name} failed"
            for e in _ranked(rivals, point.rows)
        )
        yield ExpertsRange(first_row, best, f"measured at {point.rows} rows: {shown}")
        before = point


def _by_priority(fitting: Sequence[ExpertsCandidate]) -> Iterator[ExpertsRange]:
    """The highest priority, from each row bound on at which somebody's priority changes."""
    bounds = {0}
    for candidate in fitting:
        if not isinstance(candidate.priority, int):
            bounds.update(first for first, _ in candidate.priority)
    for bound in sorted(bounds):
        best = _ranked(fitting, bound)[0]
        yield ExpertsRange(bound, best, f"priority {priority_at(best.priority, bound)}")


def _ranked(candidates: Sequence[ExpertsCandidate], rows: int) -> list[ExpertsCandidate]:
    return sorted(candidates, key=lambda c: (-priority_at(c.priority, rows), c.name))
