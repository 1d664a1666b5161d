"""The table of candidates: every pair of backends and what came of it, for people, in short, and for machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_core.types import PairReport

_INDENT = 13
"""Columns in front of what is told of a verdict."""


def table(reports: Sequence[PairReport]) -> list[dict[str, Any]]:
    """The whole table, for JSON."""
    return [
        {
            "dispatch": report.dispatch,
            "experts": report.experts,
            "priority": list(report.priority),
            "verdict": report.verdict,
            "reasons": [f"{item.candidate}: {item.reason}" for item in report.rejections],
        }
        for report in reports
    ]


def format_table(reports: Sequence[PairReport]) -> str:
    """The whole table, as text: one pair a line, its reasons indented under it."""
    lines = []
    for report in reports:
        lines.append(f"  {report.verdict:<9}  {report.dispatch} + {report.experts}  (priority {report.priority})")
        lines += [f"               {item.candidate}: {item.reason}" for item in report.rejections]
    return "\n".join(lines)


def format_summary(
    reports: Sequence[PairReport], verdict: Callable[[PairReport], str] = lambda report: report.verdict
) -> str:
    """The table in short: the pairs that were not refused, by verdict, and each refused backend once with its reasons.

    Outranked pairs are told by dispatch, with the priorities by which they lost.
    A reason that stands in every pair of a backend is told of the backend, and backends with the same reasons share a
    line. Of the pairs that none of this refuses (their formats differ, say), each reason is told with its pairs.

    Args:
        reports: in the order of selection.
        verdict: of a report, where somebody knows more than it does.
    """
    able: dict[str, list[PairReport]] = {}
    for report in reports:
        if verdict(report) != "refused":
            able.setdefault(verdict(report), []).append(report)
    lines = []
    for name in sorted(able, key=lambda name: name != "chosen"):
        outranked = name == "outranked" and "chosen" in able
        lines += _headed(name, _lost(able[name], able["chosen"]) if outranked else [", ".join(map(_pair, able[name]))])
    return "\n".join(lines + _headed("why not", reasons_against(reports)))


def reasons_against(reports: Sequence[PairReport]) -> list[str]:
    """Every reason once: those of a backend in one line, the others with the pairs that they are told of."""
    told = {who: reasons for who, reasons in _by_backend(reports).items() if reasons}
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for who, reasons in told.items():
        kind, _, name = who.partition(" ")
        alike.setdefault((kind, reasons), []).append(name)
    against = [f"{kind} {', '.join(names)}: {'; '.join(reasons)}" for (kind, reasons), names in alike.items()]
    return against + _of_pairs_alone(reports, told)


def _headed(name: str, lines: Sequence[str]) -> list[str]:
    return [f"  {'' if i else name:<{_INDENT - 2}}{line}" for i, line in enumerate(lines)]


def _lost(outranked: Sequence[PairReport], chosen: Sequence[PairReport]) -> list[str]:
    """One line for each dispatch of pairs that could run: with which experts, and by which priority they lost."""
    by_dispatch: dict[str, list[PairReport]] = {}
    for report in outranked:
        by_dispatch.setdefault(report.dispatch, []).append(report)
    winner, lines = chosen[0], []
    for dispatch, reports in by_dispatch.items():
        if dispatch != winner.dispatch:
            by = _less(reports[0].priority[0], winner.priority[0], winner.dispatch)
            lines.append(f"{dispatch} ({by}): with {', '.join(report.experts for report in reports)}")
            continue
        first = max(chosen, key=lambda report: report.priority[1])
        told = [f"{item.experts} ({_less(item.priority[1], first.priority[1], first.experts)})" for item in reports]
        lines.append(f"{dispatch}: with {', '.join(told)}")
    return lines


def _less(own: int, winners: int, winner: str) -> str:
    """Why something lost that could run: by its number, by its name where these are equal, else by measurement."""
    if own > winners:
        return f"priority {own} > {winner}'s {winners}, but measured slower"
    return f"priority {own} {'<' if own < winners else '='} {winner}'s {winners}{'' if own < winners else ', by name'}"


def _pair(report: PairReport) -> str:
    return f"{report.dispatch} + {report.experts}"


def _by_backend(reports: Sequence[PairReport]) -> dict[str, tuple[str, ...]]:
    """ "dispatch x" or "experts y" → the reasons against it that stand in every one of its pairs."""
    found: dict[str, list[list[str]]] = {}
    for kind in ("dispatch", "experts"):
        for report in reports:
            who = f"{kind} {getattr(report, kind)}"
            found.setdefault(who, []).append([item.reason for item in report.rejections if item.candidate == who])
    return {
        who: tuple(reason for reason in of_pairs[0] if all(reason in reasons for reasons in of_pairs))
        for who, of_pairs in found.items()
    }


def _of_pairs_alone(reports: Sequence[PairReport], told: Mapping[str, object]) -> list[str]:
    """One line for each reason against pairs whose backends are not refused everywhere."""
    pairs: dict[str, list[str]] = {}
    for report in reports:
        if not {f"dispatch {report.dispatch}", f"experts {report.experts}"} & set(told):
            for item in report.rejections:
                reason = item.reason if item.candidate == "pair" else f"{item.candidate}: {item.reason}"
                pairs.setdefault(reason, []).append(_pair(report))
    return [f"{', '.join(names)}: {reason}" for reason, names in pairs.items()]
