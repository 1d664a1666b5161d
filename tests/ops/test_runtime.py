"""How a prepared kernel is launched, without a GPU: the calls are recorded."""

from __future__ import annotations

from typing import Any

import pytest

from moe_core.ops._compile import _Target
from moe_core.ops._runtime import KernelLaunch

triton = pytest.importorskip("triton")


class Compiled:
    """Of a compiled kernel what is used of it."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls

    def run(self, *arguments: Any) -> None:
        self.calls.append(("run", *arguments))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.calls.append(("whole", grid, *arguments))


class Kernel:
    arg_names = ("x", "SIZE", "num_warps")

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Compiled:
            self.calls.append(("jit", grid, *arguments, constants["SIZE"]))
            return Compiled(self.calls)

        return launch


@pytest.fixture
def launched() -> Any:
    """A prepared kernel and what was called, on a driver that needs no GPU."""
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Target(90))
    kernel = Kernel()
    yield KernelLaunch(kernel, {"SIZE": 7}, warps=4), kernel.calls
    driver.set_active(before)


def test_a_key_inspects_once_and_launches_directly_from_then_on(launched):
    launch, calls = launched
    for x in (1, 2, 3):
        launch((5, 6, 1), "key", x)
    direct = [("run", 5, 6, 1, 0, "function", "metadata", None, None, None, x, 7, 4) for x in (2, 3)]
    assert calls == [("jit", (5, 6, 1), 1, 7), *direct]
    launch((5, 6, 1), "another", 4)
    launch((5, 6, 1), None, 5)
    launch((5, 6, 1), None, 6)
    assert calls[3:] == [("jit", (5, 6, 1), x, 7) for x in (4, 5, 6)]


def test_hooks_that_a_profiler_sets_are_called(launched, monkeypatch):
    launch, calls = launched
    launch((5, 6, 1), "key", 1)
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    launch((5, 6, 1), "key", 2)
    assert calls[1:] == [("whole", (5, 6, 1), 2, 7, 4)]
