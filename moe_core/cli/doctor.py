"""`moe-core doctor`: what is installed, what works, and how to mend the rest."""

from __future__ import annotations

import click
import rich.markup
import rich.table

from moe_core.cli import output
from moe_core.cli.checks import Rank, run_checks

_STYLES = {Rank.OK: "green", Rank.WARN: "yellow", Rank.FAIL: "bold red"}


@click.command(short_help="Check the environment and every plugin.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check the environment and every plugin, with a hint for whatever is not right.

    Each check is ok, warn or fail. Plugins and the vendor libraries behind them are imported in processes of their own,
    so one that crashes is reported and harms nothing. The exit code is 1 if a check fails, else 0.
    """
    with output.progress("checking the environment and each plugin"):
        checks = run_checks()
    counts = {rank: sum(check.rank is rank for check in checks) for rank in Rank}
    if as_json:
        output.emit_json(
            {
                "checks": [{"check": c.name, "rank": c.rank.value, "found": c.found, "hint": c.hint} for c in checks],
                "counts": {rank.value: count for rank, count in counts.items()},
            }
        )
    else:
        table = rich.table.Table(box=None, pad_edge=False, show_header=False)
        for check in checks:
            found = rich.markup.escape(check.found) + (f"\n→ {rich.markup.escape(check.hint)}" if check.hint else "")
            style = _STYLES[check.rank]
            table.add_row(f"[{style}]{check.rank.value}[/]", rich.markup.escape(check.name), found)
        output.emit_table(table)
        output.emit(", ".join(f"{count} {rank.value}" for rank, count in counts.items()))
    if counts[Rank.FAIL]:
        ctx.exit(1)
