"""How `moe-core plan` shows what it found: tables for people, and curves over the number of ranks."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import rich.markup
import rich.table

from moe_core.cli import output
from moe_core.cli.layers import SPREADS
from moe_core.planner import Cost, PairCost
from moe_core.reports import reasons_against

if TYPE_CHECKING:
    from moe_core.cli.plan import Entry

UNKNOWN = "?"
"""A dispatch that declares no footprint leaves it open."""


def size(num_bytes: float | None) -> str:
    """Three figures and a unit, such as "41.5 MiB"."""
    if num_bytes is None:
        return UNKNOWN
    if not num_bytes:
        return "0"
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.3g} {units[0]}"


def duration(seconds: float | None) -> str:
    """Such as "41.5 us"."""
    if seconds is None:
        return "–"
    if not seconds:
        return "0"
    value, units = seconds * 1e6, ["us", "ms", "s"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value:.0f} {units[0]}"


def work(flops: float) -> str:
    """Such as "41.5 GFLOP"."""
    value, units = flops / 1e6, ["MFLOP", "GFLOP", "TFLOP"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value:,.0f} {units[0]}"


def percent(part: float | None, whole: float | None) -> str:
    if part is None or not whole:
        return UNKNOWN if whole is None else "–"
    return f"{100 * part / whole:.0f} %" if part / whole >= 0.01 else f"{100 * part / whole:.1g} %"


def show(entries: Sequence[Entry], tokens: int, most: int, spread: str, device: str) -> None:
    """Each kind of layers: on one number of ranks every pair in detail, on several a table over them."""
    for layers in dict.fromkeys(entry.layers for entry in entries):
        own = [entry for entry in entries if entry.layers == layers]
        output.emit(str(layers))
        if layers.note:
            output.emit(f"note: {layers.note}")
        sized = "" if most == tokens else f", buffers sized for {most:,}"
        output.emit(f"{SPREADS[spread]}; {tokens:,} tokens a step on each rank{sized}; on {device}")
        for entry in own:
            if entry.refused:
                output.emit(f"{_ranks(entry)}: {entry.refused}")
            for pair in entry.unbuildable:
                name = f"{pair.report.dispatch} + {pair.report.experts}"
                output.emit(f"{_ranks(entry)}: selection takes {name}, which can't be built: no layer runs so")
        for line in dict.fromkeys(
            f"{item.candidate}: {item.reason}" for entry in own for pair in entry.pairs for item in pair.unusable
        ):
            output.emit(f"  {line}")
        able = [entry for entry in own if not entry.refused]
        if len(own) > 1:
            _show_sweep(able)
        elif able:
            _show_pairs(able[0])
        output.emit("")
    _show_assumptions(entries)


def _ranks(entry: Entry) -> str:
    ranks = "1 rank" if entry.world == 1 else f"{entry.world:,} ranks"
    return ranks if entry.groups == 1 else f"{ranks} in {entry.groups} groups of {entry.world // entry.groups}"


def _table(columns: Iterable[str], left: int = 2) -> rich.table.Table:
    table = rich.table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: int = 0) -> None:
    """Cells of plain text, each as wide as its column needs."""
    table = _table(header)
    table.columns[0].header = " " * indent + header[0]
    for first, *rest in rows:
        table.add_row(" " * indent + rich.markup.escape(first), *map(rich.markup.escape, rest))
    output.emit_table(table)


def _show_pairs(entry: Entry) -> None:
    """Every pair that could run on one number of ranks, and why the others could not."""
    costed = entry.costed
    if not costed:
        output.emit(f"{_ranks(entry)}: no pair of backends can run this")
    else:
        _show_layer(entry, costed[0].cost)
        memory = _table(["pair", "", "dispatch holds", "experts' rows", "workspaces", "scratch", "step", "buffers"])
        wire = _table(["pair", "", "dispatch", "combine", "sum", "needed", "row slots", "filled", "experts' time",
                       "wire time", "step time"])  # fmt: skip
        for pair in costed:
            memory.add_row(*_name(pair), *_memory(pair.cost))
            wire.add_row(*_name(pair), *_work(entry, pair))
        output.emit("\nmemory of one layer's step")
        output.emit_table(memory)
        output.emit(
            "\nreceived from other ranks in one layer's step, rows that the experts get, and floors of the time"
        )
        output.emit_table(wire)
    missing = dict.fromkeys(line for pair in costed for line in pair.missing)
    if missing:
        output.emit("\nnot to be had here:")
        output.emit("\n".join(f"  {line}" for line in missing))
    reports = [pair.report for pair in entry.pairs if pair.cost is None and not pair.unusable]
    if reasons := reasons_against(reports):
        output.emit("\nrefused:")
        output.emit("\n".join(f"  {line}" for line in reasons))


def _show_layer(entry: Entry, cost: Cost | None) -> None:
    """What is the same for every pair."""
    assert cost is not None and entry.problem is not None, "a pair that could run"
    weights, count = cost.weight_bytes, entry.layers.count
    room = ""
    if entry.sheet is not None:
        fits = "" if weights * count <= entry.sheet.memory.value else ", DOES NOT FIT"
        room = f" of the {entry.sheet.memory.value / 1e9:.0f} GB that one has{fits}"
    output.emit(
        f"{_ranks(entry)}; one of them holds {entry.problem.num_local_experts} experts of a layer: "
        f"{size(weights)} a layer, {size(weights * count)} in all{room}; while loading {size(cost.loading_bytes)} more"
    )
    output.emit(
        f"a step gives it {cost.choices:,.0f} choices, of {cost.active_experts:.1f} different experts: "
        f"{work(cost.flops)}, and at least {size(cost.traffic_bytes)} to read and write"
    )


def _name(pair: PairCost) -> tuple[str, str]:
    name = f"{pair.report.dispatch} + {pair.report.experts}"
    return rich.markup.escape(name), "" if pair.verdict == "outranked" else pair.verdict


def _memory(cost: Cost | None) -> list[str]:
    assert cost is not None, "a pair that could run"
    dispatch = cost.footprint
    held, scratch = (None, None) if dispatch is None else (dispatch.held_bytes, dispatch.scratch_bytes)
    sizes = [held, cost.expert_output_bytes, cost.workspace_bytes, scratch, cost.step_bytes, cost.buffer_bytes]
    return [size(value) for value in sizes]


def _work(entry: Entry, pair: PairCost) -> list[str]:
    cost, spent = pair.cost, entry.times(pair)
    assert cost is not None, "a pair that could run"
    dispatch = cost.footprint
    out, back = (None, None) if dispatch is None else (dispatch.dispatch_wire_bytes, dispatch.combine_wire_bytes)
    needed = "–" if cost.needed_wire_bytes is None else size(cost.needed_wire_bytes)
    slots = UNKNOWN if cost.slots is None else f"{cost.slots:,}"
    bound = f" ({spent.bound})" if spent.bound else ""
    return [size(out), size(back), size(cost.reduce_wire_bytes), needed, slots, percent(cost.filled, cost.slots),
            duration(spent.experts) + bound, duration(spent.wire), duration(spent.step)]  # fmt: skip


def by_dispatch(entry: Entry) -> dict[str, PairCost]:
    """The first pair of each dispatch that could run, by its name: what a sweep compares."""
    found: dict[str, PairCost] = {}
    for pair in entry.costed:
        found.setdefault(pair.report.dispatch, pair)
    return found


def _show_sweep(entries: Sequence[Entry]) -> None:
    table = _table(["ranks", "pair", "", "weights in all", "step memory", "buffers", "wire", "needed", "filled",
                    "experts' time", "wire time", "step time"], 3)  # fmt: skip
    for entry in entries:
        ranks = _ranks(entry).removesuffix(" ranks").removesuffix(" rank")
        if not entry.costed:
            table.add_row(ranks, "none can run; see `moe-core plan` for this number alone")
        for pair in by_dispatch(entry).values():
            cost, spent = pair.cost, entry.times(pair)
            assert cost is not None, "a pair that could run"
            needed = "–" if cost.needed_wire_bytes is None else size(cost.needed_wire_bytes)
            table.add_row(
                ranks, *_name(pair), size(cost.weight_bytes * entry.layers.count), size(cost.step_bytes),
                size(cost.buffer_bytes), size(cost.wire_bytes), needed, percent(cost.filled, cost.slots),
                duration(spent.experts), duration(spent.wire), duration(spent.step),
            )  # fmt: skip
            ranks = ""
    output.emit("per rank; weights of all layers, the rest of one layer's step")
    output.emit_table(table)


ASSUMED = (
    "routing is uniform: every set of K different experts is equally likely for every token",
    "needed is each token once to each rank that has an expert of its, and one sum back",
    "a step's memory is an upper bound: not all of it lives at the same moment",
    "workspaces are those that experts declare: emulated ones declare none, and allocate as they go",
    "times are floors, by bandwidths and matmul rates, one after the other, without latencies and launches",
)


def _show_assumptions(entries: Sequence[Entry]) -> None:
    sheet = next((entry.sheet for entry in entries if entry.sheet), None)
    output.emit("assumed:\n" + "\n".join(f"  {line}" for line in ASSUMED))
    if sheet is None:
        output.emit(
            "  no times: the device's rates are not known; pass --device with one of the names that --help lists"
        )
        return
    output.emit(f"figures of {sheet.device.name}:")
    figures = sheet.figures()
    for source in dict.fromkeys(figure.source for figure in figures.values()):
        told = ", ".join(f"{name} {figure.value:,g}" for name, figure in figures.items() if figure.source == source)
        output.emit(f"  {told}: {source}")


def show_comparison(comparison: dict[str, Any]) -> None:
    """Predicted beside measured times."""
    output.emit(f"\nexperts' step, predicted for {comparison['predicted_for']}, measured on {comparison['device']}")
    table = _table(["shape", "tokens", "predicted", "measured", "error"], 1)
    for row in comparison["steps"]:
        table.add_row(
            rich.markup.escape(row["shape"]),
            f"{row['tokens']:,}",
            duration(row["predicted_us"] / 1e6),
            duration(row["measured_us"] / 1e6),
            f"{100 * row['error']:+.0f} %",
        )
    output.emit_table(table)
    errors = [abs(row["error"]) for row in comparison["steps"]]
    output.emit(
        f"median error {100 * statistics.median(errors):.0f} %, largest {100 * max(errors):.0f} % (a floor is short of "
        "what launches, index work and tiles that are not full take)"
    )


def draw(entries: Sequence[Entry], file: Path) -> None:
    """Memory, traffic, filled rows and time over the ranks, one curve for each dispatch.

    Raises:
        click.ClickException: matplotlib is missing, or does not write such files.
    """
    try:
        import matplotlib  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise click.ClickException('--plot needs matplotlib: pip install "moe-core[plot]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415 - an extra

    kinds = list(dict.fromkeys(entry.layers for entry in entries))
    figure = pyplot.figure(figsize=(18, 4.5 * len(kinds)), layout="constrained")
    for part, layers in zip(figure.subfigures(len(kinds), 1, squeeze=False)[:, 0], kinds, strict=True):
        part.suptitle(str(layers))
        axes = part.subplots(1, len(_CURVES))
        own = [entry for entry in entries if entry.layers == layers and not entry.refused]
        for axis, (title, value) in zip(axes, _CURVES.items(), strict=True):
            _draw_curves(axis, own, value)
            axis.set(title=title, xlabel="ranks", yscale="log")
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.yaxis.set_major_formatter("{x:,g}")
            axis.grid(alpha=0.3)
        handles, names = axes[0].get_legend_handles_labels()
        part.legend(handles, names, loc="outside lower center", ncols=len(names))
    try:
        figure.savefig(file, dpi=120)
    except ValueError as error:
        raise click.ClickException(f"--plot {file}: {error}") from error
    finally:
        pyplot.close(figure)


def _draw_curves(axis: Any, entries: Sequence[Entry], value: Any) -> None:
    """A dispatch has one colour in every picture, also in one that it has no curve in."""
    names = dict.fromkeys(name for entry in entries for name in by_dispatch(entry))
    for index, name in enumerate(names):
        points = [
            (entry.world, found)
            for entry in entries
            if name in by_dispatch(entry) and (found := value(entry, by_dispatch(entry)[name]))
        ]
        style = ("-", "--", "-.", ":")[index % 4]  # curves that lie on one another are both seen
        axis.plot(*zip(*points, strict=True) if points else ([], []), color=f"C{index}", ls=style, marker="o", ms=3,
                  label=name)  # fmt: skip


def _gibibytes(entry: Entry, pair: PairCost) -> float | None:
    cost = pair.cost
    if cost is None or cost.step_bytes is None or cost.buffer_bytes is None:
        return None
    return (cost.weight_bytes * entry.layers.count + cost.step_bytes + cost.buffer_bytes) / 2**30


def _mebibytes_on_wire(entry: Entry, pair: PairCost) -> float | None:
    return None if pair.cost is None or pair.cost.wire_bytes is None else pair.cost.wire_bytes / 2**20


def _filled(entry: Entry, pair: PairCost) -> float | None:
    cost = pair.cost
    return None if cost is None or cost.filled is None or not cost.slots else 100 * cost.filled / cost.slots


def _microseconds(entry: Entry, pair: PairCost) -> float | None:
    seconds = entry.times(pair).step
    return None if seconds is None else seconds * 1e6


_CURVES = {
    "weights, buffers and one step, per rank (GiB)": _gibibytes,
    "received per rank in a layer's step (MiB)": _mebibytes_on_wire,
    "row slots that hold work (%)": _filled,
    "a layer's step, floor of the time (us)": _microseconds,
}
