"""Watchdogs for vendor calls and kernels that wait without a timeout: they name rank and stage, and end the process.

A call or a kernel that waits for ever for a rank that is gone can't be interrupted from Python. The process that it
blocks can only be ended, so that the launcher sees it and the others' errors make sense.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

EXIT_CODE = 75
"""What a process that was ended here exits with (EX_TEMPFAIL: another try may go well)."""

End = Callable[[str], None]


def end_process(message: str) -> None:
    """Say why and where every thread stands, and end. No clean-up runs: it would wait for the same rank."""
    print(message, file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr)
    os._exit(EXIT_CODE)


@contextlib.contextmanager
def limited(stage: str, timeout_s: float, end: End = end_process) -> Iterator[None]:
    """Guard one call on the host, at build time.

    Args:
        stage: who waits in what, for the message: "rank 1 of 4 in connect".
        timeout_s: after so many seconds the process ends.
        end: what happens then.
    """
    timer = threading.Timer(timeout_s, end, (f"{stage}: not done within {timeout_s} s; {_ADVICE}",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_ADVICE = (
    "another rank died or never came, and this wait has no timeout of its own, so this process ends. Look at the other "
    "ranks' output, and start all ranks again"
)


class StepWatch:
    """Watches stages of a step whose kernels may spin for ever, also in graph replays, without a sync.

    Each stage has a counter on the device, which is raised as the stage begins and as it ends: odd means within. The
    counters are copied to host memory behind the stage's own kernels, and a thread looks at that memory. Counters that
    stand still with one of them odd are a stage that does not end.

    Args:
        who: who waits, for the message: "acme, rank 1 of 4".
        stages: their names, by index.
        timeout_s: how long a stage may take.
        device: where its kernels run.
        end: what happens then.
    """

    def __init__(
        self, who: str, stages: Sequence[str], timeout_s: float, device: torch.device, end: End = end_process
    ) -> None:
        self._counts = torch.zeros(len(stages), dtype=torch.int64, device=device)
        self._seen = self._counts
        if device.type != "cpu":
            self._seen = torch.zeros(len(stages), dtype=torch.int64, pin_memory=True)
        self._stages = self._counts.split(1)
        self._closed = threading.Event()
        arguments = (self._seen, self._closed, who, tuple(stages), timeout_s, end)
        threading.Thread(target=_watch, args=arguments, name=f"watchdog of {who}", daemon=True).start()

    @contextlib.contextmanager
    def stage(self, index: int) -> Iterator[None]:
        """The kernels that are launched within belong to this stage."""
        self._mark(index)
        try:
            yield
        finally:
            self._mark(index)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _mark(self, index: int) -> None:
        self._stages[index].add_(1)
        if self._seen is not self._counts:
            self._seen.copy_(self._counts, non_blocking=True)


def _watch(
    seen: torch.Tensor, closed: threading.Event, who: str, stages: Sequence[str], timeout_s: float, end: End
) -> None:
    last, since = seen.tolist(), time.monotonic()
    while not closed.wait(min(timeout_s / 8, 1.0)):
        now = seen.tolist()
        if now != last or not any(count % 2 for count in now):
            last, since = now, time.monotonic()
        elif time.monotonic() - since > timeout_s:
            within = ", ".join(stage for stage, count in zip(stages, now, strict=True) if count % 2)
            end(f"{who}: {within} not done within {timeout_s} s; {_ADVICE}")
            return
