"""The table of candidates in short: each refused backend once, and no reason lost."""

from __future__ import annotations

from moe_core.reports import format_summary
from moe_core.types import PairReport, Rejection


def report(dispatch, experts, *against, chosen=False):
    reasons = tuple(Rejection(*each.split(": ")) for each in against)
    return PairReport(dispatch, experts, (0, 0), reasons, chosen)


NO_RANKS = "dispatch far: serves 2 ranks"
NO_SCHEME = "unquantized"
TABLE = [
    report("far", "a", NO_RANKS),
    report("far", "b", NO_RANKS, f"experts b: {NO_SCHEME}"),
    report("far", "c", NO_RANKS, f"experts c: {NO_SCHEME}"),
    report("near", "a", chosen=True),
    report("near", "b", f"experts b: {NO_SCHEME}"),
    report("near", "c", f"experts c: {NO_SCHEME}"),
    report("wide", "a", "experts a: takes standard format", "pair: no common payload"),
    report("wide", "b", f"experts b: {NO_SCHEME}"),
    report("wide", "c", f"experts c: {NO_SCHEME}"),
]


def test_backends_are_told_once_and_pairs_where_only_they_are_refused():
    assert format_summary(TABLE).splitlines() == [
        "  chosen     near + a",
        "  why not    dispatch far: serves 2 ranks",
        "             experts b, c: unquantized",
        "             wide + a: experts a: takes standard format",
        "             wide + a: no common payload",
    ]


def test_verdicts_that_somebody_knows_better():
    better = {("far", "a"): "not here"}
    lines = format_summary(TABLE, lambda item: better.get((item.dispatch, item.experts), item.verdict)).splitlines()
    assert lines[:2] == ["  chosen     near + a", "  not here   far + a"]


def test_nothing_is_refused():
    assert format_summary([report("near", "a", chosen=True), report("near", "b")]).splitlines() == [
        "  chosen     near + a",
        "  outranked  near: with b (priority 0 = a's 0, by name)",
    ]


def test_what_was_outranked_says_by_which_priority():
    """By dispatch, with the experts that could run behind it; where the dispatch is the chosen one, by the experts'."""
    reports = [
        PairReport("near", "a", (5, 10), chosen=True),
        PairReport("near", "b", (5, -1)),
        PairReport("near", "c", (5, 20)),
        PairReport("ring", "a", (-50, 10)),
        PairReport("ring", "b", (-50, -1)),
        PairReport("same", "b", (5, -1)),
    ]
    assert format_summary(reports).splitlines() == [
        "  chosen     near + a",
        "  outranked  near: with b (priority -1 < a's 10), c (priority 20 > a's 10, but measured slower)",
        "             ring (priority -50 < near's 5): with a, b",
        "             same (priority 5 = near's 5, by name): with b",
    ]


def test_without_a_chosen_pair_there_is_nobody_to_lose_to():
    assert format_summary([report("near", "a"), report("far", "a")]) == "  outranked  near + a, far + a"
