"""`moe-core docs`: the pages of the documentation, of the version that is installed."""

from __future__ import annotations

import difflib
from pathlib import Path

import click

import moe_core


@click.command(short_help="Print a page of the documentation.")
@click.argument("page", required=False)
def docs(page: str | None) -> None:
    """Print PAGE, in Markdown; without it, list the pages.

    A page that a message names, such as docs/hooks.md, is meant by its name too: moe-core docs hooks.
    """
    package = Path(moe_core.__file__).parent
    folder = package / "docs" if (package / "docs").is_dir() else package.parent / "docs"  # in a wheel, in a checkout
    pages = {path.stem: path for path in sorted(folder.glob("*.md")) if path.stem != "index"}
    if page is None:
        for name, path in pages.items():
            click.echo(f"{name:<26}{path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
        return
    name = Path(page).stem
    if name not in pages:
        near = difflib.get_close_matches(name, pages, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(pages)}"
        raise ValueError(f"docs: there is no page {page!r}{hint}")
    click.echo(pages[name].read_text(encoding="utf-8"), nl=False)
