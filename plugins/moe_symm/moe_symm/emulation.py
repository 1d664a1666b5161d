"""The protocol on a CPU: threads are ranks, bytes are their memories, and the interleaving is drawn at random.

It is an emulation of what the kernels do, step by step, on the plugin's own layout and index functions, and of what a
GPU may do to the order of stores: a program's stores to any memory arrive whenever they like, one by one and in any
order, until the program counts; then all have arrived. Programs of a grid advance in random order, the grid's size is
drawn anew for every launch and differs by rank. Memory that nobody has written is NaN.

As a plugin it registers the dispatch `symm_emulated`: `moe_core.register_plugin(moe_symm.emulation)`.

Shape letters: T tokens on this rank · M the largest T · H hidden · P pitch of a row · K top-k · W ranks.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch

from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.hookspecs import hookimpl
from moe_core.interfaces import Group
from moe_core.quant import QuantScheme
from moe_core.types import ExpertPlacement
from moe_symm import limits
from moe_symm.availability import Host
from moe_symm.buffers import clear
from moe_symm.layout import COMBINE, DISPATCH, LANES, UNITS, Layout, Shares, fault_code, signalling, units, work_item
from moe_symm.plugin import SYMM
from moe_symm.prepare_finalize import SymmPrepareAndFinalize, make

moe_core_api = (1, 0)

MOST_PROGRAMS = 5
_PAUSE_S = 0.0002
_MOST_PATIENCE_S = 4.0
_PACES = (1.0, 1.0, 0.5, 0.05)
"""How often a program gets its turn: some are late for everything."""
Action = Iterator[None]
"""A program: it yields wherever another may run."""

_ENDED = object()

_ranks: dict[tuple[str, int], EmulatedMemory] = {}


class Program:
    """One program of a grid: its stores that are under way, and how it waits."""

    def __init__(self, rank: EmulatedMemory, lane: int, number: int, programs: int) -> None:
        self.rank, self.lane, self.number, self.programs = rank, lane, number, programs
        self._under_way: list[tuple[torch.Tensor, torch.Tensor]] = []

    def area(self, owner: int, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return self.rank.memories[owner].area(self.lane, name, dtype, *shape)

    def store(self, place: torch.Tensor, values: torch.Tensor) -> None:
        self._under_way.append((place, values.clone()))

    def arrive(self, *, all_of_them: bool = False) -> None:
        """Some stores, drawn at random, become visible."""
        choose = self.rank.random
        for _ in range(len(self._under_way) if all_of_them else choose.randint(0, len(self._under_way))):
            place, values = self._under_way.pop(choose.randrange(len(self._under_way)))
            place.copy_(values)

    def count(self, name: str, amount: int) -> None:
        """Release: whatever this program has stored is there before its count."""
        self.arrive(all_of_them=True)
        for owner in range(self.rank.layout.ranks):
            self.area(owner, name, torch.int32, self.rank.layout.ranks)[self.rank.number] += amount

    def wait(self, name: str, target: int, stage: int) -> Action:
        """Until every rank has counted to `target`, or the time is over, which all ranks are told."""
        rank = self.rank
        counters = self.area(rank.number, name, torch.int32, rank.layout.ranks)
        deadline = time.monotonic() + rank.timeout_s
        while not self.lost() and not rank.reached(counters, target):
            if time.monotonic() > deadline:
                missing = int((counters < target).nonzero()[0])
                for owner in range(rank.layout.ranks):
                    self.area(owner, "fault", torch.int32, 1).fill_(fault_code(stage, rank.number, missing))
            yield

    def lost(self) -> bool:
        """Some rank has waited in vain, in this lane."""
        return bool(self.area(self.rank.number, "fault", torch.int32, 1))


class EmulatedMemory:
    """A `Connection` between threads.

    Args:
        group: the virtual ranks.
        layout: of the memory.
        timeout_s: how long a program waits for another rank.
        seed: of everything random; with the rank's number.
        jitter_s: upper bound of a pause before each launch.
    """

    program = Program
    count_slots = 2

    def __init__(self, group: Group, layout: Layout, timeout_s: float, *, seed: int = 0, jitter_s: float = 0.0) -> None:
        self.layout, self.number, self.timeout_s = layout, group.rank, timeout_s
        self.random = random.Random(f"{seed} {group.rank}")
        self._group, self._jitter_s = group, jitter_s
        self._bytes = bytearray(layout.total_bytes)
        clear(torch.frombuffer(self._bytes, dtype=torch.uint8), layout)
        for lane in range(LANES):
            for name in ("rows", "sums"):
                self.area(lane, name, torch.uint8, layout.rows, layout.pitch * layout.item).fill_(255)
        self.memories = self._meet()

    def area(self, lane: int, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A storage of its own for each area: what others write beside it does not count as a write into it."""
        begin = lane * self.layout.lane_bytes + self.layout.offsets[name]
        return torch.frombuffer(self._bytes, dtype=dtype, offset=begin, count=math.prod(shape)).view(shape)

    def _meet(self) -> list[EmulatedMemory]:
        """Every rank's end, by way of a name in the group's store."""
        number = self._group.store.add(f"moe_symm/buffers/{self.number}", 1)
        if self.number == 0:
            self._group.store.set(f"moe_symm/name/{number}", f"{id(self)} {time.monotonic_ns()}")
        self._group.barrier()
        name = self._group.store.get(f"moe_symm/name/{number}").decode()
        _ranks[name, self.number] = self
        self._group.barrier()
        found = [_ranks[name, rank] for rank in range(self.layout.ranks)]
        self._group.barrier()
        del _ranks[name, self.number]
        return found

    def compile(self, shares: Shares, dtype: torch.dtype) -> None:
        self._group.barrier()

    def dispatch(self, lane: int, shares: Shares, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        self._run(lane, lambda program: self._dispatch(program, shares, x, ids, weights))

    def combine(self, lane: int, shares: Shares, y: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
        self._run(lane, lambda program: self._combine(program, shares, y, ids, out))

    def fault(self) -> int:
        return max(int(self.area(lane, "fault", torch.int32, 1)) for lane in range(LANES))

    def close(self) -> None:
        self.memories = []

    def reached(self, counters: torch.Tensor, target: int) -> bool:
        return bool((counters >= target).all())

    def _run(self, lane: int, kernel: Callable[[Program], Action]) -> None:
        """A launch and the host's wait for it: the programs in random order, until all have ended."""
        if self._jitter_s:
            time.sleep(self.random.uniform(0, self._jitter_s))
        programs = self.random.randint(1, MOST_PROGRAMS)
        grid = [self.program(self, lane, number, programs) for number in range(programs)]
        running = {program: kernel(program) for program in grid}
        pace = {program: self.random.choice(_PACES) for program in grid}
        while running:
            for program in self.random.sample(list(running), len(running)):
                if self.random.random() > pace[program]:
                    continue
                program.arrive()
                if next(running[program], _ENDED) is _ENDED:
                    program.arrive(all_of_them=True)
                    del running[program]
            time.sleep(_PAUSE_S if self.random.random() < 0.2 else 0)

    def _dispatch(
        self, program: Program, shares: Shares, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Action:
        layout, tokens = self.layout, x.shape[0]
        epochs = program.area(self.number, "epochs", torch.int32, 2)
        epoch = int(epochs[0]) + 1
        yield
        if program.number == 0:
            epochs[1] = epoch
            for owner in range(layout.ranks):
                counts = program.area(owner, "counts", torch.int32, 2, layout.ranks)
                program.store(counts[epoch % self.count_slots, self.number], torch.tensor(tokens))
        for item in range(program.number, tokens * layout.ranks, program.programs):
            token, target = work_item(item, self.number, layout.ranks, program.programs)
            places = [shares.place(expert) if expert >= 0 else (-1, -1) for expert in ids[token].tolist()]
            here = torch.tensor([owner == target for owner, _ in places])
            if here.any():
                row = self.number * layout.max_tokens + token
                local = torch.tensor([place for _, place in places], dtype=torch.int32)
                rows = program.area(target, "rows", x.dtype, layout.rows, layout.pitch)
                program.store(rows[row, : layout.hidden], x[token])
                program.store(self._choices(program, target, "ids")[row], local.where(here, -1))
                program.store(self._choices(program, target, "weights")[row], weights[token].where(here, 0.0))
            yield
        active = signalling(tokens * layout.ranks, program.programs)
        if program.number < active:
            program.count("dispatched", units(program.number, active))
        if program.number == 0:
            yield from program.wait("dispatched", epoch * UNITS, DISPATCH)

    def _combine(
        self, program: Program, shares: Shares, y: torch.Tensor, ids: torch.Tensor, out: torch.Tensor
    ) -> Action:
        layout, tokens = self.layout, out.shape[0]
        epochs = program.area(self.number, "epochs", torch.int32, 2)
        epoch = int(epochs[1])
        yield
        counts = program.area(self.number, "counts", torch.int32, 2, layout.ranks)[epoch % self.count_slots].tolist()
        if program.number == 0:
            epochs[0] = epoch
        received = self._choices(program, self.number, "ids")
        items = max(counts) * layout.ranks
        for item in range(program.number, items, program.programs):
            token, source = work_item(item, self.number, layout.ranks, program.programs)
            if token < counts[source]:
                row = source * layout.max_tokens + token
                if int(received[row].max()) >= 0:
                    sums = program.area(source, "sums", y.dtype, layout.rows, layout.pitch)
                    program.store(sums[self.number * layout.max_tokens + token, : layout.hidden], y[row])
                program.store(received[row], torch.full_like(received[row], -1))
            yield
        active = signalling(items, program.programs)
        if program.number < active:
            program.count("combined", units(program.number, active))
        if program.number < tokens or program.number == 0:
            yield from program.wait("combined", epoch * UNITS, COMBINE)
            sums = program.area(self.number, "sums", y.dtype, layout.rows, layout.pitch)
            for token in range(program.number, tokens, program.programs):
                senders = {shares.place(expert)[0] for expert in ids[token].tolist() if expert >= 0}
                total = torch.full((layout.hidden,), torch.nan if program.lost() else 0.0)
                for source in sorted(senders):
                    total += sums[source * layout.max_tokens + token, : layout.hidden].float()
                out[token] = total.to(out.dtype)
                yield

    def _choices(self, program: Program, owner: int, name: str) -> torch.Tensor:
        dtype = torch.int32 if name == "ids" else torch.float32
        return program.area(owner, name, dtype, self.layout.rows, self.layout.top_k)


def connect_emulated(group: Group, layout: Layout, timeout_s: float) -> EmulatedMemory:
    """Memory between virtual ranks."""
    return EmulatedMemory(group, layout, min(timeout_s, _MOST_PATIENCE_S))


def make_emulated(
    config: MoEConfig,
    parallel: MoEParallelConfig,
    scheme: QuantScheme,
    group: Group | None,
    placement: ExpertPlacement,
) -> SymmPrepareAndFinalize:
    """The plugin over the emulation."""
    return make(config, parallel, group, placement, connect=connect_emulated)


def capabilities() -> Any:
    """What the plugin declares, for tensors on a CPU."""
    return attrs.evolve(
        SYMM,
        device_types=frozenset({"cpu"}),
        min_compute_capability=None,
        graph_capturable=False,
        refuse=lambda problem: limits.refuse(problem, Host()),
    )


@hookimpl
def moe_core_register_prepare_finalize(register: Callable[..., None]) -> None:
    register("symm_emulated", make_emulated, capabilities(), priority=-1000)
