"""Times of calls on a device, for the tuner and the benchmarks."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]

BUSY_S = 30e-3
"""Seconds of work in one measurement on a GPU: a chip that has run for longer is hotter, and up to 12 % slower."""


def event_us(call: Call, repeats: int = 10, warmup: int = 2) -> float:
    """Median device time of one call on a GPU, by events."""
    for _ in range(warmup):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    for i in range(repeats):
        events[2 * i].record()
        call()
        events[2 * i + 1].record()
    torch.cuda.synchronize()
    return statistics.median(events[2 * i].elapsed_time(events[2 * i + 1]) * 1e3 for i in range(repeats))


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One graph of all calls, warmed up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def settle(seconds: float) -> None:
    """Let a GPU finish and cool."""
    torch.cuda.synchronize()
    time.sleep(seconds)


def step_us(calls: Sequence[Call], *, graph: bool, repeats: int = 10, pause: float = 0.5) -> float:
    """Median time of one of `calls` on a GPU: one step on several sets of inputs.

    Args:
        calls: each a whole step; all return without waiting for the device.
        graph: replay all of them as one CUDA graph; else call them in turn.
        repeats: measurements, fewer where they would take longer than `BUSY_S`.
        pause: seconds of rest before.
    """
    if graph:
        replay = capture(calls).replay
        settle(pause)
        once = event_us(replay, 1, 1)
        return event_us(replay, min(repeats, max(3, int(BUSY_S * 1e6 / once))), 0) / len(calls)
    for call in calls[:2]:
        call()
    once = event_us(calls[-1], 1, 0)
    settle(pause)
    rotating = itertools.cycle(calls)
    return event_us(lambda: next(rotating)(), min(2 * repeats, max(5, int(BUSY_S * 1e6 / once))), 1)


def host_us(calls: Sequence[Call], *, rounds: int = 7, at_least_s: float = 0.1) -> float:
    """Median time of one of `calls` on the host, where that is all there is (a CPU)."""
    times: list[float] = []
    rotating = itertools.cycle(calls)
    next(rotating)()
    end = time.perf_counter() + at_least_s
    while len(times) < rounds or time.perf_counter() < end:
        call = next(rotating)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6
