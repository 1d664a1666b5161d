"""`moe-core shadow`: a model's real MoE layers beside a reference, and which stage is to blame where they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import rich.markup
import rich.table
import torch

from moe_core.checkpoint import Checkpoint
from moe_core.cli import output, swaps
from moe_core.cli.models import DTYPES, LoadedModel, LoadOptions, load_model
from moe_core.cli.options import dispatch_option, experts_option, json_option, real_device
from moe_core.cli.run import read_prompt
from moe_core.cli.swaps import Step, Verdict

SAMPLED = 4
"""Layers that are shadowed unless more are asked for."""
_ALLOWED = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_ALLOWED_MORE_QUANTIZED = 2e-2  # rows that fall on another side of a rounding border in the activations' format


@click.command(short_help="Compare a model's MoE layers with a reference, and name the stage that is wrong.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--prompt", help="The prompt as text, where the folder has a tokenizer.")
@click.option("--prompt-ids", metavar="IDS", help="The prompt as token ids, such as 1,2,3.")
@click.option("--layers", metavar="N|all|I,J", default=str(SAMPLED), show_default=True,
              help="How many, spread evenly; all; or which by number, such as 0,5 (for one: 5,).")  # fmt: skip
@click.option("--tolerance", type=click.FloatRange(min=0, min_open=True),
              help="Relative error allowed. Default: by the dtype; more where activations are quantized.")  # fmt: skip
@dispatch_option
@experts_option
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), help="Default: the checkpoint's own.")
@click.option("--device", metavar="DEVICE", help="cpu or cuda. Default: cuda where there is one.")
@json_option
@click.pass_context
def shadow(
    ctx: click.Context,
    folder: Path,
    prompt: str | None,
    prompt_ids: str | None,
    layers: str,
    tolerance: float | None,
    dispatch: str | None,
    experts: str | None,
    dtype: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Run a checkpoint folder once over a prompt, and each sampled MoE layer again by the reference.

    The reference is plain torch in fp32, with weights that are read anew from the folder. Each layer is judged on the
    input that it really got. Where one differs, the stages (dispatch, quantization, experts) are swapped one at a time
    for the reference's: the one whose swap mends the result is named. The exit code is 1 if a layer differs, else 0.
    """
    options = LoadOptions(
        dispatch=dispatch, experts=experts, dtype=DTYPES[dtype] if dtype else None, device=real_device(device)
    )
    loaded = load_model(folder, options)
    chosen = _sampled(list(loaded.plans), layers)
    steps = swaps.record(loaded.model, chosen, read_prompt(loaded, prompt, prompt_ids))
    verdicts = []
    with Checkpoint.open(folder) as checkpoint, output.progress("comparing with the reference", len(steps)) as advance:
        for step in steps:
            verdicts.append(swaps.judge(step, checkpoint, tolerance or _allowed(step)))
            advance()
    if as_json:
        output.emit_json({"folder": str(folder), "layers": [verdict.to_dict() for verdict in verdicts]})
    else:
        _show(loaded, steps, verdicts)
    if any(verdict.differs for verdict in verdicts):
        ctx.exit(1)


def _allowed(step: Step) -> float:
    more = 0.0 if step.plan.scheme.activation is None else _ALLOWED_MORE_QUANTIZED
    return _ALLOWED[step.plan.config.dtype] + more


def _sampled(modules: list[str], text: str) -> list[str]:
    """The experts modules that `--layers` names, in the model's order."""
    numbers = [part for part in text.replace(" ", "").split(",") if part]
    if text == "all":
        return modules
    if not numbers or not all(number.isascii() and number.isdigit() for number in numbers):
        raise ValueError(f"--layers {text!r}: expected a count, all, or numbers of layers such as 0,5 (for one: 5,)")
    if "," not in text:
        count = min(int(text), len(modules))
        if not count:
            raise ValueError("--layers 0: at least one layer is to be compared")
        return [modules[round(index * (len(modules) - 1) / max(count - 1, 1))] for index in range(count)]
    by_number = {int(found[0]): module for module in modules if (found := swaps.numbers_of(module))}
    unknown = [number for number in numbers if int(number) not in by_number]
    if unknown:
        raise ValueError(f"--layers {text!r}: no MoE layer {', '.join(unknown)}; there are {sorted(by_number)}")
    return [by_number[number] for number in sorted({int(number) for number in numbers})]


def _show(loaded: LoadedModel, steps: list[Step], verdicts: list[Verdict]) -> None:
    tokens = steps[0].tokens if steps else 0
    output.emit(
        f"{loaded.model.config.model_type} on {loaded.device}: {len(steps)} of {len(loaded.plans)} MoE layers beside "
        f"the reference, {tokens} tokens"
    )
    table = rich.table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("layer", "backends", "scheme", "relative error", "allowed", ""):
        table.add_column(column, justify="right" if column in ("relative error", "allowed") else "left", no_wrap=True)
    for verdict in verdicts:
        table.add_row(*(rich.markup.escape(cell) for cell in _row(verdict)))
    output.emit_table(table)
    for note in dict.fromkeys(note for verdict in verdicts for note in verdict.notes):
        output.emit(f"note: {note}")
    for verdict in verdicts:
        if verdict.differs:
            output.emit(f"\n{verdict.module} differs. Its error with stages of the reference in place of its own:")
            for names, error in verdict.swapped.items():
                output.emit(f"  {' and '.join(names):<28}  {error:.1e}")
            output.emit(f"→ {verdict.blame}")


def _row(verdict: Verdict) -> list[Any]:
    plan = verdict.plan
    pair = f"{plan.dispatch.name} + {' / '.join(dict.fromkeys(item.candidate.name for item in plan.ranges))}"
    if verdict.error is None:
        return [verdict.module, pair, plan.scheme.name, "–", "–", "not compared"]
    said = "DIFFERS" if verdict.differs else "ok"
    return [verdict.module, pair, plan.scheme.name, f"{verdict.error:.1e}", f"{verdict.allowed:.0e}", said]
