"""How the weights of a quantized checkpoint are to be read, decided from its config before anything is loaded.

transformers ignores the scales of one format and drops a factor of another without an error (see `_REFUSED`), so what
is not known to be read right is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from moe_core.build import method_for_floats
from moe_core.checkpoint import Checkpoint, quantization_config
from moe_core.errors import MoEError, UnsupportedError
from moe_core.plugins import registry

_FP8_BLOCK_SCALE = ".weight_scale_inv"

_REFUSED = {
    ("modelopt", "FP8"): ("transformers would load it and ignore every scale", "moe-quant-fp8"),
    ("modelopt", "NVFP4"): ("transformers cannot load it", "moe-quant-nvfp4"),
    ("compressed-tensors", "nvfp4-pack-quantized"): (
        "transformers would load it without an error and drop the experts' global scales",
        "moe-quant-nvfp4",
    ),
    ("compressed-tensors", "float-quantized"): ("", "moe-quant-fp8"),
}
"""(method, format) → what goes wrong without a plugin, and the package that reads it."""


@attrs.frozen
class Reading:
    """How a checkpoint's weights are read.

    Attributes:
        note: what the user is told; "" where there is nothing to tell.
        dequantize: transformers is to expand the weights to the model dtype: "mxfp4" or "fp8"; "" if not.
        scheme: the scheme of the plugin that reads the format or quantizes to it; "" if none.
    """

    note: str = ""
    dequantize: str = ""
    scheme: str = ""


def decide(
    source: Path, values: Mapping[str, Any], checkpoint: Checkpoint | None = None, scheme: str | None = None
) -> Reading:
    """How to read a checkpoint.

    Args:
        source: the checkpoint folder, or a config file alone.
        values: the contents of config.json.
        checkpoint: its tensors, where shapes are to be checked too.
        scheme: what the experts are to run in; None: the first scheme that claims the format, and floating-point
            experts as they are.

    Raises:
        UnsupportedError: nothing that is installed reads its format; the text names the format, the reason and the
            package that would. Or floating-point weights can't be quantized to `scheme` while they load.
    """
    config = quantization_config(source, values)
    if config is None:
        return Reading() if scheme is None else _online(source, scheme)
    method, form = _method(config), _form(config)
    claimed, declined = _ask_plugins(config, scheme)
    if claimed is not None:
        return claimed
    if scheme is not None:
        raise UnsupportedError(
            "; ".join([f"{source}: weights in format {method} do not run in scheme {scheme!r}", *declined])
        )
    if method == "mxfp4":
        return Reading(
            "format mxfp4: no installed plugin reads it packed, so transformers dequantizes it; the experts then take "
            "four times the memory",
            dequantize="mxfp4",
        )
    if method == "fp8" and (block := _block(config)) is not None:
        if checkpoint is not None:
            _check_blocks(checkpoint, block)
        return Reading(
            f"format fp8 in blocks of {block[0]} x {block[1]}: no installed plugin reads it packed, so transformers "
            "dequantizes it; the weights then take twice the memory",
            dequantize="fp8",
        )
    why, package = _REFUSED.get((method, form), ("", ""))
    told = [f"{source}: weights in format {method}" + (f" ({form})" if form else "")]
    told.append("no installed plugin reads it" + (f", and {why}" if why else ""))
    told += declined
    install = f"pip install {package} reads it" if package else "use a checkpoint in another format (bf16, say)"
    raise UnsupportedError("; ".join([*told, install]))


def transformers_config(reading: Reading) -> Any:
    """The quantization config that tells transformers to dequantize, or None.

    Raises:
        MoEError: transformers needs a package for it that is missing.
    """
    if not reading.dequantize:
        return None
    from transformers import FineGrainedFP8Config, Mxfp4Config  # noqa: PLC0415 - an extra
    from transformers.utils import is_accelerate_available  # noqa: PLC0415 - an extra

    if reading.dequantize == "mxfp4":
        return Mxfp4Config(dequantize=True)
    if not is_accelerate_available():
        raise MoEError("transformers' dequantization of fp8 needs accelerate: pip install accelerate")
    return FineGrainedFP8Config(dequantize=True)


def _online(source: Path, scheme: str) -> Reading:
    """Floating-point experts that are quantized while they load."""
    try:
        method = method_for_floats(scheme)
    except UnsupportedError as error:
        raise UnsupportedError(f"{source}: {error}") from error
    if method.scheme.weight is None:
        return Reading()
    entry = registry().find("quant_methods", scheme)
    return Reading(
        f"experts are quantized while they load, to scheme {scheme} of {entry.plugin}",
        scheme=scheme,
    )


def _method(config: Mapping[str, Any]) -> str:
    return str(config.get("quant_method") or "unnamed").lower()


def _form(config: Mapping[str, Any]) -> str:
    return str(config.get("quant_algo") or config.get("format") or config.get("fmt") or "")


def _block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    block = config.get("weight_block_size")
    if config.get("expert_dtype") not in (None, "fp8") or not isinstance(block, list | tuple) or len(block) != 2:
        return None
    return int(block[0]), int(block[1])


def _check_blocks(checkpoint: Checkpoint, block: tuple[int, int]) -> None:
    """transformers takes the block size from the scales' grid, which is another one where a block is not full."""
    for info in checkpoint.infos:
        if not info.name.endswith(_FP8_BLOCK_SCALE):
            continue
        weight = info.name.removesuffix("_scale_inv")
        if weight in checkpoint and any(n % b for n, b in zip(checkpoint.shape(weight)[-2:], block, strict=True)):
            raise UnsupportedError(
                f"{checkpoint.folder}: tensor {weight!r} of shape {checkpoint.shape(weight)} is no multiple of its fp8 "
                f"blocks {block}, and transformers dequantizes such wrongly; pip install moe-quant-fp8 reads it"
            )


def _ask_plugins(config: Mapping[str, Any], scheme: str | None) -> tuple[Reading | None, list[str]]:
    """The first scheme (or the one that is asked for) that claims the format, or every plugin's reason against it."""
    entries, declined = registry().quant_methods, []
    if scheme is not None:
        entries = {scheme: registry().find("quant_methods", scheme)}
    for entry in entries.values():
        if entry.from_checkpoint_config is None:
            continue
        answer = entry.from_checkpoint_config(config)
        if isinstance(answer, str):
            declined.append(f"{entry.scheme} ({entry.plugin}): {answer}")
            continue
        return Reading(
            f"format {_method(config)}: experts stay packed, in scheme {answer.scheme.name} of {entry.plugin}",
            "",
            answer.scheme.name,
        ), []
    return None, declined
