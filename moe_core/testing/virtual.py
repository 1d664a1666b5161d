"""Virtual ranks: W ranks of one layer as W threads of one process, over memory that they share.

A `VirtualGroup` is a `Group` (see `interfaces.py`) like any other, so a dispatch backend, a placement or a runner is
tested with several ranks without GPUs, processes or a launcher. Results do not depend on how the threads are
scheduled: what arrives is ordered by rank, and sums are taken in rank order, in the tensor's own dtype.

Shape letters: W ranks · N rows.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import attrs
import torch

from moe_core.errors import MoEError

_STAGES = ("prepare", "prepare_start", "finalize", "finalize_start", "forward")
"""Methods whose name says to a reader in which stage of a layer a collective stands."""


class RankFault(MoEError):
    """A collective could not be completed; the text names the ranks and the stage."""


class RankDropped(MoEError):
    """What the dropped rank itself ends with (see `Faults.drop`)."""


@attrs.frozen(kw_only=True)
class Faults:
    """What goes wrong, on which rank. Reproducible: everything random is drawn from `seed`, rank and call number.

    Attributes:
        delay: rank → seconds that it comes late to every collective.
        drop: rank → number of its collective (from 0) at which it vanishes without a word.
        jitter: upper bound, in seconds, of a random wait before and after every collective of every rank: ranks
            arrive, and go on, in another order each time.
        seed: of the random waits.
    """

    delay: Mapping[int, float] = attrs.field(factory=dict)
    drop: Mapping[int, int] = attrs.field(factory=dict)
    jitter: float = 0.0
    seed: int = 0

    def before(self, rank: int, number: int) -> None:
        """Called by `rank` before its collective `number`."""
        if self.drop.get(rank) == number:
            raise RankDropped(f"virtual rank {rank} was dropped at its collective {number}")
        self._wait(rank, 2 * number, self.delay.get(rank, 0.0))

    def after(self, rank: int, number: int) -> None:
        """Called by `rank` after its collective `number`."""
        self._wait(rank, 2 * number + 1, 0.0)

    def _wait(self, rank: int, moment: int, at_least: float) -> None:
        wait = at_least
        if self.jitter:
            wait += random.Random(f"{self.seed} {rank} {moment}").uniform(0.0, self.jitter)
        if wait:
            time.sleep(wait)


class VirtualStore:
    """A key-value store with the methods of `torch.distributed.Store` that plugins use."""

    def __init__(self, timeout_s: float) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._timeout_s = timeout_s

    def set(self, key: str, value: bytes | str) -> None:
        with self._changed:
            self._values[key] = value.encode() if isinstance(value, str) else bytes(value)
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        """The value, as soon as it is there."""
        self.wait([key])
        return self._values[key]

    def add(self, key: str, amount: int) -> int:
        """Add to a number that starts at 0; the sum. Atomic."""
        with self._changed:
            total = int(self._values.get(key, b"0")) + amount
            self._values[key] = str(total).encode()
            self._changed.notify_all()
            return total

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Until all keys are there.

        Raises:
            TimeoutError: naming those that did not come.
        """
        seconds = self._timeout_s if timeout is None else timeout.total_seconds()
        with self._changed:
            if not self._changed.wait_for(lambda: all(key in self._values for key in keys), seconds):
                missing = [key for key in keys if key not in self._values]
                raise TimeoutError(f"virtual store: keys {missing} were not set within {seconds} s")


@attrs.define(eq=False)
class _Meeting:
    """One collective, to which every rank brings something.

    Attributes:
        name: which collective, and what all ranks must agree on about it.
        first: the rank that was there first.
        brought: rank → what it brought.
        left: ranks that have read everything.
    """

    name: str
    first: int
    brought: dict[int, Any] = attrs.field(factory=dict)
    left: int = 0


class _World:
    """The memory that W virtual ranks share."""

    def __init__(self, size: int, faults: Faults, timeout_s: float) -> None:
        self.size, self.faults, self.timeout_s = size, faults, timeout_s
        self.store = VirtualStore(timeout_s)
        self._arrival = threading.Condition()
        self._meetings: dict[int, _Meeting] = {}
        self._failure: str | None = None
        self._parts: dict[tuple[int, ...], _World] = {}

    def part(self, ranks: tuple[int, ...]) -> _World:
        """The world of some of these ranks; the same object for all who ask. Faults are of the whole world's ranks."""
        with self._arrival:
            if ranks not in self._parts:
                faults = attrs.evolve(
                    self.faults,
                    delay={ranks.index(r): s for r, s in self.faults.delay.items() if r in ranks},
                    drop={},  # calls are counted per group, and `drop` speaks of the whole group's
                )
                self._parts[ranks] = _World(len(ranks), faults, self.timeout_s)
            return self._parts[ranks]

    def fail(self, reason: str) -> None:
        """A rank ended with an error of its own: nobody waits for it any longer."""
        with self._arrival:
            self._failure = self._failure or reason
            parts = list(self._parts.values())
            self._arrival.notify_all()
        for part in parts:
            part.fail(reason)

    def meet(self, rank: int, number: int, name: str, stage: str, brought: Any) -> list[Any]:
        """Bring something to collective `number`; what all ranks brought, in rank order."""
        self.faults.before(rank, number)
        with self._arrival:
            meeting = self._meetings.setdefault(number, _Meeting(name, rank))
            if meeting.name != name:
                reason = (
                    f"the ranks' collectives are out of order: as collective {number}, rank {rank} called {name} "
                    f"({stage}) and rank {meeting.first} called {meeting.name}"
                )
                self._failure = self._failure or reason
                self._arrival.notify_all()
                raise RankFault(reason)
            meeting.brought[rank] = brought
            self._arrival.notify_all()
            self._arrival.wait_for(lambda: len(meeting.brought) == self.size or bool(self._failure), self.timeout_s)
            if len(meeting.brought) < self.size:
                raise RankFault(self._absent(rank, meeting, number, stage))
            everything = [meeting.brought[r] for r in range(self.size)]
            meeting.left += 1
            if meeting.left == self.size:
                del self._meetings[number]
        self.faults.after(rank, number)
        return everything

    def _absent(self, rank: int, meeting: _Meeting, number: int, stage: str) -> str:
        missing = sorted(set(range(self.size)) - set(meeting.brought))
        who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {missing}"
        why = f": {self._failure}" if self._failure else f" within {self.timeout_s} s"
        return f"rank {rank} waits in {stage}: {who} did not come to {meeting.name} (collective {number}){why}"


class VirtualGroup:
    """One rank's view of W virtual ranks: a `Group`. Made by `run_on_ranks`.

    Attributes:
        rank, size: as in `Group`.
        calls: collectives that this rank has entered.
        timeout_s: how long a collective waits for the others.
    """

    torch_group: Any | None = None

    def __init__(self, world: _World, rank: int) -> None:
        self._world = world
        self.rank, self.size = rank, world.size
        self.timeout_s = world.timeout_s
        self.calls = 0

    @property
    def store(self) -> VirtualStore:
        return self._world.store

    def subgroup(self, ranks: Sequence[int]) -> VirtualGroup:
        """The group of some of these ranks (of this one among them), in the given order. No communication."""
        if self.rank not in ranks:
            raise ValueError(f"VirtualGroup.subgroup({list(ranks)}) was asked by rank {self.rank}, which is not in it")
        return VirtualGroup(self._world.part(tuple(ranks)), list(ranks).index(self.rank))

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Summed in rank order, in the dtype of `tensor`."""
        return _sum(self._meet(f"all_reduce of {_described(tensor)}", tensor.clone()))

    def all_gather(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        sizes = sizes or [tensor.shape[0]] * self.size
        self._check("all_gather", tensor.shape[0], sizes[self.rank], f"sizes = {sizes}")
        return torch.cat(self._meet(f"all_gather of {_row(tensor)} with sizes {sizes}", tensor.clone()))

    def reduce_scatter(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        """Summed in rank order, in the dtype of `tensor`."""
        sizes = sizes or [tensor.shape[0] // self.size] * self.size
        self._check("reduce_scatter", tensor.shape[0], sum(sizes), f"sizes = {sizes}")
        parts = [
            whole.split(sizes)[self.rank]
            for whole in self._meet(f"reduce_scatter of {_described(tensor)}", tensor.clone())
        ]
        return _sum(parts)

    def all_to_all(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        self._check("all_to_all", tensor.shape[0], sum(send), f"send = {send}")
        sent = self._meet(f"all_to_all of {_row(tensor)}", tensor.clone().split(send))
        parts = [from_rank[self.rank] for from_rank in sent]
        for rank, (part, expected) in enumerate(zip(parts, receive, strict=True)):
            self._check(f"all_to_all, from rank {rank}", part.shape[0], expected, f"receive = {receive}")
        return torch.cat(parts)

    def barrier(self) -> None:
        self._meet("barrier", None)

    def _meet(self, name: str, brought: Any) -> list[Any]:
        number, self.calls = self.calls, self.calls + 1
        return self._world.meet(self.rank, number, name, _stage(), brought)

    def _check(self, what: str, rows: int, expected: int, by: str) -> None:
        """A real collective would hang or write past a buffer."""
        if rows != expected:
            raise ValueError(f"{what} on rank {self.rank}: {rows} rows, but {by} says {expected}")


def run_on_ranks(
    size: int,
    work: Callable[..., Any],
    *arguments: Any,
    faults: Faults | None = None,
    timeout_s: float = 30.0,
    return_errors: bool = False,
) -> list[Any]:
    """Call `work(group, *arguments)` on W virtual ranks at once.

    Args:
        size: W.
        work: what each rank does; gets its `VirtualGroup`.
        arguments: the same objects for every rank.
        faults: what goes wrong.
        timeout_s: how long a collective, or a look into the store, waits for the other ranks.
        return_errors: an exception stands in its rank's place among the results, instead of being raised.

    Returns:
        the ranks' results, in rank order.

    Raises:
        whatever a rank raised: the first error that is not just another rank's echo.
    """
    world = _World(size, faults or Faults(), timeout_s)
    results: list[Any] = [None] * size
    errors: dict[int, BaseException] = {}

    def body(rank: int) -> None:
        try:
            results[rank] = work(VirtualGroup(world, rank), *arguments)
        except BaseException as error:  # noqa: BLE001 - carried to the caller's thread
            errors[rank] = error
            if not isinstance(error, RankDropped):  # a dropped rank is silent: the others must find out
                world.fail(f"rank {rank} ended with {type(error).__name__}: {error}")

    threads = [threading.Thread(target=body, args=(rank,), name=f"virtual rank {rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if return_errors:
        return [errors.get(rank, result) for rank, result in enumerate(results)]
    if errors:
        causes = [error for _, error in sorted(errors.items()) if not isinstance(error, RankFault | RankDropped)]
        raise causes[0] if causes else errors[min(errors)]
    return results


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _described(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _row(tensor: torch.Tensor) -> str:
    """What must agree between ranks whose numbers of rows may differ."""
    return f"(N, {', '.join(map(str, tensor.shape[1:]))}) {tensor.dtype}"


def _stage() -> str:
    """The method of a layer that called the collective, for messages."""
    frame = sys._getframe(2)
    caller = frame.f_back.f_code.co_name if frame.f_back else "?"
    step = frame.f_back
    while step is not None:
        if step.f_code.co_name in _STAGES:
            return step.f_code.co_name
        step = step.f_back
    return caller
