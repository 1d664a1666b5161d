"""`moe-core explain`: what would run in each layer of a model, and why, from its config alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import moe_core
from moe_core.build import plan as plan_layer
from moe_core.cli import html, models, output, plan_output
from moe_core.cli.devices import SHEETS
from moe_core.cli.explained import Asked, SchemeTable, cost_rows, scheme_table
from moe_core.cli.layers import SPREADS, Layers, typed_shape
from moe_core.cli.options import described_device, described_sheet, dispatch_option, experts_option, json_option
from moe_core.cli.plan_details import TOKENS
from moe_core.cli.plan_text import PlanGroup, group_plans, layer_facts
from moe_core.plugins import PluginStatus, registry
from moe_core.select import Plan
from moe_core.types import Device

ALL = "all"
"""Of `--scheme`: every one that is installed."""


@click.command(short_help="Show what would run in each layer of a model, and why.")
@click.argument("source", metavar="DIR-or-config.json-or-SHAPE")
@dispatch_option
@experts_option
@click.option(
    "--device",
    metavar="DEVICE",
    help="Plan for cpu, for cuda (the one here), or for one that need not be here: by name "
    f"({', '.join(SHEETS)}; tables of launch parameters go by that) or by compute capability (cuda:9.0).",
)
@click.option("--world", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Ranks of a layer.")
@click.option("--spread", type=click.Choice(list(SPREADS)), default="ep", show_default=True,
              help="How a layer lies on its ranks: see `plan`.")  # fmt: skip
@click.option("--scheme", "schemes", multiple=True, metavar="NAME",
              help="Explain this scheme; may be repeated; or all. Default: the checkpoint's own.")  # fmt: skip
@click.option(
    "--tokens",
    multiple=True,
    type=click.IntRange(1),
    default=TOKENS,
    show_default=True,
    metavar="T",
    help="Show workspaces and costs at this T on every rank; may be repeated.",
)
@click.option("--all", "whole", is_flag=True, help="Show every pair of backends with every reason against it.")
@click.option("--html", "page", type=click.Path(path_type=Path, dir_okay=False), help="Write a page for a browser.")
@json_option
def explain(
    source: str,
    dispatch: str | None,
    experts: str | None,
    device: str | None,
    world: int,
    spread: str,
    schemes: tuple[str, ...],
    tokens: tuple[int, ...],
    whole: bool,
    page: Path | None,
    as_json: bool,
) -> None:
    """Show the plan of every MoE layer with its reasons, from the config alone: no weights are read.

    SHAPE is a name that `bench` knows (qwen3-30b, say), or E=256,K=8,H=7168,I=2048 and, if you like, dtype=float16
    and layers=58. Layers with the same plan are shown once. Under the chosen pair of backends stand the others that
    could run, and each refused backend with all the reasons (with --all, --json and --html pair by pair); then which
    kernels serve which T, with the launch parameters and where these come from, the experts' workspaces, name by
    name, and what each pair that could run would cost: bytes on the wire and memory. Exit code 1: a pair that
    selection takes can't be built.
    """
    where = described_device(device)
    asked = Asked(dispatch=dispatch, experts=experts, world=world, spread=spread, tokens=tuple(sorted(set(tokens))),
                  sheet=described_sheet(where.name if where else None))  # fmt: skip
    name, groups = _groups(source, asked, where)
    tables = [_tables(group, schemes, asked) for group in groups]
    if page is not None:
        sections = [
            html.Section(title=group.title, facts=layer_facts(found[0].plan or group.plan), tables=found)
            for group, found in zip(groups, tables, strict=True)
        ]
        buffers = "" if asked.world == 1 else f" · buffers between ranks hold {max(asked.tokens):,} tokens"
        subtitle = f"{_ranks(asked)} · {groups[0].plan.problem.device.name}{buffers}"
        page.write_text(html.page(name, subtitle, sections, asked.sheet, moe_core.__version__), encoding="utf-8")
        output.note(f"written: {page}")
    if as_json:
        output.emit_json({
            "source": source, "model_type": name, "ranks": world, "spread": spread,
            "groups": [_group_dict(group, found, asked) for group, found in zip(groups, tables, strict=True)],
        })  # fmt: skip
    elif page is None:
        _show(name, groups, tables, asked, whole)
    if any(each.unbuildable for found in tables for each in found):
        raise SystemExit(1)


def _groups(source: str, asked: Asked, where: Device | None) -> tuple[str, list[PlanGroup]]:
    """What it is called, and its layers with their plans on one rank."""
    if (shape := typed_shape(source)) is not None:
        plan = _plan_of_shape(shape, asked, where)
        return source, [PlanGroup(("one layer",), (), "shape", plan)]
    path = Path(source)
    config = models.load_config(path)
    reading = models.prepare_config(path, config)
    if reading.note:
        output.note(reading.note)
    from moe_core.integrations.transformers import layer_plans  # noqa: PLC0415 - needs transformers

    if reading.scheme:
        config.quantization_config = None  # planned in its scheme, as `run` will
    alone = asked.world == 1  # backends that are insisted on may be for several ranks only
    plans = layer_plans(
        config,
        dispatch=asked.dispatch if alone else None,
        experts=asked.experts if alone else None,
        device=where,
        scheme=reading.scheme or None,
    )
    return config.model_type, group_plans(plans)


def _plan_of_shape(shape: Layers, asked: Asked, where: Device | None) -> Plan:
    alone = asked.world == 1
    return plan_layer(
        shape.config,
        dispatch=asked.dispatch if alone else None,
        experts=asked.experts if alone else None,
        device=where,
    )


def _tables(group: PlanGroup, schemes: Sequence[str], asked: Asked) -> list[SchemeTable]:
    names = list(dict.fromkeys(schemes)) or [group.plan.scheme.name]
    if ALL in names:
        names = list(registry().quant_methods)
    return [scheme_table(group.plan, name, asked, strict=len(names) == 1) for name in names]


def _group_dict(group: PlanGroup, found: Sequence[SchemeTable], asked: Asked) -> dict[str, Any]:
    plans = [each.to_dict(asked.sheet) for each in found]
    return {"layers": list(group.layers), "modules": list(group.modules), "plan": plans[0], "schemes": plans}


def _ranks(asked: Asked) -> str:
    return "1 rank" if asked.world == 1 else f"{asked.world:,} ranks, {SPREADS[asked.spread]}"


def _show(
    name: str, groups: Sequence[PlanGroup], tables: Sequence[Sequence[SchemeTable]], asked: Asked, whole: bool
) -> None:
    count = sum(len(group.modules) for group in groups)
    where = "" if asked.world == 1 else f" on {_ranks(asked)}; buffers between ranks hold {max(asked.tokens):,} tokens"
    output.emit(f"{name}: {count} MoE layer{'s' if count != 1 else ''}{where}")
    for group, found in zip(groups, tables, strict=True):
        output.emit(group.title)
        for each in found:
            if each.plan is not None:
                output.emit(f"  {layer_facts(each.plan)}")
            output.emit("\n".join(f"  {line}" for line in each.lines(whole=whole)))
            header, rows = cost_rows(each)
            if rows:
                output.emit("  costs of one layer's step on one rank:")
                plan_output.show_table(header, rows, indent=4)
            for line in each.uncosted:
                output.emit(f"    no cost of {line}")
    for record in registry().plugins:
        if record.status not in (PluginStatus.LOADED, PluginStatus.DISABLED):  # disabled: the reader's own wish
            output.emit(f"not loaded: plugin {record.name} ({record.status}; see moe-core plugins)")
