"""Where output goes: results to stdout, progress and notes to stderr."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import click
import rich.console
import rich.progress
import rich.table

_WIDTH_WITHOUT_TERMINAL = 160  # rich would assume 80 and fold the tables of a log file
_WIDEST = 10_000


def emit_table(table: rich.table.Table) -> None:
    """A result, as a table. Columns that must not be wrapped are not cut either, however narrow the terminal is."""
    console = rich.console.Console(highlight=False)
    width = console.width if console.is_terminal else _WIDTH_WITHOUT_TERMINAL
    wide = rich.console.Console(highlight=False, width=_WIDEST)
    if all(column.no_wrap for column in table.columns):
        width = max(width, wide.measure(table).maximum)
    console = rich.console.Console(highlight=False, width=width)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():  # rich fills every line up to the table's width
        click.echo(line.rstrip())


def emit(text: str) -> None:
    """A result, as text."""
    click.echo(text)


def emit_json(value: Any) -> None:
    """A result, for machines."""
    click.echo(json.dumps(value, indent=2))


def note(text: str) -> None:
    """Something that is not a result."""
    click.echo(text, err=True)


@contextlib.contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Show that something is going on; calling what it yields is one step of `total`."""
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:  # a bar in a log file is noise, a line is not
        note(f"{description} …")
        yield lambda: None
        return
    with rich.progress.Progress(console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


@contextlib.contextmanager
def progress_so_far(description: str) -> Iterator[Callable[[int, int], None]]:
    """The same where each step says (done, total), and the first one starts it."""
    console = rich.console.Console(stderr=True)
    bar = rich.progress.Progress(console=console, transient=True)
    task = bar.add_task(description, total=None)

    def show(done: int, total: int) -> None:
        if console.is_terminal:
            bar.start()
            bar.update(task, completed=done, total=total)
        elif done == 1:
            note(f"{description}, {total} of them …")

    try:
        yield show
    finally:
        if console.is_terminal:  # elsewhere it would end a line that there is not
            bar.stop()


@contextlib.contextmanager
def progress_bars_of_transformers() -> Iterator[None]:
    """Let transformers show how far it is, on a terminal; elsewhere its bars would fill a log file."""
    from transformers.utils import logging  # noqa: PLC0415 - an extra

    if rich.console.Console(stderr=True).is_terminal or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
