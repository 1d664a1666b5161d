"""Which architectures the bridge can serve, and the refusal of those it cannot."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import transformers

from moe_core.errors import UnsupportedError
from moe_core.integrations.transformers.foreign import experts_modules

_MARK = "@use_experts_implementation"
"""transformers' own test for whether a modeling file takes part (`_can_set_experts_implementation`)."""


@functools.cache
def supported_architectures() -> list[str]:
    """The model types of the installed transformers whose experts go through its experts interface, sorted.

    Reads the modeling files as text; imports none of them.
    """
    models = Path(transformers.__file__).parent / "models"
    return sorted({file.parent.name for file in models.glob("*/modeling_*.py") if _MARK in file.read_text("utf-8")})


def check_architecture(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The model's experts modules, by name.

    Raises:
        UnsupportedError: it has none, or also has experts that keep to code of their own.
    """
    name, found = type(model).__name__, experts_modules(model)
    kind = getattr(getattr(model, "config", None), "model_type", "unknown")
    outside = {
        type(module).__name__
        for path, module in model.named_modules()
        if path not in found and _holds_experts(module) and not any(path.startswith(f"{known}.") for known in found)
    }
    if found and not outside:
        return found
    which = f" ({', '.join(sorted(outside))})" if outside else ""
    hint = ""
    if any("Mxfp4" in item for item in outside):
        hint = "; load MXFP4 checkpoints with quantization_config=Mxfp4Config(dequantize=True)"
    raise UnsupportedError(
        f"{name} (model type {kind!r}) keeps its experts{which} out of transformers' experts interface, or has none, "
        f"so there is nothing that moe-core could run{hint}. Served are the architectures of transformers "
        f"{transformers.__version__} that use it: {', '.join(supported_architectures())}"
    )


def _holds_experts(module: torch.nn.Module) -> bool:
    """Fused experts, stored by a module that does not take part in the interface."""
    names = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    return any(name.startswith("gate_up_proj") and tensor.ndim >= 3 for name, tensor in names.items())
