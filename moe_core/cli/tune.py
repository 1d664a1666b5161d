"""`moe-core tune`: measures, on this machine, which experts with which launch parameters are the fastest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import click
import rich.table
import torch

from moe_core.build import plan as plan_layer
from moe_core.cli import models, output
from moe_core.cli.bench_layer import SHAPES, parse_shape
from moe_core.cli.models import DTYPES
from moe_core.cli.options import dispatch_option, json_option, real_device
from moe_core.config import MoEConfig
from moe_core.quant import UNQUANTIZED
from moe_core.ranges import contenders
from moe_core.select import Plan
from moe_core.tuned import Tuned, read_tuned
from moe_core.tuner import TOKENS, Tuner, nothing_to_tune

CPU_TOKENS = (1, 16, 128, 512)


@attrs.frozen
class _Layer:
    """One layer to be tuned: a title for people, and whether its weights' columns are contiguous."""

    title: str
    plan: Plan
    transposed: bool


@click.command(short_help="Measure which experts and launch parameters are the fastest on this machine.")
@click.argument("source", metavar="[DIR-or-config.json]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME|H,I,E,K",
    help=f"In place of a model: a named shape ({', '.join(SHAPES)}) or four numbers; may be repeated.",
)
@click.option("--scheme", help="The quantization scheme of the shapes; default: unquantized.")
@click.option(
    "--dtype", type=click.Choice(sorted(DTYPES)), default="bfloat16", show_default=True, help="Of the shapes."
)
@click.option("--transposed", is_flag=True, help="The shapes' weights have contiguous columns, as gpt-oss has them.")
@click.option("--tokens", multiple=True, type=click.IntRange(1), metavar="T", help="Default: 1 to 16384 in fours.")
@click.option("--device", metavar="DEVICE", help="cpu or cuda; default: cuda where there is one.")
@dispatch_option
@click.option("--no-search", is_flag=True, help="Only choose among backends; keep the launch parameters as they are.")
@click.option("--again", is_flag=True, help="Measure anew what was measured before.")
@json_option
def tune(
    source: Path | None,
    shapes: tuple[str, ...],
    scheme: str | None,
    dtype: str,
    transposed: bool,
    tokens: tuple[int, ...],
    device: str | None,
    dispatch: str | None,
    no_search: bool,
    again: bool,
    as_json: bool,
) -> None:
    """Measure the MoE layers of a model, or named shapes, with random weights; plans made from then on use the result.

    At each T every experts backend that may stand in the plan is compared with the reference and timed, after a search
    for its best launch parameters where it has any. Results go into a table in your cache, one file per layer, device
    and scheme. An interrupted run goes on where it ended. `moe-core explain` shows what a plan was chosen by.
    """
    if (source is None) == (not shapes):
        raise ValueError("moe-core tune takes either a model's folder or --shape: pass one of the two")
    target = real_device(device)
    if source is not None:
        layers = _layers_of_model(source, dispatch, target)
    else:
        layers = [_layer_of_shape(text, scheme, dtype, dispatch, target, transposed) for text in shapes]
    asked = tokens or (TOKENS if target.type == "cuda" else CPU_TOKENS)
    results: list[tuple[_Layer, Tuned]] = []
    for layer in layers:
        if why_not := nothing_to_tune(layer.plan):
            output.note(f"{layer.title}: nothing to tune: {why_not}")
            continue
        if complaint := read_tuned(layer.plan.problem).complaint:
            output.note(f"{complaint} (it will be replaced)")
        with output.progress(f"tuning {layer.title}", len(set(asked))) as step:
            tuner = Tuner(
                layer.plan, target, transposed=layer.transposed, search=not no_search, again=again, tell=output.note
            )
            results.append((layer, tuner.run(asked, step)))
    if as_json:
        output.emit_json({"layers": [_to_dict(layer, tuned) for layer, tuned in results]})
        return
    for layer, tuned in results:
        output.emit(_title(layer))
        output.emit_table(_table(layer, tuned))
        for line in _ranges(layer.plan):
            output.emit(line)
        output.emit(f"stored in {tuned.source}")


def _layer_of_shape(
    text: str, scheme: str | None, dtype: str, dispatch: str | None, device: torch.device, transposed: bool
) -> _Layer:
    shape = parse_shape(text)
    config = MoEConfig(
        num_experts=shape.experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        dtype=DTYPES[dtype],
    )
    return _Layer(shape.name, plan_layer(config, scheme=scheme, dispatch=dispatch, device=device), transposed)


def _layers_of_model(source: Path, dispatch: str | None, device: torch.device) -> list[_Layer]:
    """One of each kind of MoE layer that the model has."""
    config = models.load_config(source)
    reading = models.prepare_config(source, config)
    if reading.note:
        output.note(reading.note)
    if reading.scheme:
        config.quantization_config = None  # planned in its scheme, as `run` will
    from moe_core.integrations.transformers import BridgePlan, layer_plans  # noqa: PLC0415 - needs transformers

    plans = layer_plans(config, dispatch=dispatch, device=device, scheme=reading.scheme or None)
    transposed = _transposed_layers(config)
    found: dict[Any, _Layer] = {}
    for name, made in plans.items():
        if isinstance(made, BridgePlan) and made.own_gate:
            output.note(f"{name}: nothing to tune: it runs by its module's own functions")
            continue
        kind = (made.problem, name in transposed)
        if kind not in found:
            found[kind] = _Layer(f"{config.model_type} {name}", made, name in transposed and made.scheme == UNQUANTIZED)
    return list(found.values())


def _transposed_layers(config: Any) -> set[str]:
    """The experts modules whose parameters transformers stores with contiguous columns."""
    import transformers  # noqa: PLC0415 - an extra

    from moe_core.integrations.transformers import experts_modules  # noqa: PLC0415 - needs transformers

    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:  # another kind of model: none of those stores its experts so
        return set()
    return {name for name, module in experts_modules(model).items() if module.is_transposed}


def _title(layer: _Layer) -> str:
    of = layer.plan.to_dict()["layer"]
    sizes = f"H {of['hidden_size']}, I {of['intermediate_size']}, E {of['num_experts']}, K {of['top_k']}"
    return f"{layer.title} ({sizes}, {of['dtype']}, {of['scheme']}) on {of['device']}, microseconds:"


def _table(layer: _Layer, tuned: Tuned) -> rich.table.Table:
    table = rich.table.Table(box=None)
    rivals = contenders(layer.plan.fitting)
    for heading in ("rows", *(candidate.name for candidate in rivals)):
        table.add_column(heading, justify="right")
    for point in tuned.of(layer.plan.activation_format).points:
        times = [point.microseconds.get(candidate.label) for candidate in rivals]
        cells = [
            f"{time:,.1f}" if time is not None else point.failures.get(candidate.label, "not measured")
            for time, candidate in zip(times, rivals, strict=True)
        ]
        table.add_row(str(point.rows), *cells)
    return table


def _ranges(plan: Plan) -> list[str]:
    """What plans of this layer are from now on."""
    now = plan_layer(
        plan.config, parallel=plan.problem.parallel, scheme=plan.scheme, dispatch=plan.dispatch.name,
        device=plan.problem.device, routing_is_external=plan.problem.routing_is_external,
    )  # fmt: skip
    return [f"from {item.first_row} rows: {item.candidate.name} ({item.why})" for item in now.ranges]


def _to_dict(layer: _Layer, tuned: Tuned) -> dict[str, Any]:
    measured = tuned.of(layer.plan.activation_format)
    return {
        "layer": layer.plan.to_dict()["layer"],
        "title": layer.title,
        "format": layer.plan.activation_format.value,
        "file": tuned.source,
        "date": tuned.date,
        "points": [attrs.asdict(point) for point in measured.points],
        "launch": measured.launch,
    }
