"""Virtual ranks: W ranks of one layer as W threads of one process, over memory that they share.

A `VirtualGroup` is a `Group` (see `interfaces.py`) like any other, so a dispatch backend, a placement or a runner is
tested with several ranks without GPUs, processes or a launcher. Results do not depend on how the threads are
scheduled: what arrives is ordered by rank, and sums are taken in rank order, in the tensor's own dtype.

Shape letters: W ranks · N rows.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

import attrs
import torch

from moe_core.errors import CollectiveError, MoEError
from moe_core.interfaces import Finish

_STAGES = {
    "prepare": "prepare",
    "prepare_start": "prepare",
    "finalize": "finalize",
    "finalize_start": "finalize",
    "forward": "forward",
}
"""Methods whose name says to a reader in which stage of a layer a collective stands."""


class RankFault(CollectiveError):
    """A collective could not be completed; the text names the ranks and the stage."""

    def during(self, stage: str) -> None:
        """The text names it already."""


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

    def bring(self, rank: int, number: int, name: str, stage: str, brought: Any) -> _Meeting:
        """Enter collective `number` with something, without waiting for anybody."""
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
        return meeting

    def collect(self, rank: int, number: int, stage: str, meeting: _Meeting) -> list[Any]:
        """Wait for everybody at collective `number`; what all ranks brought, in rank order."""
        with self._arrival:
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


@attrs.define
class _Traffic:
    """Bytes that one rank received."""

    received: int = 0


class VirtualGroup:
    """One rank's view of W virtual ranks: a `Group`. Made by `run_on_ranks`.

    Attributes:
        rank, size: as in `Group`.
        calls: collectives that this rank has entered.
        timeout_s: how long a collective waits for the others.
    """

    torch_group: Any | None = None

    def __init__(self, world: _World, rank: int, traffic: _Traffic | None = None) -> None:
        self._world = world
        self._traffic = traffic or _Traffic()
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
        return VirtualGroup(self._world.part(tuple(ranks)), list(ranks).index(self.rank), self._traffic)

    @property
    def received_bytes(self) -> int:
        """What collectives, those of subgroups too, brought this rank from others.

        Of a reduce-scatter the parts that are summed count, of an all-reduce those and the other ranks' sums.
        """
        return self._traffic.received

    @contextlib.contextmanager
    def emulating(self) -> Iterator[None]:
        """What is moved meanwhile stands for a library's own traffic, in another size: it is not counted."""
        before = self._traffic.received
        try:
            yield
        finally:
            self._traffic.received = before

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Summed in rank order, in the dtype of `tensor`."""
        parts = self._meet(f"all_reduce of {_described(tensor)}", tensor.clone())()
        self._traffic.received += 2 * tensor.nbytes * (self.size - 1) // self.size
        return _sum(parts)

    def all_gather(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        return self.all_gather_start(tensor, sizes)()

    def all_gather_start(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> Finish:
        sizes = sizes or [tensor.shape[0]] * self.size
        self._check("all_gather", tensor.shape[0], sizes[self.rank], f"sizes = {sizes}")
        name = f"all_gather of {_row(tensor)} with sizes {sizes}"
        return self._exchange(name, tensor, lambda copy: copy, torch.cat)

    def reduce_scatter(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        """Summed in rank order, in the dtype of `tensor`."""
        return self.reduce_scatter_start(tensor, sizes)()

    def reduce_scatter_start(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> Finish:
        """Summed in rank order, in the dtype of `tensor`."""
        parts = sizes or [tensor.shape[0] // self.size] * self.size
        self._check("reduce_scatter", tensor.shape[0], sum(parts), f"sizes = {parts}")
        name = f"reduce_scatter of {_described(tensor)}"
        return self._exchange(name, tensor, lambda copy: copy.split(parts), lambda mine: _sum(mine), apart=True)

    def all_to_all(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        return self.all_to_all_start(tensor, send, receive)()

    def all_to_all_start(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> Finish:
        self._check("all_to_all", tensor.shape[0], sum(send), f"send = {send}")

        def joined(parts: list[torch.Tensor]) -> torch.Tensor:
            for rank, (part, expected) in enumerate(zip(parts, receive, strict=True)):
                self._check(f"all_to_all, from rank {rank}", part.shape[0], expected, f"receive = {receive}")
            return torch.cat(parts)

        return self._exchange(
            f"all_to_all of {_row(tensor)}", tensor, lambda copy: copy.split(send), joined, apart=True
        )

    def barrier(self) -> None:
        self._meet("barrier", None)()

    def await_device(self, stage: str) -> None:
        """Collectives here end on the host."""

    def _exchange(
        self,
        name: str,
        tensor: torch.Tensor,
        offer: Callable[[torch.Tensor], Any],
        take: Callable[[list[torch.Tensor]], torch.Tensor],
        *,
        apart: bool = False,
    ) -> Finish:
        """A collective whose second half may come late: what is sent is what `tensor` holds now.

        Args:
            offer: what the others see of a copy of `tensor`.
            take: what all ranks offered → this rank's result. `apart`: only each offer's part of this rank.

        Raises:
            MoEError: at the second half: `tensor` was written in between, and a device would have sent either values.
        """
        sent = tensor.clone()
        collect = self._meet(name, offer(sent))

        def finish() -> torch.Tensor:
            nonlocal tensor, sent
            offers = collect()
            untouched = _same_bytes(tensor, sent)
            del tensor, sent  # they may be freed from here on, as a real group's
            if not untouched:
                raise MoEError(f"rank {self.rank}: the tensor of {name} was written before the collective had ended")
            parts = [each[self.rank] for each in offers] if apart else offers
            self._traffic.received += sum(part.nbytes for rank, part in enumerate(parts) if rank != self.rank)
            return take(parts)

        return finish

    def _meet(self, name: str, brought: Any) -> Callable[[], list[Any]]:
        """Enter a collective; the result waits for the other ranks and returns what all brought."""
        number, self.calls = self.calls, self.calls + 1
        stage = _stage()
        meeting = self._world.bring(self.rank, number, name, stage, brought)
        return lambda: self._world.collect(self.rank, number, stage, meeting)

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


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """NaN is equal to itself here. Clones, because a single element of stride 0 is contiguous, and has no view."""
    one, other = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (one, other))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _described(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _row(tensor: torch.Tensor) -> str:
    """What must agree between ranks whose numbers of rows may differ."""
    return f"(N, {', '.join(map(str, tensor.shape[1:]))}) {tensor.dtype}"


def _stage() -> str:
    """The method of a layer that called the collective, or else whoever called the group, for messages."""
    step: FrameType | None = sys._getframe(1)
    caller = ""
    while step is not None:
        name = step.f_code.co_name
        if name in _STAGES:
            return _STAGES[name]
        if not caller and step.f_globals is not globals():
            caller = name
        step = step.f_back
    return caller or "?"
