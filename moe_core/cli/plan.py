"""`moe-core plan`: what a model's MoE layers would cost each rank, without weights and without the device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import click

from moe_core.cli import output, plan_output
from moe_core.cli.devices import SHEETS, Sheet, Times, times
from moe_core.cli.layers import SPREADS, Layers, groups, layers_of
from moe_core.cli.options import described_device, described_sheet, json_option
from moe_core.config import Problem
from moe_core.planner import PairCost, pair_costs
from moe_core.types import Device

MOST_RANKS = 1024


@attrs.frozen(kw_only=True)
class Entry:
    """One kind of layers on one number of ranks.

    Attributes:
        layers: which.
        world: ranks.
        groups: of ranks that hold all experts each.
        problem: one layer on rank 0.
        pairs: what each pair of backends would cost.
        sheet: the device's figures; None: not known.
        refused: why the layer can't be spread so; "" if it can.
    """

    layers: Layers
    world: int
    groups: int = 1
    problem: Problem | None = None
    pairs: tuple[PairCost, ...] = ()
    sheet: Sheet | None = None
    refused: str = ""

    @property
    def costed(self) -> list[PairCost]:
        """The pairs that could run, here or where what is missing here is installed."""
        return [pair for pair in self.pairs if pair.cost is not None]

    @property
    def unbuildable(self) -> list[PairCost]:
        """The pairs that selection takes and that can't be built."""
        return [pair for pair in self.pairs if pair.report.unbuildable]

    def times(self, pair: PairCost) -> Times:
        assert pair.cost is not None, "a pair that can't run takes no time"
        return Times(None, "", None) if self.sheet is None else times(pair.cost, self.sheet)

    def to_dict(self) -> dict[str, Any]:
        pairs = []
        for pair in self.pairs:
            shown: dict[str, Any] = {
                "dispatch": pair.report.dispatch,
                "experts": pair.report.experts,
                "verdict": pair.verdict,
                "reasons": [f"{item.candidate}: {item.reason}" for item in pair.report.rejections],
            }
            if pair.cost is not None:
                shown |= {"cost": pair.cost.to_dict(), "seconds": attrs.asdict(self.times(pair))}
            pairs.append(shown)
        return {"layers": str(self.layers), "count": self.layers.count, "ranks": self.world, "groups": self.groups,
                "refused": self.refused, "pairs": pairs}  # fmt: skip


@click.command(short_help="Estimate memory, traffic and time on any number of ranks, without weights or GPUs.")
@click.argument("source", metavar="DIR-or-config.json-or-SHAPE")
@click.option("--world", default="1", metavar="N", show_default=True, help=f"Ranks: 8, or 1,8,64, or 1..{MOST_RANKS}.")
@click.option(
    "--tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of a step, per rank."
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="What sizes the buffers, per rank. Default: --tokens.")
@click.option("--spread", type=click.Choice(list(SPREADS)), default="ep", show_default=True,
              help="; ".join(f"{name}: {what}" for name, what in SPREADS.items()) + ".")  # fmt: skip
@click.option("--device", default="h200", show_default=True, metavar="DEVICE",
              help=f"{', '.join(SHEETS)}, or as in `explain` (then without times).")  # fmt: skip
@click.option("--scheme", metavar="NAME", help="Plan for weights in this scheme. Default: the checkpoint's own.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the figures over the ranks.")
@click.option("--measured", type=click.Path(path_type=Path, dir_okay=False, exists=True),
              help="JSON of `python -m benchmarks.experts`: print how far the predicted times are off.")  # fmt: skip
@json_option
def plan(
    source: str,
    world: str,
    tokens: int,
    max_tokens: int | None,
    spread: str,
    device: str,
    scheme: str | None,
    plot: Path | None,
    measured: Path | None,
    as_json: bool,
) -> None:
    """Estimate what the MoE layers of a model cost each rank: memory, bytes on the wire, and the floor of the time.

    A dry run: no weights are read and no GPU is needed. SHAPE is a name that `bench` knows (qwen3-30b, say), or
    E=256,K=8,H=7168,I=2048 and, if you like, dtype=float16 and layers=58. Sizes come from the functions that
    allocate at run time. Routing is taken as uniform. Only routed experts are counted: no attention, no shared
    experts, no KV cache. Exit code 1: a pair that selection takes can't be built.
    """
    sizes, sheet, where = _worlds(world), described_sheet(device), described_device(device)
    assert where is not None, "--device has a default"
    most = max_tokens or tokens
    if most < tokens:
        raise ValueError(f"--max-tokens {most} is below --tokens {tokens}; buffers must hold a step")
    kinds = layers_of(source, scheme)
    entries: list[Entry] = []
    with output.progress("planning", len(kinds) * len(sizes)) as advance:
        for layers in kinds:
            for size in sizes:
                entries.append(_entry(layers, size, spread, tokens, most, where, sheet))
                advance()
    if plot is not None:
        plan_output.draw(entries, plot)
        output.note(f"drawn: {plot}")
    comparison = None if measured is None else compare_with_measured(kinds, json.loads(measured.read_text()), where)
    if as_json:
        figures = {} if sheet is None else {name: attrs.asdict(figure) for name, figure in sheet.figures().items()}
        output.emit_json({
            "source": source, "device": device, "figures": figures, "spread": spread, "tokens": tokens,
            "max_tokens": most, "plans": [entry.to_dict() for entry in entries], "measured": comparison,
        })  # fmt: skip
    else:
        plan_output.show(entries, tokens, most, spread, device)
        if comparison is not None:
            plan_output.show_comparison(comparison)
    if any(entry.unbuildable for entry in entries):
        raise SystemExit(1)


def _entry(
    layers: Layers, world: int, spread: str, tokens: int, most: int, where: Device, sheet: Sheet | None
) -> Entry:
    if layers.own_gate:
        return Entry(layers=layers, world=world, refused="not planned: nothing is known of the module's own functions")
    try:
        problem = layers.problem(world, spread, most, where)
    except ValueError as error:
        return Entry(layers=layers, world=world, refused=str(error))
    return Entry(
        layers=layers,
        world=world,
        groups=groups(world, problem.parallel),
        problem=problem,
        pairs=tuple(pair_costs(problem, tokens)),
        sheet=sheet,
    )


def _worlds(text: str) -> list[int]:
    """ "8", "1,8,64", or "1..1024": the powers of two in between, and both ends."""
    first, dots, last = text.partition("..")
    numbers = [first, last] if dots else text.split(",")
    if not all(number.isascii() and number.isdigit() and 1 <= int(number) <= MOST_RANKS for number in numbers):
        raise ValueError(f"--world {text!r}: expected numbers from 1 to {MOST_RANKS}: 8, or 1,8,64, or 1..{MOST_RANKS}")
    if not dots:
        return sorted({int(number) for number in numbers})
    low, high = int(first), int(last)
    if low > high:
        raise ValueError(f"--world {text!r}: the first number is above the last; write {high}..{low}")
    powers = {1 << exponent for exponent in range(MOST_RANKS.bit_length())}
    return sorted({low, high} | {power for power in powers if low < power < high})


def compare_with_measured(kinds: Sequence[Layers], report: Any, where: Device) -> dict[str, Any]:
    """Predicted and measured times of the experts' step on one GPU, for the measured shapes that are planned here.

    Args:
        kinds: what is planned.
        report: what `python -m benchmarks.experts --json` writes.
        where: the device that is planned for.

    Raises:
        ValueError: the file is another one, or holds none of these shapes.
    """
    if not isinstance(report, dict) or not {"device", "shapes", "steps"} <= set(report):
        raise ValueError(
            "--measured: not the JSON of `python -m benchmarks.experts --json FILE`; measure again with it"
        )
    sheet = described_sheet(where.name)
    if sheet is None:
        raise ValueError(f"--measured: no figures for {where.name or where.type}; pass --device {', '.join(SHEETS)}")
    rows = []
    for layers in kinds:
        config = layers.config
        dims = {"hidden": config.hidden_size, "intermediate": config.intermediate_size,
                "experts": config.num_experts, "top_k": config.top_k}  # fmt: skip
        names = [name for name, shape in report["shapes"].items() if dims.items() <= shape.items()]
        for step in report["steps"]:
            if step["shape"] not in names or step["who"] != "moe-core" or "us" not in step:
                continue
            entry = _entry(layers, 1, "ep", step["tokens"], step["tokens"], where, sheet)
            pair = next(
                pair for pair in entry.costed if pair.cost and pair.cost.plan.activation_format.value == "standard"
            )
            floor = entry.times(pair).experts
            assert floor is not None, "bf16 has a figure on every sheet"
            rows.append({"shape": step["shape"], "tokens": step["tokens"], "predicted_us": floor * 1e6,
                         "measured_us": step["us"], "error": floor * 1e6 / step["us"] - 1})  # fmt: skip
    if not rows:
        known = ", ".join(f"{name} {shape}" for name, shape in report["shapes"].items())
        raise ValueError(f"--measured: none of its shapes is planned here; it holds {known}")
    return {"device": report["device"], "predicted_for": where.name, "steps": rows}
