"""How a kernel is launched cheaply: its constants are bound once, its compiled form is kept by the caller's key."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


class KernelLaunch:
    """One jit kernel with its constants and options; calling it again costs a few microseconds of host time.

    Triton's own launch inspects every argument on every call. Here the caller says, by a key, when two calls may share
    a compiled kernel: equal keys must mean equal dtypes, equal constants and integers among the arguments (except those
    that the kernel does not specialise) and pointers on 16-byte borders.
    """

    __slots__ = ("_compiled", "_constants", "_kernel", "_options", "_tail")

    def __init__(self, kernel: Any, constants: dict[str, Any], *, warps: int, stages: int = 3, pdl: bool = False):
        self._kernel = kernel
        self._constants = constants
        self._options = {"num_warps": warps, "num_stages": stages}
        if pdl:
            self._options["launch_pdl"] = True
        # Compiled kernels take the constants too, in the order of the signature; Gluon's may name an option among them.
        known = {**self._options, **constants}
        self._tail = tuple(known[name] for name in kernel.arg_names if name in known)
        self._compiled: dict[Hashable, Any] = {}

    def compile(self, key: Hashable, *args: Any) -> None:
        """What a call with this key and such arguments will launch; nothing runs."""
        self._compiled[key] = self._kernel.warmup(*args, grid=(1,), **self._constants, **self._options)

    def __call__(self, grid: tuple[int, int, int], key: Hashable, *args: Any) -> None:
        """Launches on the current stream; `key` None asks for Triton's own, slower path."""
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*args, *self._tail)
            return
        compiled = self._kernel[grid](*args, **self._constants, **self._options)
        # The interpreter returns None.
        if key is not None and compiled is not None:
            self._compiled[key] = compiled
