"""`moe-core bench`: experts backends beside transformers' own, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import click
import rich.table
import torch

from moe_core.cli import output
from moe_core.cli.bench_layer import SHAPES, Result, Shape, machine_rates, measure_case, parse_shape, random_weights
from moe_core.cli.models import DTYPES
from moe_core.cli.options import json_option, real_device
from moe_core.plugins import registry


@click.command(short_help="Measure experts backends beside transformers' own.")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    default=("qwen3-30b",),
    show_default=True,
    metavar="NAME|H,I,E,K",
    help=f"A named shape ({', '.join(SHAPES)}) or four numbers; may be repeated.",
)
@click.option("--tokens", multiple=True, type=click.IntRange(1), default=(1, 16, 128), show_default=True, metavar="T")
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), default="bfloat16", show_default=True)
@click.option("--experts", "names", multiple=True, metavar="NAME", help="Only these backends; default: all.")
@click.option("--device", metavar="DEVICE", help="cpu or cuda; default: cuda where there is one.")
@click.option("--rounds", type=click.IntRange(2), default=20, show_default=True, help="Timed rounds of each case.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the fractions of the roofline into this file.")
@click.option(
    "--ep",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Instead: run this checkpoint on random tokens, and print how evenly its experts would load ranks.",
)
@click.option(
    "--ranks",
    "worlds",
    multiple=True,
    type=click.IntRange(2),
    default=(2, 4, 8),
    show_default=True,
    metavar="W",
    help="Numbers of ranks for --ep; may be repeated.",
)
@json_option
def bench(
    shapes: tuple[str, ...],
    tokens: tuple[int, ...],
    dtype: str,
    names: tuple[str, ...],
    device: str | None,
    rounds: int,
    plot: Path | None,
    folder: Path | None,
    worlds: tuple[int, ...],
    as_json: bool,
) -> None:
    """Time one layer's experts step: every backend that can run here, and transformers' own, in turn on the same data.

    Ids and router weights are given; a step is everything after that. Results are compared with the reference first: a
    wrong one gets no time. The roofline is that of this machine, measured in the same run. Times are those of eager
    calls, host time included.

    With --ep nothing is timed: a checkpoint runs once, on the most of --tokens, and for each layer the busiest expert
    and the busiest rank are printed, over the mean; 1.00 is even.
    """
    if folder is not None:
        _print_load(folder, max(tokens), worlds, device, as_json=as_json)
        return
    backends = list(names) or sorted(registry().experts)
    for name in backends:
        registry().find("experts", name)
    parsed = [parse_shape(text) for text in shapes]
    target, torch_dtype = real_device(device), DTYPES[dtype]
    where = torch.cuda.get_device_name(target) if target.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    rates = machine_rates(torch_dtype, target)
    output.note(f"{where}: copy {rates[0] / 1e9:,.0f} GB/s, {dtype} matmul {rates[1] / 1e12:,.2f} TFLOP/s")
    cases: list[tuple[Shape, int, list[Result]]] = []
    with output.progress("measuring", len(parsed) * len(tokens)) as step:
        for shape in parsed:
            weights = random_weights(shape, torch_dtype, target)
            for count in tokens:
                cases.append((shape, count, measure_case(shape, count, weights, backends, rates, rounds)))
                step()
    if plot is not None:
        draw(cases, plot, where)
    if as_json:
        output.emit_json(_to_dict(cases, rates, where, dtype))
        return
    for shape, count, results in cases:
        output.emit_table(_table(shape, count, results))


def _print_load(folder: Path, tokens: int, worlds: tuple[int, ...], device: str | None, *, as_json: bool) -> None:
    from moe_core.cli.bench_load import load_table, measure_load  # noqa: PLC0415 - needs transformers

    loads = measure_load(folder, tokens, real_device(device))
    if as_json:
        output.emit_json({"tokens": tokens, "layers": [load.to_dict(worlds) for load in loads]})
    else:
        output.emit_table(
            load_table(loads, worlds, f"{folder.name}, {tokens} random tokens: the busiest over the mean")
        )


def _table(shape: Shape, tokens: int, results: list[Result]) -> rich.table.Table:
    sizes = f"H {shape.hidden}, I {shape.intermediate}, E {shape.experts}, K {shape.top_k}"
    table = rich.table.Table(title=f"{shape.name} ({sizes}), T = {tokens}", box=None, title_justify="left")
    table.add_column("experts")
    for heading in ("us", "10 to 90 %", "host us", "error", "roofline"):
        table.add_column(heading, justify="right")
    for result in sorted(results, key=lambda item: item.microseconds or float("inf")):
        if result.microseconds is None or result.spread is None:
            table.add_row(result.name, result.why_not)
            continue
        table.add_row(
            result.name,
            f"{result.microseconds:,.1f}",
            f"{result.spread[0]:,.1f} to {result.spread[1]:,.1f}",
            f"{result.host_microseconds:,.1f}",
            f"{result.error:.1e}",
            f"{result.fraction:.0%}",
        )
    return table


def _to_dict(
    cases: list[tuple[Shape, int, list[Result]]], rates: tuple[float, float], where: str, dtype: str
) -> dict[str, Any]:
    return {
        "machine": where,
        "torch": torch.__version__,
        "dtype": dtype,
        "copy_bytes_per_second": rates[0],
        "matmul_flop_per_second": rates[1],
        "cases": [
            {"shape": attrs.asdict(shape), "tokens": tokens, "results": [attrs.asdict(result) for result in results]}
            for shape, tokens, results in cases
        ],
    }


def draw(cases: list[tuple[Shape, int, list[Result]]], file: Path, where: str) -> None:
    """One panel per shape: fraction of the roofline over T, a line per contestant."""
    try:
        import matplotlib  # noqa: PLC0415 - only for a picture
    except ImportError as error:
        raise ValueError('--plot needs matplotlib: pip install "moe-core[plot]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415 - after the backend is chosen

    names = list(dict.fromkeys(shape.name for shape, _, _ in cases))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False, sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for shape, tokens, results in cases:
            for result in results:
                if shape.name == name and result.fraction is not None:
                    lines.setdefault(result.name, []).append((tokens, result.fraction))
        for label, points in sorted(lines.items()):
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axis.set(title=name, xlabel="tokens", xscale="log", ylim=(0, 1.1))
    axes[0][0].set_ylabel(f"fraction of the roofline of {where}")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(file)
