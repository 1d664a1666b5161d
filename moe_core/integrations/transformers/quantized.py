"""What becomes of a quantized checkpoint before the bridge sees it: expanded, packed, or quietly ruined."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from moe_core.errors import UnsupportedError
from moe_core.types import Device

_EXPANDED_ALWAYS = ("compressed-tensors",)
_EXPANDED_WITHOUT_GPU = ("fp8", "mxfp4")
"""Formats that transformers expands to the model dtype while loading where it finds no kernel for them."""
_LOST_BY_TRANSFORMERS = "nvfp4-pack-quantized"
"""A compressed-tensors format whose second-level scale transformers drops while it expands experts."""


def refuse_lost_scales(who: str, config: Any) -> None:
    """Refuse a config whose checkpoint's scales do not survive loading, so that its weights are wrong in memory.

    Raises:
        UnsupportedError: naming the format and the kind of package that would read it.
    """
    method, asked = _quantization(config)
    if not asked:
        return
    if _never_read(method, config.quantization_config):
        raise UnsupportedError(
            f"{who}: its config says quantization_config.quant_method = {method!r}, which transformers by itself does "
            "not know: it loads the numbers and ignores their scales, so the weights are wrong. A plugin that reads "
            "the format is a package named moe-quant-…, and with it packed.from_pretrained beside this module loads "
            "the folder; without one, dequantize the checkpoint before loading it"
        )
    if method in _EXPANDED_ALWAYS and asked.get("format") == _LOST_BY_TRANSFORMERS:
        raise UnsupportedError(
            f"{who}: transformers drops the global scale of experts in format {_LOST_BY_TRANSFORMERS!r} while it "
            "expands them, so their weights are wrong; a plugin that reads it is a package named moe-quant-nvfp4, and "
            "with it packed.from_pretrained beside this module loads the folder"
        )


def _never_read(method: str, stored: Any) -> bool:
    """Nobody has a quantizer for it; or ours came too late, for a config that one has read is a dict no longer."""
    quantizer = AUTO_QUANTIZER_MAPPING.get(method)
    ours = quantizer is not None and quantizer.__module__.startswith("moe_core.")
    return quantizer is None or (ours and isinstance(stored, dict))


def loading_notes(config: Any, device: Device) -> tuple[str, ...]:
    """What transformers does to the checkpoint of this config on that device, for a plan's notes.

    Raises:
        UnsupportedError: the experts would stay packed there, or come out wrong.
    """
    who = type(config).__name__
    refuse_lost_scales(who, config)
    method, asked = _quantization(config)
    if not asked:
        return ()
    without_gpu = method in _EXPANDED_WITHOUT_GPU and device.type != "cuda"
    if method not in _EXPANDED_ALWAYS and not without_gpu and not asked.get("dequantize"):
        raise UnsupportedError(
            f"{who}: quantization_config.quant_method = {method!r} leaves packed experts on a {device.type} device, "
            "and no installed plugin has registered a scheme for them with the transformers bridge; a plugin that "
            "reads it is a package named moe-quant-…. To run without one, load with dequantize=True where "
            "transformers offers it for this format"
        )
    return (f"the checkpoint is stored as {method}; transformers expands it to the model dtype while it loads",)


def _quantization(config: Any) -> tuple[str, dict[str, Any]]:
    """(method, all of it) of a config's `quantization_config`; the second empty where there is none."""
    found = getattr(config, "quantization_config", None) or {}
    asked = dict(found) if isinstance(found, dict) else dict(found.to_dict())
    method = asked.get("quant_method")
    return str(getattr(method, "value", method)), asked
