"""`moe-core demo`: small checkpoints of real architectures, run through plugins and compared with transformers."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import click
import rich.markup
import rich.table
import torch

from moe_core.build import plugins as list_plugins
from moe_core.cli import output
from moe_core.cli.convert import form_of
from moe_core.cli.demo_models import MODELS, DemoModel, write, write_packed
from moe_core.cli.generation import Comparison, compare, experts_effect
from moe_core.cli.measure import PeakMemory, one_thread
from moe_core.cli.models import LoadOptions, load_model, need_transformers
from moe_core.cli.options import json_option
from moe_core.cli.plan_text import backends, explain_plans
from moe_core.errors import UnsupportedError
from moe_core.plugins import registry

_PROMPT = tuple(range(3, 19))
_NEW_TOKENS = 12
_ROUNDS = 5
_MEANINGFUL = 100.0  # the experts must move the logits at least so many times more than the two sides differ


@attrs.frozen
class Row:
    """One line of the demo's table."""

    model: str
    shows: str
    backends: str
    comparison: Comparison
    effect: float
    peak_memory_bytes: int

    @property
    def ok(self) -> bool:
        """The same tokens, by experts that matter."""
        return self.comparison.tokens_equal and self.effect > _MEANINGFUL * self.comparison.logit_difference


@click.command(short_help="Run small checkpoints through plugins, beside transformers.")
@click.option(
    "--keep",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the checkpoints here and keep them.",
)
@json_option
@click.pass_context
def demo(ctx: click.Context, keep: Path | None, as_json: bool) -> None:
    """Write small checkpoints of real architectures and run each through plugins, beside transformers' own experts.

    Mixtral (sharded), Qwen3-MoE, DeepSeek-V3 and gpt-oss, with random weights, in fp32. Each goes the way of moe-core
    run. If the plugin moe-batched is installed, Mixtral runs behind it too; with moe-quant-fp8 and moe-quant-nvfp4 one
    is converted to each of their formats, and runs packed beside transformers on the same values. The exit code is 1 if
    any token differs.
    """
    need_transformers()
    start = time.perf_counter()
    rows: list[Row] = []
    with _folder(keep) as folder, one_thread():
        _announce()
        for model in MODELS:
            output.note(f"\n{model.name}: {model.shows}")
            target = folder / model.name.lower().replace(", ", "-")
            output.note(f"writing {target} …")
            if model.packed:
                rows += _packed_row(model, target)
                continue
            with output.progress_bars_of_transformers():
                write(model, target)
            rows.append(_row(model, target))
            if model is MODELS[0] and "batched" in registry().dispatch:
                output.note(f"\n{model.name}, behind the plugin moe-batched")
                rows.append(_row(model, target, dispatch="batched"))
    seconds = time.perf_counter() - start
    if keep is not None:
        output.note(f"\nkept; try: moe-core run {keep / MODELS[0].name.lower()} --compare")
    equal = all(row.ok for row in rows)
    if as_json:
        output.emit_json({"rows": [_as_dict(row) for row in rows], "equal": equal, "seconds": seconds})
    else:
        output.emit_table(_table(rows))
        verdict = "the same tokens everywhere" if equal else "NOT the same everywhere"
        output.emit(f"{verdict}, in {seconds:.0f} s; torch {torch.__version__}, one thread, fp32")
    if not equal:
        ctx.exit(1)


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """Where the checkpoints go. A kept folder must be new or empty: nothing of the user's is overwritten."""
    if keep is None:
        made = Path(tempfile.mkdtemp(prefix="moe-core-demo-"))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return
    if keep.is_dir() and any(keep.iterdir()):
        raise ValueError(f"--keep {keep}: the folder is not empty; name a new one")
    try:
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--keep {keep}: cannot be made ({error.strerror}); name a folder that can be written"
        ) from error
    yield keep


def _announce() -> None:
    if "batched" not in registry().dispatch:
        output.note("with the plugin moe-batched there is one row more: pip install moe-batched")
    for record in list_plugins():
        what = ", ".join(record.registers) or record.reason
        output.note(f"plugin {record.name} ({record.label}): {record.status}: {what}")


def _packed_row(model: DemoModel, folder: Path) -> list[Row]:
    """A packed checkpoint beside transformers on the same values; no row without the plugin that reads it."""
    try:
        form = form_of(model.packed)
    except UnsupportedError as error:
        output.note(f"left out: {error}")
        return []
    with tempfile.TemporaryDirectory(prefix="moe-core-demo-") as work, output.progress_bars_of_transformers():
        plain, values = Path(work) / "plain", Path(work) / "values"
        write(model, plain)
        write_packed(plain, folder, values, form)
        return [_row(model, folder, values=values)]


def _row(model: DemoModel, folder: Path, dispatch: str | None = None, values: Path | None = None) -> Row:
    """Run one checkpoint on both sides; `values` is what a packed one stands for, for transformers' side."""
    device = torch.device("cpu")  # the numbers are to be the same on every machine
    memory = PeakMemory(device)
    options = LoadOptions(dispatch=dispatch, scheme=model.scheme, dtype=torch.float32, device=device)
    loaded = load_model(folder, options)
    if values is not None:
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 - an extra

        loaded.beside = AutoModelForCausalLM.from_pretrained(values, dtype=torch.float32).eval()
    output.note(explain_plans(loaded.plans))
    with output.progress("generating", total=2 * (1 + _ROUNDS) * _NEW_TOKENS) as on_token:
        generation, comparison = compare(loaded, _PROMPT, _NEW_TOKENS, _ROUNDS, on_token)
    effect = experts_effect(loaded, [*_PROMPT, *generation.tokens])
    return Row(model.name, model.shows, backends(loaded.plans), comparison, effect, memory.num_bytes)


def _table(rows: list[Row]) -> rich.table.Table:
    table = rich.table.Table(box=None, pad_edge=False)
    for heading in ("model", "dispatch + experts"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "tokens\nequal",
        "largest logit\ndifference",
        "change with\nexperts zeroed",
        "ms/token\ntransformers",
        "ms/token\nmoe-core",
        "peak\nmemory",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        compared = row.comparison
        table.add_row(
            rich.markup.escape(row.model),
            rich.markup.escape(row.backends),
            "yes" if compared.tokens_equal else "NO",
            f"{compared.logit_difference:.1e}",
            f"{row.effect:.2f}",
            f"{compared.their_ms:.1f} ({compared.theirs})",
            f"{compared.our_ms:.1f}",
            output.mebibytes(row.peak_memory_bytes),
        )
    return table


def _as_dict(row: Row) -> dict[str, Any]:
    return attrs.asdict(row) | {"ok": row.ok}
