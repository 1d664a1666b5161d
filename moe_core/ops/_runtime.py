"""How a kernel is launched cheaply: its constants are bound once, its compiled form is kept by the caller's key."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

Launch = Callable[[tuple[int, int, int], tuple[Any, ...]], None]


class KernelLaunch:
    """One jit kernel with its constants and options; calling it again costs a few microseconds of host time.

    Triton's own launch inspects every argument on every call. Here the caller says, by a key, when two calls may share
    a compiled kernel: equal keys must mean equal dtypes, equal constants and integers among the arguments (except those
    that the kernel does not specialise) and pointers on 16-byte borders.
    """

    __slots__ = ("_compiled", "_constants", "_kernel", "_launches", "_options", "_tail")

    def __init__(
        self, kernel: Any, constants: dict[str, Any], *, warps: int, stages: int = 3, pdl: bool = False,
        registers: int | None = None,
    ):  # fmt: skip
        self._kernel = kernel
        self._constants = constants
        self._options = {"num_warps": warps, "num_stages": stages}
        if pdl:
            self._options["launch_pdl"] = True
        if registers is not None:
            self._options["maxnreg"] = registers
        # Compiled kernels take the constants too, in the order of the signature; Gluon's may name an option among them.
        known = {**self._options, **constants}
        self._tail = tuple(known[name] for name in kernel.arg_names if name in known)
        self._compiled: dict[Hashable, Any] = {}
        self._launches: dict[Hashable, Launch] = {}

    def compile(self, key: Hashable, *args: Any) -> None:
        """What a call with this key and such arguments will launch; nothing runs."""
        self._compiled[key] = self._kernel.warmup(*args, grid=(1,), **self._constants, **self._options)

    def __call__(self, grid: tuple[int, int, int], key: Hashable, *args: Any) -> None:
        """Launches on the current stream; `key` None asks for Triton's own, slower path."""
        launch = self._launches.get(key)
        if launch is None and key in self._compiled:
            launch = self._launches[key] = _launch_of(self._compiled[key], self._tail)
        if launch is not None:
            launch(grid, args)
            return
        compiled = self._kernel[grid](*args, **self._constants, **self._options)
        # The interpreter returns None.
        if key is not None and compiled is not None:
            self._compiled[key] = compiled


def _launch_of(compiled: Any, tail: tuple[Any, ...]) -> Launch:
    """What `compiled[grid](*args, *tail)` does, in two thirds of the time: hooks are looked at, not called in vain."""
    from triton import knobs
    from triton.runtime import driver

    hooks, active = knobs.runtime, driver.active
    device_of, stream_of = active.get_current_device, active.get_current_stream
    # The first reading of `run` loads the kernel onto the device.
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def launch(grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            compiled[grid](*args, *tail)
            return
        run(*grid, stream_of(device_of()), function, metadata, None, None, None, *args, *tail)

    return launch
