"""Time and memory, as `run` and `demo` report them."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # see proc(5): resets the peak resident set size


class PeakMemory:
    """The peak since construction: of the GPU's allocator on CUDA, of the process's resident memory on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._resets = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK)
            self._resets = True
        except OSError:  # no such file outside Linux, or no right to it: then the peak is that of the whole process
            self._resets = False

    @property
    def num_bytes(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        if self._resets and (found := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())):
            return int(found[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kilobytes on Linux

    @property
    def kind(self) -> str:
        return "GPU allocator" if self._device.type == "cuda" else "resident memory of the process"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one CPU thread.

    For small models: their operators are too short to be shared out, and where the cores are busy with other work,
    threads that wait for one another make each token tens of times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock that is read next means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
