"""`moe-core explain`: what would run in each layer of a model, and why, from its config alone."""

from __future__ import annotations

from pathlib import Path

import click

from moe_core.cli import models, output
from moe_core.cli.options import described_device, dispatch_option, experts_option, json_option
from moe_core.cli.plan_text import explain_plans, group_plans


@click.command(short_help="Show what would run in each layer of a model, and why.")
@click.argument("source", metavar="DIR-or-config.json", type=click.Path(path_type=Path))
@dispatch_option
@experts_option
@click.option(
    "--device",
    metavar="DEVICE",
    help="Plan for cpu, for cuda (the one here), or for cuda:9.0 (a compute capability, also one that is not here).",
)
@json_option
def explain(source: Path, dispatch: str | None, experts: str | None, device: str | None, as_json: bool) -> None:
    """Show the plan of every MoE layer with its reasons, from the config alone: no weights are read.

    Layers with the same plan are shown once. Under the chosen pair of backends stands every other pair, with all the
    reasons why it was not chosen.
    """
    config = models.load_config(source)
    reading = models.prepare_config(source, config)
    if reading.note:
        output.note(reading.note)
    from moe_core.integrations.transformers import layer_plans  # noqa: PLC0415 - needs transformers

    if reading.scheme:
        config.quantization_config = None  # planned in its scheme, as `run` will
    plans = layer_plans(
        config, dispatch=dispatch, experts=experts, device=described_device(device), scheme=reading.scheme or None
    )
    if as_json:
        groups = [group.to_dict() for group in group_plans(plans)]
        output.emit_json({"source": str(source), "model_type": config.model_type, "groups": groups})
        return
    output.emit(f"{config.model_type}: {len(plans)} MoE layers")
    output.emit(explain_plans(plans))
