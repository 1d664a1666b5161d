"""The protocol on a CPU: threads are ranks, bytes are their memories, and the interleaving is drawn at random.

It is an emulation of what the kernels do, step by step, on the plugin's own layout and index functions, and of what a
GPU may do to the order of stores: a program's stores to any memory arrive whenever they like, one by one and in any
order, until the program counts; then all have arrived. Programs of a grid advance in random order, the grid's size is
drawn anew for every launch and differs by rank. Memory that nobody has written is NaN.

As a plugin it registers the dispatches `symm_emulated`, `symm_batched_emulated` and `symm_exact_emulated`:
`moe_core.register_plugin(moe_symm.emulation)`.

Shape letters: T tokens on this rank · M the largest T · H hidden · P pitch of a row · G groups of columns ·
E_l local experts · C = W · M row capacity · K top-k · W ranks.
"""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch

from moe_core import formats
from moe_core.hookspecs import hookimpl
from moe_core.interfaces import Candidate, Group
from moe_core.quant import QuantSpec, ScaleFormat
from moe_core.types import DispatchCapabilities
from moe_symm import limits
from moe_symm.availability import Host
from moe_symm.buffers import Layer, clear
from moe_symm.capabilities import BY_EXPERT, EXACT, SYMM
from moe_symm.layout import (
    COMBINE,
    DISPATCH,
    LANES,
    SCALE_GROUP,
    UNITS,
    Form,
    Layout,
    Shares,
    fault_code,
    row_of,
    signalling,
    units,
    work_item,
)
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
            for name, rows in (("rows", layout.rows), ("sums", layout.sums)):
                self.area(lane, name, torch.uint8, rows, layout.pitch * layout.item).fill_(255)
        self.memories = self._meet()

    def area(self, lane: int, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A storage of its own for each area: what others write beside it does not count as a write into it."""
        begin, size = self.layout.begin(lane, name), math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._bytes, dtype=torch.uint8, offset=begin, count=size).view(dtype).view(shape)

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

    def compile(self, layer: Layer) -> None:
        self._group.barrier()

    def dispatch(
        self,
        lane: int,
        layer: Layer,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        quantize: bool,
        wait: bool,
    ) -> None:
        self._run(lane, lambda program: self._dispatch(program, layer, x, ids, weights, quantize, wait))

    def arrive(self, lane: int, layer: Layer) -> None:
        self._run(lane, self._arrive, programs=1)

    def expand(
        self,
        lane: int,
        layer: Layer,
        tokens: int,
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        tokens_per_expert: torch.Tensor,
    ) -> None:
        self._run(lane, lambda program: self._expand(program, x, x_scale, tokens_per_expert))

    def combine(
        self,
        lane: int,
        layer: Layer,
        y: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        *,
        send: bool = True,
        collect: bool = True,
    ) -> None:
        def kernel(program: Program) -> Action:
            yield
            if send:
                yield from self._offer(program) if self.layout.bulk else self._send_home(program, y)
            if collect:
                yield from self._collect(program, layer.shares, ids, weights, out)

        self._run(lane, kernel)

    def fault(self) -> int:
        return max(int(self.area(lane, "fault", torch.int32, 1)) for lane in range(LANES))

    def reset(self) -> None:
        self._group.barrier()
        clear(torch.frombuffer(self._bytes, dtype=torch.uint8), self.layout)
        self._group.barrier()

    def close(self) -> None:
        self.memories = []

    def reached(self, counters: torch.Tensor, target: int) -> bool:
        return bool((counters >= target).all())

    def _run(self, lane: int, kernel: Callable[[Program], Action], programs: int = 0) -> None:
        """A launch and the host's wait for it: the programs in random order, until all have ended."""
        if self._jitter_s:
            time.sleep(self.random.uniform(0, self._jitter_s))
        programs = programs or self.random.randint(1, MOST_PROGRAMS)
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
        self,
        program: Program,
        layer: Layer,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        quantize: bool,
        wait: bool,
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
            places = [layer.shares.place(expert) if expert >= 0 else (-1, -1) for expert in ids[token].tolist()]
            here = torch.tensor([owner == target for owner, _ in places])
            if here.any():
                row = row_of(token, self.number, layout.ranks)
                local = torch.tensor([place for _, place in places], dtype=torch.int32)
                self._send_row(program, target, row, x[token], layer.scales if quantize else None)
                program.store(self._choices(program, target, "ids")[row], local.where(here, -1))
                program.store(self._choices(program, target, "weights")[row], weights[token].where(here, 0.0))
            yield
        active = signalling(tokens * layout.ranks, program.programs)
        if program.number < active:
            program.count("dispatched", units(program.number, active))
        if wait and program.number == 0:
            yield from self._arrive(program)

    def _send_row(self, program: Program, target: int, row: int, x: torch.Tensor, scales: ScaleFormat | None) -> None:
        layout = self.layout
        if scales is None:
            rows = program.area(target, "rows", x.dtype, layout.rows, layout.pitch)
            program.store(rows[row, : layout.hidden], x)
            return
        spec = QuantSpec("float8_e4m3fn", (1, SCALE_GROUP), scales, dynamic=True)
        codes, scale = formats.quantize(x[None], spec)
        rows = program.area(target, "rows", torch.uint8, layout.rows, layout.quantized_pitch)
        program.store(rows[row, : layout.hidden], codes[0].view(torch.uint8))
        beside = program.area(target, "scales", torch.float32, layout.rows, layout.scale_pitch)
        program.store(beside[row, : layout.groups], scale[0])

    def _arrive(self, program: Program) -> Action:
        yield from program.wait("dispatched", self._epoch(program) * UNITS, DISPATCH)
        rows = max(self._counts(program)) * self.layout.ranks
        program.store(program.area(self.number, "num_rows", torch.int32, 1), torch.tensor([rows]))

    def _expand(
        self, program: Program, x: torch.Tensor, x_scale: torch.Tensor | None, tokens_per_expert: torch.Tensor
    ) -> Action:
        yield from self._arrive(program)
        layout, counts = self.layout, self._counts(program)
        pitch = layout.pitch if x_scale is None else layout.quantized_pitch
        x = x if x_scale is None else x.view(torch.uint8)
        rows = program.area(self.number, "rows", x.dtype, layout.rows, pitch)
        scales = program.area(self.number, "scales", torch.float32, layout.rows, layout.scale_pitch)
        ids, places = (self._choices(program, self.number, name) for name in ("ids", "places"))
        for item in range(program.number, max(counts) * layout.ranks, program.programs):
            token, source = work_item(item, self.number, layout.ranks, program.programs)
            if token < counts[source]:
                row = row_of(token, source, layout.ranks)
                for choice, expert in enumerate(ids[row].tolist()):
                    slot = int((ids[:row] == expert).sum()) if expert >= 0 else layout.rows
                    fits = slot < layout.rows
                    program.store(places[row, choice], torch.tensor(expert * layout.rows + slot if fits else -1))
                    if fits:
                        program.store(x[expert, slot], rows[row, : layout.hidden])
                        if x_scale is not None:
                            program.store(x_scale[expert, slot], scales[row, : layout.groups])
            yield
        for expert in range(program.number, len(tokens_per_expert), program.programs):
            program.store(tokens_per_expert[expert], (ids == expert).sum().clamp(max=layout.rows))
            yield

    def _send_home(self, program: Program, y: torch.Tensor) -> Action:
        layout, counts = self.layout, self._counts(program)
        received, weights = (self._choices(program, self.number, name) for name in ("ids", "weights"))
        places = received if layout.form is Form.STANDARD else self._choices(program, self.number, "places")
        items = max(counts) * layout.ranks
        for item in range(program.number, items, program.programs):
            token, source = work_item(item, self.number, layout.ranks, program.programs)
            if token < counts[source]:
                row = row_of(token, source, layout.ranks)
                sums = program.area(source, "sums", y.dtype, layout.sums, layout.pitch)[:, : layout.hidden]
                home = self.number * layout.max_tokens + token
                if layout.form is Form.STANDARD:
                    if int(received[row].max()) >= 0:
                        program.store(sums[home], y[row])
                elif layout.form is Form.BATCHED:
                    total = weighted_sum(y.flatten(0, -2), places[row].tolist(), weights[row])
                    if int(places[row].max()) >= 0:
                        program.store(sums[home], total.to(y.dtype))
                else:
                    for choice, place in enumerate(places[row].tolist()):
                        if place >= 0:
                            program.store(sums[token * layout.top_k + choice], y.flatten(0, -2)[place])
                program.store(received[row], torch.full_like(received[row], -1))
            yield
        active = signalling(items, program.programs)
        if program.number < active:
            program.count("combined", units(program.number, active))

    def _offer(self, program: Program) -> Action:
        """Rows of a layout for many tokens stay where the experts wrote them."""
        received = self._choices(program, self.number, "ids")
        for source, tokens in enumerate(self._counts(program)):
            for token in range(program.number, tokens, program.programs):
                row = received[row_of(token, source, self.layout.ranks)]
                program.store(row, torch.full_like(row, -1))
            yield
        program.count("combined", units(program.number, program.programs))

    def _collect(
        self, program: Program, shares: Shares, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> Action:
        layout, tokens, epoch = self.layout, out.shape[0], self._epoch(program)
        if program.number == 0:
            program.area(self.number, "epochs", torch.int32, 2)[0] = epoch
        if program.number < tokens or program.number == 0:
            yield from program.wait("combined", epoch * UNITS, COMBINE)
            sums = program.area(self.number, "sums", out.dtype, layout.sums, layout.pitch)[:, : layout.hidden]
            for token in range(program.number, tokens, program.programs):
                if layout.form is Form.EXACT:
                    chosen = [token * layout.top_k + k if i >= 0 else -1 for k, i in enumerate(ids[token].tolist())]
                    total = weighted_sum(sums, chosen, weights[token])
                else:
                    senders = {shares.place(expert)[0] for expert in ids[token].tolist() if expert >= 0}
                    total = torch.zeros(layout.hidden)
                    for source in sorted(senders):
                        if layout.bulk:  # where the experts there wrote it
                            theirs = program.area(source, "sums", out.dtype, layout.sums, layout.pitch)
                            row = row_of(token, self.number, layout.ranks)
                            total += theirs[row, : layout.hidden].float()
                        else:
                            total += sums[source * layout.max_tokens + token].float()
                        yield
                out[token] = (total + (torch.nan if program.lost() else 0.0)).to(out.dtype)
                yield

    def _epoch(self, program: Program) -> int:
        """Of the step whose dispatch has begun."""
        return int(program.area(self.number, "epochs", torch.int32, 2)[1])

    def _counts(self, program: Program) -> list[int]:
        slot = self._epoch(program) % self.count_slots
        counts = program.area(self.number, "counts", torch.int32, 2, self.layout.ranks)
        return [int(tokens) for tokens in counts[slot]]

    def _choices(self, program: Program, owner: int, name: str) -> torch.Tensor:
        dtype = torch.float32 if name == "weights" else torch.int32
        return program.area(owner, name, dtype, self.layout.rows, self.layout.top_k)


def weighted_sum(rows: torch.Tensor, chosen: list[int], weights: torch.Tensor) -> torch.Tensor:
    """fp32 `[H]`: fused multiply-adds of the chosen rows, in their order; -1 is none.

    The product of two fp32 is exact in fp64, so that only the sum is rounded, twice: a difference to one rounding is
    one in some 2^29 cases.
    """
    total = torch.zeros(rows.shape[-1])
    for row, weight in zip(chosen, weights, strict=True):
        if row >= 0:
            total = (rows[row].double() * weight.double() + total.double()).float()
    return total


def connect_emulated(group: Group, layout: Layout, timeout_s: float) -> EmulatedMemory:
    """Memory between virtual ranks."""
    return EmulatedMemory(group, layout, min(timeout_s, _MOST_PATIENCE_S))


def make_emulated(form: Form, *arguments: Any) -> SymmPrepareAndFinalize:
    """The plugin over the emulation; the arguments are a factory's."""
    return make(*arguments, connect=connect_emulated, form=form)


def candidate(form: Form) -> Candidate[DispatchCapabilities]:
    """What the plugin registers, for tensors on a CPU."""
    declared = {Form.STANDARD: SYMM, Form.BATCHED: BY_EXPERT, Form.EXACT: EXACT}[form]
    return Candidate(
        name="symm_emulated" if form is Form.STANDARD else f"symm_{form.value}_emulated",
        plugin="moe-symm",
        factory=functools.partial(make_emulated, form),
        capabilities=attrs.evolve(
            declared,
            device_types=frozenset({"cpu"}),
            min_compute_capability=None,
            graph_capturable=False,
            refuse=lambda problem: limits.refuse(problem, Host()),
        ),
        priority=-1000,
    )


@hookimpl
def moe_core_register_prepare_finalize(register: Callable[..., None]) -> None:
    for form in Form:
        made = candidate(form)
        register(made.name, made.factory, made.capabilities, priority=made.priority)
