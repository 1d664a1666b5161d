"""`moe-core plugins`: every plugin, what it registers, and whether it can be used here."""

from __future__ import annotations

from typing import Any

import click
import rich.markup
import rich.table

from moe_core.build import plugins as list_plugins
from moe_core.cli import output
from moe_core.cli.backends import usable
from moe_core.plugins import PluginRecord, PluginStatus


@click.command(short_help="List every plugin, and whether it can be used here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")
def plugins(as_json: bool) -> None:
    """List every plugin: version, what it registers, usable here or why not; also the broken ones.

    Plugins are found by entry point (group moe_core.plugins). MOE_CORE_PLUGINS=a,b loads only these;
    MOE_CORE_DISABLE_PLUGINS=x blocks some.
    """
    listed = [describe(record) for record in list_plugins()]
    if as_json:
        output.emit_json({"plugins": listed})
        return
    table = rich.table.Table("plugin", "version", "status", "registers", "usable here", box=None, pad_edge=False)
    for plugin in listed:
        first = [plugin["name"], f"{plugin['distribution']} {plugin['version']}".strip(), plugin["status"]]
        if plugin["status"] != PluginStatus.LOADED:
            table.add_row(*map(rich.markup.escape, [*first, "", plugin["reason"]]))
            continue
        for item in plugin["registers"] or [
            {"item": "nothing", "usable": False, "reason": "it has no hook that registers something (docs/hooks.md)"}
        ]:
            says = "yes" if item["usable"] else f"no: {item['reason']}"
            table.add_row(*map(rich.markup.escape, [*first, item["item"], says]))
            first = ["", "", ""]
    output.emit_table(table)


def describe(record: PluginRecord) -> dict[str, Any]:
    """One plugin, for JSON."""
    return {
        "name": record.name,
        "distribution": record.distribution,
        "version": record.version,
        "module": record.module,
        "status": str(record.status),
        "reason": record.reason,
        "registers": [{"item": u.item, "usable": u.ok, "reason": u.reason} for u in usable(record)],
    }
