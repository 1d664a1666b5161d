"""Compiles kernels for a GPU that need not be there: launches on meta tensors stop after the compiler.

The tuner fills Triton's cache with it from several processes; a test compiles every path for sm_90 on a CPU machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moe_core.ops._runtime import KernelLaunch


class _Target:
    """What Triton asks its driver for while it compiles."""

    def __init__(self, arch: int):
        self._arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_only(arch: int = 90) -> Iterator[list[Any]]:
    """Within it every `KernelLaunch` call compiles and does not launch; yields the list of compiled kernels.

    For one thread of a process that launches nothing meanwhile: Triton's driver is exchanged.
    """
    from triton.runtime import driver

    compiled: list[Any] = []

    def compile_instead(self: KernelLaunch, grid: tuple[int, int, int], key: Any, *args: Any) -> None:
        compiled.append(self._kernel.warmup(*args, grid=grid, **self._constants, **self._options))

    # Not `reset_active` at the end: it looks for a GPU at once.
    driver_before, call_before = driver._active, KernelLaunch.__call__
    driver.set_active(_Target(arch))
    KernelLaunch.__call__ = compile_instead  # type: ignore[method-assign]
    try:
        yield compiled
    finally:
        driver.set_active(driver_before)
        KernelLaunch.__call__ = call_before  # type: ignore[method-assign]
