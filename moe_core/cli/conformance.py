"""`moe-core conformance`: hold an installed backend to the contract, case by case."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import click
import rich.table

from moe_core.cli import output
from moe_core.cli.options import real_device
from moe_core.errors import MoEError
from moe_core.testing.case import Case, Outcome, OutOfStep, Report, Result, run_cases
from moe_core.testing.conformance import Suite, launched_suite, suites
from moe_core.testing.launched import TIMEOUT_S

_SLOW_S = 5.0
"""After so long a case of `--launched` is named: it may be waiting for another rank."""
_SHOWN = 40
"""Different failures that are printed; the JSON file has every case."""


@click.command(short_help="Hold an installed backend to the contract, and print a report.")
@click.argument("name", metavar="NAME")
@click.option(
    "--ranks",
    type=click.IntRange(1, 4),
    default=4,
    show_default=True,
    help="The largest number of virtual ranks (threads of this process) to try.",
)
@click.option(
    "--launched",
    is_flag=True,
    help="A dispatch backend on real ranks: the processes that torchrun started. A case that takes long is named as it "
    "runs; ranks that wait for one another in vain end the run with an error that names case and rank.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="With --launched: how long a collective waits for the other ranks.",
)
@click.option("--device", metavar="DEVICE", help="cpu or cuda; default: cpu, where the backend runs on it.")
@click.option("--json", "json_file", metavar="FILE", type=click.Path(path_type=Path), help="Write every case there.")
@click.option("--params", metavar="JSON", default="{}", help='Parameters of a router, such as {"num_groups": 2}.')
@click.option("--markdown", is_flag=True, help="Print the table for a README.")
def conformance(
    name: str,
    ranks: int,
    launched: bool,
    timeout_s: float,
    device: str | None,
    json_file: Path | None,
    params: str,
    markdown: bool,
) -> None:
    """Run every conformance case of NAME: a dispatch or experts backend, a scheme, a router or a runner.

    NAME is as in `moe-core plugins`, with its kind before it where two things have one name: experts:torch. What is
    asked follows from what the backend declares: what it claims is computed and compared with a float64 reference, what
    it does not claim it must refuse with a reason.

    Exit code 0: it conforms. 1: it fails. 3: nothing that computes could run on this machine.
    """
    quiet = False
    if launched:
        suite, rank = launched_suite(name, timeout_s)
        asked, quiet = [suite], rank > 0  # every process runs all cases, one of them speaks
    else:
        where = None if device is None else str(real_device(device))
        asked = suites(name, device=where, ranks=ranks, params=_object(params))
    reports = []
    for suite in asked:
        try:
            reports.append(_run(suite, quiet=quiet, tell_slow=launched and not quiet))
        except OutOfStep as lost:
            raise MoEError(f"{suite.subject}: {lost}") from lost
        if not quiet:
            _print(reports[-1], markdown)
    if json_file is not None and not quiet:
        json_file.write_text(json.dumps([report.to_dict() for report in reports], indent=2) + "\n")
    verdicts = {report.verdict for report in reports}
    if verdicts != {"conforms"}:
        raise SystemExit(1 if "fails" in verdicts else 3)


def _run(suite: Suite, *, quiet: bool, tell_slow: bool) -> Report:
    if quiet:
        return run_cases(suite.cases, suite.subject, suite.device)
    timers: list[threading.Timer] = []

    def before(case: Case) -> None:
        if tell_slow:
            told = f"the case {case.name!r} has been running for {_SLOW_S:g} s …"
            timers.append(threading.Timer(_SLOW_S, output.note, [told]))
            timers[-1].daemon = True
            timers[-1].start()

    with output.progress(f"{suite.subject}: {len(suite.cases)} cases", total=len(suite.cases)) as step:

        def after(result: Result) -> None:
            if timers:
                timers.pop().cancel()
            step()

        return run_cases(suite.cases, suite.subject, suite.device, before=before, each=after)


def _object(params: str) -> dict[str, Any]:
    try:
        value = json.loads(params)
    except json.JSONDecodeError as error:
        raise ValueError(f"--params {params!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f'--params {params!r}: expected an object, such as {{"num_groups": 2}}')
    return value


def _print(report: Report, markdown: bool) -> None:
    if markdown:
        output.emit(report.markdown())
    else:
        output.emit_table(_table(report))
    alike: dict[tuple[str, str], list[Result]] = {}
    for result in report.failures:
        alike.setdefault((result.duty, result.text), []).append(result)
    for results in list(alike.values())[:_SHOWN]:
        output.emit(_lines(results))
    if len(alike) > _SHOWN:
        output.emit(f"… and {len(alike) - _SHOWN} more; --json FILE has all")
    skipped = dict.fromkeys(r.text for r in report.results if r.outcome is Outcome.SKIPPED)
    for reason in skipped:
        count = sum(r.outcome is Outcome.SKIPPED and r.text == reason for r in report.results)
        output.emit(f"skipped {count}: {reason}")
    passed = report.count(Outcome.PASSED)
    says = {
        "conforms": f"{report.subject} conforms: {passed} of {len(report.results)} cases passed",
        "fails": f"{report.subject} fails {len(report.failures)} of {len(report.results)} cases",
        "not exercised": f"{report.subject} was not exercised: nothing that computes could run on {report.device}",
    }
    if not markdown:
        output.emit(f"{says[report.verdict]}, {report.count(Outcome.SKIPPED)} skipped, on {report.device}.")


def _lines(results: list[Result]) -> str:
    """Cases that failed with one text."""
    first = results[0]
    count = f"{len(results)} cases, first: " if len(results) > 1 else ""
    head = f"FAILED {count}{first.case.name} ({first.case.tier.value}, {first.case.claim})"
    return f"{head}\n       {first.duty}: {first.text}"


def _table(report: Report) -> rich.table.Table:
    table = rich.table.Table(title=report.subject, title_justify="left", box=None, pad_edge=False)
    columns = ["duty", "tier", "passed", "failed", "known failures", "skipped"]
    for column in columns:
        table.add_column(column, justify="left" if column in ("duty", "tier") else "right")
    for row in report.rows():
        table.add_row(*(str(row[column] or "·") for column in columns))
    return table
