"""`moe-core explain --html`: one page that holds all of it, and nothing from elsewhere: no script, font or picture."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

import attrs

from moe_core.cli.devices import Sheet, Times, times
from moe_core.cli.explained import SchemeTable
from moe_core.cli.plan_output import ASSUMED, duration, percent, size
from moe_core.planner import PairCost
from moe_core.types import PairReport

_VERDICTS = {
    "chosen": ("✓", "runs"),
    "outranked": ("○", "could run; another has priority"),
    "not here": ("◌", "would suit, but can't be had on this machine"),
    "refused": ("✕", "cannot run"),
}
"""Verdict → mark and meaning: told by shape and words, not by colour alone."""


@attrs.frozen(kw_only=True)
class Section:
    """One kind of layers: a title, facts about it, and a table for each scheme."""

    title: str
    facts: str
    tables: Sequence[SchemeTable]


def page(title: str, subtitle: str, sections: Sequence[Section], sheet: Sheet | None, version: str) -> str:
    """The whole page."""
    body = [
        f"<header><h1>{_e(title)}</h1><p>{_e(subtitle)}</p>{_legend()}</header>",
        *(_section(section, sheet) for section in sections),
        _footer(sheet, version),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_e(title)}: moe-core explain</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _e(text: object) -> str:
    return html.escape(str(text))


def _legend() -> str:
    items = (
        f'<li><span class="mark {_slug(verdict)}">{mark}</span> <b>{_e(verdict)}</b> {_e(meaning)}</li>'
        for verdict, (mark, meaning) in _VERDICTS.items()
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _slug(verdict: str) -> str:
    return verdict.replace(" ", "-")


def _section(section: Section, sheet: Sheet | None) -> str:
    tables = "".join(_scheme(found, sheet) for found in section.tables)
    return f"<section><h2>{_e(section.title)}</h2><p>{_e(section.facts)}</p>{tables}</section>"


def _scheme(found: SchemeTable, sheet: Sheet | None) -> str:
    parts = [f"<h3>Scheme {_e(found.scheme)}</h3>", _decision(found), _matrix(found)]
    parts += [_costs(tokens, pairs, sheet) for tokens, pairs in found.costs.items() if pairs]
    parts += [f'<p class="note">No cost of {_e(line)}</p>' for line in found.uncosted]
    if found.details is not None and found.details.lines():
        lines = "\n".join(found.details.lines())
        parts.append(f"<details><summary>Kernels and workspaces</summary><pre>{_e(lines)}</pre></details>")
    return f"<article>{''.join(parts)}</article>"


def _decision(found: SchemeTable) -> str:
    """What runs, in a few words, and who owns which duty."""
    if found.plan is None:
        return '<p class="none">No pair of backends can run these layers in this scheme.</p>'
    if found.unbuildable:
        pairs = ", ".join(found.unbuildable)
        return f'<p class="none">Selection takes {_e(pairs)}, which can\'t be built: no layer runs so.</p>'
    plan = found.plan
    experts = " · ".join(
        item.candidate.label if len(plan.ranges) == 1 else f"{item.candidate.label} from {item.first_row} rows"
        for item in plan.ranges
    )
    facts = {
        "Dispatch": f"{plan.dispatch.name} ({plan.dispatch.plugin})",
        "Experts": experts,
        "Format": plan.activation_format.value,
        "On the wire": plan.payload,
        "Weights": plan.weight_layout,
    }
    duties = "".join(f"<tr><td>{_e(duty.value)}</td><td>{_e(owner)}</td></tr>" for duty, owner in plan.owners.items())
    shown = "".join(f"<div><dt>{_e(name)}</dt><dd>{_e(value)}</dd></div>" for name, value in facts.items())
    notes = "".join(f'<p class="note">{_e(note)}</p>' for note in getattr(plan, "notes", ()))
    return (
        f"<dl>{shown}</dl>{notes}"
        f'<details><summary>Each duty has one owner</summary><div class="wide"><table>{duties}</table></div></details>'
    )


def _matrix(found: SchemeTable) -> str:
    """Dispatch down, experts across; in each cell the verdict, and behind it every reason."""
    dispatches = list(dict.fromkeys(report.dispatch for report in found.reports))
    able = [report.experts for report in found.reports if found.verdict(report) != "refused"]
    experts = list(dict.fromkeys([*able, *(report.experts for report in found.reports)]))
    by_pair = {(report.dispatch, report.experts): report for report in found.reports}
    head = "".join(f'<th scope="col">{_e(name)}</th>' for name in experts)
    rows = []
    for dispatch in dispatches:
        cells = "".join(_cell(found, by_pair.get((dispatch, name))) for name in experts)
        rows.append(f'<tr><th scope="row">{_e(dispatch)}</th>{cells}</tr>')
    return (
        '<div class="wide"><table class="matrix"><caption>Dispatch (down) and experts (across) by priority, experts '
        f"that cannot run last; open a cell for its reasons</caption><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(found: SchemeTable, report: PairReport | None) -> str:
    if report is None:
        return "<td></td>"
    verdict = found.verdict(report)
    mark, _ = _VERDICTS[verdict]
    said = f'<span class="mark">{mark}</span> {_e(verdict)}'
    reasons = [f"<li><b>{_e(item.candidate)}</b>: {_e(item.reason)}</li>" for item in report.rejections]
    if not reasons:
        if verdict == "outranked":
            reasons = [f"<li>priority {_e(report.priority)}: a pair before it runs</li>"]
        else:
            return f'<td class="{_slug(verdict)}">{said}</td>'
    return f'<td class="{_slug(verdict)}"><details><summary>{said}</summary><ul>{"".join(reasons)}</ul></details></td>'


def _costs(tokens: int, pairs: Mapping[tuple[str, str], PairCost], sheet: Sheet | None) -> str:
    """One row a pair; a bar behind each number shows it against the largest of its column."""
    header = ["pair", "received from ranks", "of it needed", "step memory", "buffers", "rows with work",
              "experts' time", "wire time"]  # fmt: skip
    values: list[list[tuple[str, float | None]]] = []
    for pair in pairs.values():
        cost = pair.cost
        assert cost is not None, "only pairs that could run have a row"
        spent = Times(None, "", None) if sheet is None else times(cost, sheet)
        needed = "–" if cost.needed_wire_bytes is None else percent(cost.needed_wire_bytes, cost.wire_bytes)
        values.append([
            (size(cost.wire_bytes), cost.wire_bytes),
            (needed, None),
            (size(cost.step_bytes), cost.step_bytes),
            (size(cost.buffer_bytes), cost.buffer_bytes),
            (percent(cost.filled, cost.slots), None),
            (duration(spent.experts), spent.experts),
            (duration(spent.wire), spent.wire),
        ])  # fmt: skip
    most = [max((row[column][1] or 0 for row in values), default=0) for column in range(len(header) - 1)]
    rows = []
    for ((dispatch, experts), pair), cells in zip(pairs.items(), values, strict=True):
        mark, _ = _VERDICTS[pair.verdict]
        shown = "".join(_bar(text, value, top) for (text, value), top in zip(cells, most, strict=True))
        name = f'<span class="mark {_slug(pair.verdict)}">{mark}</span> {_e(dispatch)} + {_e(experts)}'
        rows.append(f'<tr><th scope="row">{name}</th>{shown}</tr>')
    head = "".join(f'<th scope="col">{_e(name)}</th>' for name in header)
    return (
        f'<div class="wide"><table class="costs"><caption>One layer\'s step on one rank, T = {tokens:,} on every rank'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _bar(text: str, value: float | None, most: float) -> str:
    if not value or not most:
        return f"<td>{_e(text)}</td>"
    return f'<td class="bar" style="--part:{100 * value / most:.1f}%">{_e(text)}</td>'


def _footer(sheet: Sheet | None, version: str) -> str:
    assumed = _list(ASSUMED)
    figures = ""
    if sheet is not None:
        lines = (f"{name}: {figure.value:,g} ({figure.source})" for name, figure in sheet.figures().items())
        figures = f"<h3>Figures of {_e(sheet.device.name)}</h3>{_list(lines)}"
    return f"<footer><h3>Assumed</h3>{assumed}{figures}<p>moe-core {_e(version)}</p></footer>"


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{_e(line)}</li>' for line in lines)}</ul>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5c6675; --line: #d9dee6; --ground: #f6f7f9; --card: #fff;
  --chosen: #0b7a4b; --outranked: #2f5fa8; --not-here: #9a6700; --refused: #8b93a0; --bar: #cfe0f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #39414d; --ground: #14181e;
  --card: #1c222b; --chosen: #4cc38a; --outranked: #7fb0f5; --not-here: #e2b04a; --refused: #7d8793; --bar: #2a4468; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 3rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0; }
h3 { font-size: 1rem; margin: 0 0 .75rem; }
header p, section > p, footer { color: var(--soft); margin: .25rem 0 1rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.25rem;
  margin: 1rem 0; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; padding: 0; margin: 0;
  color: var(--soft); }
.legend b { color: var(--ink); font-weight: 600; }
dl { display: flex; flex-wrap: wrap; gap: .75rem 2rem; margin: 0 0 1rem; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; font-weight: 600; }
.wide { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .85rem; padding-bottom: .4rem; }
th, td { padding: .4rem .7rem; border: 1px solid var(--line); text-align: left; vertical-align: top; font-weight: 400; }
thead th, tbody th { background: var(--ground); font-weight: 600; white-space: nowrap; }
.matrix { min-width: 100%; } .matrix td { min-width: 7.5rem; }
.matrix ul { margin: .4rem 0 0; padding-left: 1.1rem; font-size: .85rem; color: var(--ink); min-width: 14rem; }
.costs { min-width: 100%; } .costs td { text-align: right; white-space: nowrap; }
.costs thead th:not(:first-child) { text-align: right; white-space: normal; }
.bar { background: linear-gradient(to left, var(--bar) var(--part), transparent var(--part)); }
summary { cursor: pointer; } .matrix summary { white-space: nowrap; }
summary:focus-visible { outline: 2px solid var(--outranked); outline-offset: 2px; }
article > details { margin-top: 1rem; }
pre { overflow-x: auto; background: var(--ground); padding: .8rem; border-radius: 6px; font-size: .82rem;
  margin: .5rem 0 0; }
.chosen { color: var(--chosen); font-weight: 600; } .outranked { color: var(--outranked); }
.not-here { color: var(--not-here); } .refused { color: var(--refused); } .none, .note { color: var(--not-here); }
.matrix td.chosen { box-shadow: inset 3px 0 0 var(--chosen); }
footer ul { padding-left: 1.2rem; } footer { font-size: .85rem; }
@media print { body { background: #fff; } article { break-inside: avoid; } }
"""
