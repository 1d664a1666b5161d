"""Can MoRI run here? Answered from metadata, file names and torch's build, without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import torch

from moe_core.types import Availability
from moe_mori.limits import Version

_EXTENSION = "libmori_pybinds.so"


def installed_version() -> Version | None:
    """The version that is installed, "v1.2.1" or "1.2.1.dev3" as (1, 2, 1); None: none, or not told."""
    try:
        text = importlib.metadata.version("amd_mori")
    except importlib.metadata.PackageNotFoundError:
        return None
    numbers: list[int] = []
    for part in text.removeprefix("v").split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers) or None


def probe() -> Availability:
    """One line with everything that is missing."""
    missing = [reason for reason in (_build(), _library()) if reason]
    return Availability(not missing, "; ".join(missing))


def _build() -> str | None:
    if torch.version.hip is None:
        build = "CUDA" if torch.version.cuda else "the CPU alone"
        return f"MoRI needs torch for ROCm and an AMD GPU, and torch {torch.__version__} is built for {build}"
    return None


def _library() -> str | None:
    spec = importlib.util.find_spec("mori")
    if spec is None:
        return "the library (amd_mori) is not installed: pip install . in a checkout of github.com/ROCm/mori"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any(next(folder.rglob(_EXTENSION), None) for folder in folders):
        return f"mori is installed without its extension ({_EXTENSION}): build it on a machine with ROCm"
    return None
