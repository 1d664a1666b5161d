"""Can this machine do it? Asked of torch's features and of the driver's management library; CUDA is not initialised."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools

import attrs
import torch

from moe_core.types import Availability

_MANAGEMENT = "libnvidia-ml.so.1"
_P2P_WRITE = 1
"""Index of the peer capability "write" in the management library."""


@attrs.frozen
class Host:
    """What the driver says of this host.

    Attributes:
        gpus: how many it has; None: it doesn't say.
        apart: the first two that can't write into each other's memory, or None.
    """

    gpus: int | None = None
    apart: tuple[int, int] | None = None


def probe() -> Availability:
    """One line with everything that is missing."""
    missing = [reason for reason in (_build(), _features(), _driver()) if reason]
    return Availability(not missing, "; ".join(missing))


def _build() -> str | None:
    if torch.version.cuda is None:
        build = "ROCm" if torch.version.hip else "the CPU alone"
        return f"needs torch for CUDA, and torch {torch.__version__} is built for {build}"
    return None


def _features() -> str | None:
    missing = [
        name for name in ("torch.distributed._symmetric_memory", "triton") if importlib.util.find_spec(name) is None
    ]
    return f"there is no {' and no '.join(missing)} (torch {torch.__version__})" if missing else None


def _driver() -> str | None:
    if this_host().gpus == 0:
        return "there is no NVIDIA GPU"
    try:
        ctypes.CDLL("libcuda.so.1")  # loads it, and initialises nothing
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    apart = this_host().apart
    return f"GPUs {apart[0]} and {apart[1]} have no peer access to each other" if apart else None


@functools.cache
def this_host() -> Host:
    """Asked once per process, when a plan is first made. Where the driver does not answer, nothing is ruled out."""
    try:
        library = ctypes.CDLL(_MANAGEMENT)
    except OSError:
        return Host()
    count = ctypes.c_uint()
    if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return Host()
    try:
        return Host(count.value, _apart(library, count.value))
    finally:
        library.nvmlShutdown()


def _apart(library: ctypes.CDLL, gpus: int) -> tuple[int, int] | None:
    handles = [ctypes.c_void_p() for _ in range(gpus)]
    for index, handle in enumerate(handles):
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
            return None
    status = ctypes.c_int()
    for one, other in itertools.permutations(range(gpus), 2):
        failed = library.nvmlDeviceGetP2PStatus(handles[one], handles[other], _P2P_WRITE, ctypes.byref(status))
        if not failed and status.value != 0:
            return one, other
    return None
