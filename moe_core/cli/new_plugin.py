"""`moe-core new-plugin`: a package of one's own that works and is tested as it stands."""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Collection
from pathlib import Path

import click

from moe_core.cli import output
from moe_core.errors import MoEError
from moe_core.plugins import registry

_TEMPLATE = Path(__file__).parent / "template"
_KINDS = ("dispatch", "experts", "quant", "router", "runner")
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


@click.command(name="new-plugin", short_help="Write a working, tested plugin package to start from.")
@click.argument("name")
@click.option("--kind", type=click.Choice(_KINDS), required=True, help="What it is to provide.")
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="The folder in which the package's own folder is made; default: here.",
)
def new_plugin(name: str, kind: str, into: Path) -> None:
    """Write the package of a new backend NAME: it installs, is discovered, and passes the conformance kit.

    NAME is what people will type to choose it: a Python name in small letters, digits and underscores (acme_ring), that
    no installed plugin registers.
    What is in it is the simplest thing that works; docs/write_a_backend.md explains every line.
    """
    target = write_plugin(name, kind, into)
    for path in sorted(path for path in target.rglob("*") if path.is_file()):
        output.emit(str(path))
    output.note(f"next: cd {target} && pip install -e '.[test]' && moe-core plugins && pytest")


def write_plugin(name: str, kind: str, into: Path) -> Path:
    """Render the template of a kind (one of `_KINDS`) into a new folder, and return that.

    Raises:
        ValueError: `name` is no Python name in small letters, or is taken by a plugin that is installed.
        MoEError: copier is not installed, or the folder exists already.
    """
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ValueError(
            f"name = {name!r}; expected a Python name in small letters, digits and underscores, such as acme_ring"
        )
    found = registry()
    taken: dict[str, Collection[str]] = {
        "dispatch": found.dispatch,
        "experts": found.experts,
        "quant": found.quant_methods,
        "router": found.routers,
        "runner": found.runners,
    }
    if name in taken[kind]:
        raise ValueError(f"name = {name!r}; a plugin that is installed registers this {kind} already: choose another")
    if importlib.util.find_spec("copier") is None:
        raise MoEError('new-plugin needs copier: pip install "moe-core[authors]"')
    import copier  # noqa: PLC0415 - an extra

    prefix = "moe" if kind == "dispatch" else f"moe-{kind}"
    target = into / f"{prefix}-{name.replace('_', '-')}"
    if target.exists():
        raise MoEError(f"{target} exists already; remove it, or choose another name or folder (--into)")
    copier.run_copy(str(_TEMPLATE), target, data={"name": name, "kind": kind}, defaults=True, quiet=True)
    return target
