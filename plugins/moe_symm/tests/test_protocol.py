"""The protocol's safety, on the emulation: right whatever the interleaving, and every piece of it is needed."""

from __future__ import annotations

import functools
import random
import time
from typing import Any

import pytest
import torch

from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.errors import CapacityError, CollectiveError, MoEError
from moe_core.expert_map import ExpertMapManager
from moe_core.testing.virtual import VirtualGroup, run_on_ranks
from moe_core.types import MODEL_DTYPE_PAYLOAD, Dispatched, ExpertPlacement, Routing
from moe_symm import layout
from moe_symm.emulation import EmulatedMemory, Program
from moe_symm.prepare_finalize import SymmPrepareAndFinalize, make

E, K, M, H = 7, 3, 4, 10


class Rank:
    """One rank with its backend; what all ranks draw is known to each."""

    def __init__(self, group: VirtualGroup, memory: type[EmulatedMemory], seed: int, timeout_s: float = 20.0) -> None:
        config = MoEConfig(
            num_experts=E,
            top_k=K,
            hidden_size=H,
            intermediate_size=4,
            max_tokens_per_rank=M,
            dtype=torch.float32,
        )
        parallel = MoEParallelConfig.fold(dp_size=group.size, dp_rank=group.rank, expert_parallel=True)
        self.group, self.rank, self.size = group, group.rank, group.size

        def connect(group: Any, layout: Any, _: float) -> EmulatedMemory:
            return memory(group, layout, timeout_s, seed=seed, jitter_s=0.001)

        self.backend: SymmPrepareAndFinalize = make(config, parallel, group, ExpertPlacement.LINEAR, connect=connect)
        self.draw = torch.Generator().manual_seed(seed)
        self.held = [ExpertMapManager(E, group.size, rank).local_experts for rank in range(group.size)]

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
        """All ranks' rows, ids (some -1, some twice), weights, and how many tokens they have (none, some, all)."""
        x = torch.randn(self.size, M, H, generator=self.draw)
        ids = torch.randint(-1, E, (self.size, M, K), generator=self.draw)
        sizes = torch.randint(0, M + 1, (self.size,), generator=self.draw).tolist()
        return x, ids, torch.rand(self.size, M, K, generator=self.draw), sizes

    def prepare(self, batch: Any) -> tuple[Dispatched, Routing]:
        x, ids, weights, sizes = batch
        tokens = sizes[self.rank]
        routing = Routing(ids[self.rank, :tokens], weights[self.rank, :tokens])
        arguments: dict[str, Any] = {"num_experts": E, "expert_map": None, "payload": MODEL_DTYPE_PAYLOAD}
        return self.backend.prepare(x[self.rank, :tokens], routing, **arguments), routing

    def arrivals_are_right(self, batch: Any, got: Dispatched) -> bool:
        x, ids, weights, sizes = batch
        assert got.topk_ids is not None and got.topk_weights is not None  # noqa: PT018 - for the type checker
        wanted = torch.full((self.size * M, K), -1, dtype=torch.int32)
        for source, tokens in enumerate(sizes):
            for token in range(tokens):
                for k, expert in enumerate(ids[source, token].tolist()):
                    if expert in self.held[self.rank]:
                        wanted[source * M + token, k] = self.held[self.rank].index(expert)
        here = wanted >= 0
        rows = here.any(1)
        return (
            torch.equal(got.topk_ids, wanted)
            and torch.equal(got.topk_weights[here], weights.reshape(-1, K)[here])
            and torch.equal(got.x[rows], x.reshape(-1, H)[rows])
        )

    def expert_rows(self, batch: Any, rank: int) -> torch.Tensor:
        return batch[0].reshape(-1, H) * (rank + 2)

    def expected(self, batch: Any) -> torch.Tensor:
        total = torch.zeros(batch[3][self.rank], H)
        for token in range(len(total)):
            for rank in range(self.size):
                if any(expert in self.held[rank] for expert in batch[1][self.rank, token].tolist()):
                    total[token] += self.expert_rows(batch, rank)[self.rank * M + token]
        return total

    def step(self, steps_in_flight: int) -> int:
        """How many comparisons failed."""
        batches = [self.batch() for _ in range(steps_in_flight)]
        flights = [(batch, *self.prepare(batch)) for batch in batches]
        wrong = 0
        for batch, dispatched, routing in reversed(flights):
            wrong += not self.arrivals_are_right(batch, dispatched)
            out = torch.full((batch[3][self.rank], H), torch.nan)
            self.backend.finalize(self.expert_rows(batch, self.rank), dispatched.handle, routing, out)
            wrong += not torch.equal(out, self.expected(batch))
        return wrong


def wrong_steps(group: VirtualGroup, memory: type[EmulatedMemory], seed: int, steps: int) -> int:
    rank = Rank(group, memory, seed, timeout_s=20.0 if memory is EmulatedMemory else 1.0)
    in_flight = random.Random(seed)
    return sum(rank.step(in_flight.randint(1, 2)) for _ in range(steps))


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_interleaving_gives_the_same_numbers(ranks):
    for seed in range(2):
        assert run_on_ranks(ranks, wrong_steps, EmulatedMemory, seed, 15) == [0] * ranks


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 4])
def test_hundreds_of_routings(ranks):
    for seed in range(10):
        assert run_on_ranks(ranks, wrong_steps, EmulatedMemory, seed, 40) == [0] * ranks


class CountsTooEarly(EmulatedMemory):
    """Its programs count while their stores are under way."""

    class program(Program):
        def count(self, name: str, amount: int) -> None:
            for owner in range(self.rank.layout.ranks):
                self.area(owner, name, torch.int32, self.rank.layout.ranks)[self.rank.number] += amount


class WaitsForItself(EmulatedMemory):
    """A wait that looks at one counter only."""

    def reached(self, counters: torch.Tensor, target: int) -> bool:
        return bool(counters[self.number] >= target)


class WaitsForTheStepBefore(EmulatedMemory):
    """A wait that is one epoch behind."""

    def reached(self, counters: torch.Tensor, target: int) -> bool:
        return bool((counters >= target - layout.UNITS).all())


class WaitsForHalf(EmulatedMemory):
    """A wait that takes the first programs' counts for all."""

    def reached(self, counters: torch.Tensor, target: int) -> bool:
        return bool((counters > target - layout.UNITS).all())


class ClearsNoIds(EmulatedMemory):
    """Rows that were used stay where they are."""

    class program(Program):
        def store(self, place: torch.Tensor, values: torch.Tensor) -> None:
            if not bool((values == -1).all()):
                super().store(place, values)


@pytest.mark.parametrize("broken", [CountsTooEarly, WaitsForItself, WaitsForTheStepBefore, WaitsForHalf, ClearsNoIds])
def test_without_one_of_its_pieces_it_is_wrong(broken):
    for seed in range(8):
        results = run_on_ranks(3, wrong_steps, broken, seed, 20, return_errors=True)
        if any(not isinstance(result, int) or result for result in results):
            return
    pytest.fail(f"nobody noticed: {broken.__doc__}")


class IdleProgramIsLate(EmulatedMemory):
    """Two programs. Of rank 0's first combine, which has no work, the second begins when rank 1 is in the next step."""

    launches = 0

    class program(Program):
        def count(self, name: str, amount: int) -> None:
            super().count(name, amount)
            if (self.rank.number, self.rank.launches, self.number) == (1, 3, 0):
                self.rank._group.store.set("rank 1 has sent its next tokens", b"")

    def _run(self, lane: int, kernel: Any) -> None:
        self.launches += 1
        first, second = (self.program(self, lane, number, 2) for number in range(2))
        running = {program: kernel(program) for program in (first, second)}
        held_back = (self.number, self.launches) == (0, 2)
        while running:
            if held_back and first not in running:
                self._group.store.get("rank 1 has sent its next tokens")
            for program in [first] if held_back and first in running else list(running):
                if next(running[program], self) is self:
                    program.arrive(all_of_them=True)
                    del running[program]
            time.sleep(0)


class IdleProgramReadsTheNextCounts(IdleProgramIsLate):
    count_slots = 1


def an_empty_step_and_a_full_one(group: VirtualGroup, memory: type[EmulatedMemory]) -> bool:
    rank = Rank(group, memory, 3)
    x, ids, weights, _ = rank.batch()
    right = True
    for sizes in ([0, 0], [M, M]):
        batch = (x, ids, weights, sizes)
        dispatched, routing = rank.prepare(batch)
        right &= rank.arrivals_are_right(batch, dispatched)
        out = torch.empty(sizes[group.rank], H)
        rank.backend.finalize(rank.expert_rows(batch, group.rank), dispatched.handle, routing, out)
        right &= torch.equal(out, rank.expected(batch))
    return right


def test_counts_are_kept_for_programs_that_read_them_late():
    assert run_on_ranks(2, an_empty_step_and_a_full_one, IdleProgramIsLate) == [True, True]
    assert run_on_ranks(2, an_empty_step_and_a_full_one, IdleProgramReadsTheNextCounts) != [True, True]


def late(group: VirtualGroup) -> str:
    rank = Rank(group, EmulatedMemory, 0, timeout_s=0.3)
    if group.rank == 1:
        group.store.get("the others have given up")
    try:
        batch = rank.batch()
        dispatched, routing = rank.prepare(batch)
        out = torch.empty(batch[3][group.rank], H)
        rank.backend.finalize(rank.expert_rows(batch, group.rank), dispatched.handle, routing, out)
    except CollectiveError as error:
        return str(error)
    finally:
        group.store.set("the others have given up", b"")
    return "nothing"


def test_all_ranks_learn_who_was_waited_for():
    for said in run_on_ranks(3, late):
        assert "waited for rank 1 in dispatch in vain" in said


def abandon(group: VirtualGroup) -> torch.Tensor:
    rank = Rank(group, EmulatedMemory, 1)
    batch = rank.batch()
    batch = (*batch[:1], torch.arange(K * 2, K * 2 + 1).expand(group.size, M, K), batch[2], [M] * group.size)
    dispatched, routing = rank.prepare(batch)  # all choose one expert of the last rank
    out = torch.zeros(M, H)
    if group.rank == group.size - 1:
        rank.backend.release(dispatched.handle)
        rank.backend.release(dispatched.handle)  # a second time it is nothing
    else:
        rank.backend.finalize(rank.expert_rows(batch, group.rank), dispatched.handle, routing, out)
    assert rank.step(2) == 0  # both lanes are free, and the ranks are in step
    return out


def test_a_step_that_a_rank_gave_up_is_no_number():
    first, second, _ = run_on_ranks(3, abandon)
    assert bool(first.isnan().all())
    assert bool(second.isnan().all())


def refuse(group: VirtualGroup) -> None:
    rank = Rank(group, EmulatedMemory, 2)
    x, ids, weights, _ = rank.batch()
    most = rank.prepare((x, ids, weights, [M] * group.size))
    other = rank.prepare((x, ids, weights, [M] * group.size))
    with pytest.raises(MoEError, match="2 micro-batches are in flight"):
        rank.prepare((x, ids, weights, [M] * group.size))
    for dispatched, routing in (other, most):
        rank.backend.finalize(rank.expert_rows((x,), 0), dispatched.handle, routing, torch.empty(M, H))
    with pytest.raises(MoEError, match="consumed"):
        rank.backend.finalize(x[0], most[0].handle, most[1], torch.empty(M, H))
    prepare = functools.partial(rank.backend.prepare, num_experts=E, expert_map=None)
    with pytest.raises(CapacityError, match=r"T = 5 tokens.*max_tokens_per_rank = 4"):
        prepare(torch.ones(M + 1, H), Routing(ids[0, :1], weights[0, :1]), payload=MODEL_DTYPE_PAYLOAD)
    with pytest.raises(MoEError, match="payload = 'fp8_block'"):
        prepare(x[0], Routing(ids[0], weights[0]), payload="fp8_block")


def test_what_can_not_be_is_refused():
    run_on_ranks(2, refuse)
