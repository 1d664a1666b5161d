"""`moe-core convert`: a checkpoint folder whose experts are packed, from one in floating point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import click

from moe_core.checkpoint import Checkpoint
from moe_core.checkpoint.converting import Conversion, Form
from moe_core.cli import output
from moe_core.forms import made_method
from moe_core.plugins import registry


@attrs.frozen
class _Format:
    """A format by the name of the scheme that runs it; the plugin that registers the scheme says what its bytes mean.

    Attributes:
        scheme: as registered.
        suffixes, config: as in `Form`.
    """

    scheme: str
    suffixes: dict[str, str]
    config: Callable[[list[str]], dict[str, Any]]


def _fp8_block(kept: list[str]) -> dict[str, Any]:
    """DeepSeek-V3's own."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": kept,
    }


def _nvfp4(kept: list[str]) -> dict[str, Any]:
    """compressed-tensors': weights only, because nobody has calibrated the activations."""
    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": kept,
    }


FORMATS = {
    "fp8-block": _Format("fp8_block", {"": "weight", "_scale": "weight_scale_inv"}, _fp8_block),
    "nvfp4": _Format(
        "nvfp4",
        {"": "weight_packed", "_scale": "weight_scale", "_inverse_global_scale": "weight_global_scale"},
        _nvfp4,
    ),
}


def form_of(name: str) -> Form:
    """A format by its name on the command line.

    Raises:
        UnsupportedError: no plugin registers its scheme.
    """
    chosen = FORMATS[name]
    weight = made_method(registry().find("quant_methods", chosen.scheme)).scheme.weight
    assert weight is not None, "a scheme of `FORMATS` packs weights"
    return Form(weight, chosen.suffixes, chosen.config)


@click.command(short_help="Write a checkpoint folder with packed experts.")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option("--to", "name", type=click.Choice(sorted(FORMATS)), required=True, help="The format of the experts.")
def convert(source: Path, target: Path, name: str) -> None:
    """Quantize the experts of the checkpoint folder SRC, and write the folder DST.

    fp8-block is DeepSeek-V3's form (128×128 blocks), nvfp4 that of compressed-tensors (4-bit weights, activations as
    they are): engines and libraries that know these forms read DST. Every other layer stays as it is, and the config
    says so. One expert is in memory at a time. DST appears whole, or not at all.
    """
    with Checkpoint.open(source) as checkpoint:
        conversion = Conversion(checkpoint, form_of(name))
        with output.progress("quantizing experts", conversion.num_experts) as on_expert:
            conversion.write(target, on_expert)
    before, after = checkpoint.num_bytes, conversion.num_bytes
    output.emit(
        f"{target}: {conversion.num_experts} experts packed; {output.mebibytes(before)} → {output.mebibytes(after)} "
        f"({after / before:.0%})\ntry: moe-core run {target}"
    )
