"""Can DeepGEMM run this, and here? Answered from metadata and files; the library itself is not imported.

Its wheels hold code that is built against one torch each, and import under another one only to fail at the first call,
so the pairs that were seen to run are listed here, by both versions.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from pathlib import Path

import torch

from moe_core.config import Problem
from moe_core.types import Availability, GateUpLayout

DISTRIBUTION = "sgl-deep-gemm"
FFI = ("apache-tvm-ffi", "0.1.11")

FP8_SCHEMES = frozenset({"fp8_block", "fp8_block_ue8m0"})
_BLOCK, _GROUP = (128, 128), (1, 128)

RUNS = {"2.11": "0.1.5"}
"""torch's minor version → the sgl-deep-gemm that runs with it. Measured on one H200 with torch 2.11.0 and CUDA 13.0;
there 0.1.7 to 0.2.2 fail at every call, and 0.2.3 and newer do not load."""


def refuse(problem: Problem) -> str | None:
    """What the library multiplies, beyond what the capability record can say."""
    if problem.device.compute_capability not in (None, (9, 0)):
        has = problem.device.compute_capability
        return f"written for compute capability 9.0 (Hopper), {problem.device.name} has {has[0]}.{has[1]}"
    weight, activation = problem.scheme.weight, problem.scheme.activation
    if weight is None or activation is None:
        return None
    if (weight.group_shape, activation.group_shape) != (_BLOCK, _GROUP):
        return f"weight blocks of {weight.group_shape}: multiplies blocks of {_BLOCK} with groups of {_GROUP}"
    if problem.config.activation.gate_up_layout is GateUpLayout.INTERLEAVED:
        return "interleaved gate and up rows: their blocks' scales would have to alternate within a block"
    return None


def probe() -> Availability:
    """Versions, platform and the CUDA compiler; touches no device."""
    reason = _complaint(torch.__version__, torch.version.cuda)
    return Availability(not reason, reason)


def _complaint(torch_version: str, cuda: str | None) -> str:
    known = "; ".join(f"{DISTRIBUTION} {wheel} with torch {series}" for series, wheel in RUNS.items())
    if sys.platform != "linux":
        return f"DeepGEMM has wheels for Linux only, this is {sys.platform}"
    if cuda is None:
        return f"torch {torch_version} is built without CUDA; known to run: {known}"
    wanted = RUNS.get(".".join(torch_version.split(".")[:2]))
    if wanted is None:
        return f"no wheel of {DISTRIBUTION} is known to run with torch {torch_version}; known to run: {known}"
    for name, version in ((DISTRIBUTION, wanted), FFI):
        found = _installed(name)
        if found != version:
            has = f"{name} {found} does not run with torch {torch_version}" if found else f"{name} is not installed"
            return f"{has}: pip install {DISTRIBUTION}=={wanted} (known to run: {known})"
    if _nvcc() is None:
        return (
            "DeepGEMM compiles its kernels when they are first used, and there is no nvcc: install the CUDA toolkit "
            "and let CUDA_HOME name its folder"
        )
    return ""


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvcc() -> Path | None:
    """The compiler, where the library itself will look for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is None and (found := shutil.which("nvcc")):
        return Path(found)
    compiler = Path(home or "/usr/local/cuda") / "bin" / "nvcc"
    return compiler if compiler.is_file() else None
