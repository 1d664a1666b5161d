"""Can NIXL EP run here? Answered from metadata, file names and the driver library, without importing it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import platform
import sysconfig
from pathlib import Path

import torch

from moe_core.types import Availability
from moe_nixl_ep.limits import Version, parse_version

_DRIVER = "libcuda.so.1"


def module_names() -> tuple[str, str]:
    """Where the library may be, best first: its build for torch's CUDA, then the package that chooses a build."""
    major = (torch.version.cuda or "13").partition(".")[0]
    return f"nixl_ep_cu{major}", "nixl_ep"


def installed_version() -> Version | None:
    """The version of the wheel that is installed, or None."""
    major = (torch.version.cuda or "13").partition(".")[0]
    try:
        return parse_version(importlib.metadata.version(f"nixl-cu{major}"))
    except importlib.metadata.PackageNotFoundError:
        return None


def probe() -> Availability:
    """One line with everything that is missing."""
    missing = [reason for reason in (_build(), _library(), _driver()) if reason]
    return Availability(not missing, "; ".join(missing))


def _build() -> str | None:
    if torch.version.cuda is None:
        build = "ROCm" if torch.version.hip else "the CPU alone"
        return f"NIXL EP needs torch for CUDA, and torch {torch.__version__} is built for {build}"
    return None


def _library() -> str | None:
    """A package, and in it an extension for this torch and this Python."""
    wheel = module_names()[0].replace("nixl_ep_", "nixl-")
    found = [spec for name in module_names() if (spec := importlib.util.find_spec(name)) is not None]
    if not found:
        return f"the library is not installed: pip install {wheel}"
    extensions = [
        file.name
        for spec in found
        for folder in spec.submodule_search_locations or ()
        for file in Path(folder).glob("nixl_ep_cpp*.so")
    ]
    if not extensions:
        return f"{found[0].name} is installed without its CUDA part: pip install {wheel}"
    torch_minor = "".join(torch.__version__.split(".")[:2])
    suffix = sysconfig.get_config_var("EXT_SUFFIX") or ""
    if any(f"{stem}{suffix}" in extensions for stem in (f"nixl_ep_cpp_torch{torch_minor}", "nixl_ep_cpp")):
        return None
    here = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{found[0].name} holds {', '.join(sorted(extensions))}, and none is for {here}: install another {wheel}"


def _driver() -> str | None:
    try:
        ctypes.CDLL(_DRIVER)  # loads it, and initialises nothing
    except OSError:
        return f"there is no NVIDIA driver ({_DRIVER})"
    return None
