"""The protocol's safety, on the emulation: right whatever the interleaving, and every piece of it is needed."""

from __future__ import annotations

import random
import time
from typing import Any

import attrs
import pytest
import torch

from moe_core import formats
from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.errors import CapacityError, CollectiveError, MoEError
from moe_core.expert_map import ExpertMapManager
from moe_core.quant import UNQUANTIZED, QuantScheme, QuantSpec, ScaleFormat
from moe_core.testing.virtual import VirtualGroup, run_on_ranks
from moe_core.types import MODEL_DTYPE_PAYLOAD, Dispatched, ExpertPlacement, Routing
from moe_symm import layout
from moe_symm.emulation import EmulatedMemory, Program, weighted_sum
from moe_symm.layout import Form
from moe_symm.limits import FP8_PAYLOADS
from moe_symm.prepare_finalize import SymmPrepareAndFinalize, make

E, K, M, H = 7, 3, 4, 10


@attrs.frozen(eq=False)
class Batch:
    """What all ranks send in a step: `[W, M, H]`, `[W, M, K]`, `[W, M, K]`, and how many tokens each has."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    sizes: list[int]


def fp8(scales: ScaleFormat) -> QuantSpec:
    return QuantSpec("float8_e4m3fn", (1, 128), scales, dynamic=True)


SCHEMES = {scales: QuantScheme(name, activation=fp8(scales)) for name, scales in FP8_PAYLOADS.items()}


@pytest.fixture(params=[*Form, "fetched"], ids=str)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Form:
    """Each form, and the standard one as it is for many tokens."""
    if request.param != "fetched":
        return request.param
    monkeypatch.setattr(layout, "BULK_FROM", 1)
    return Form.STANDARD


class Rank:
    """One rank with its backend; what all ranks draw is known to each."""

    def __init__(
        self,
        group: VirtualGroup,
        memory: type[EmulatedMemory],
        seed: int,
        form: Form = Form.STANDARD,
        scales: ScaleFormat | None = None,
        timeout_s: float = 20.0,
    ) -> None:
        config = MoEConfig(
            num_experts=E,
            top_k=K,
            hidden_size=H,
            intermediate_size=4,
            max_tokens_per_rank=M,
            dtype=torch.float32,
        )
        parallel = MoEParallelConfig.fold(dp_size=group.size, dp_rank=group.rank, expert_parallel=True)
        self.group, self.rank, self.size, self.form, self.scales = group, group.rank, group.size, form, scales
        self.scheme = UNQUANTIZED if scales is None else SCHEMES[scales]
        self.payload = MODEL_DTYPE_PAYLOAD if scales is None else self.scheme.name

        def connect(group: Any, layout: Any, _: float) -> EmulatedMemory:
            return memory(group, layout, timeout_s, seed=seed, jitter_s=0.001)

        arguments = (config, parallel, self.scheme, group, ExpertPlacement.LINEAR)
        self.backend: SymmPrepareAndFinalize = make(*arguments, connect=connect, form=form)
        self.draw = torch.Generator().manual_seed(seed)
        self.held = [ExpertMapManager(E, group.size, rank).local_experts for rank in range(group.size)]

    def batch(self) -> Batch:
        """All ranks' rows, ids (some -1, in the standard form some twice), weights, and their tokens (0 to M)."""
        x = torch.randn(self.size, M, H, generator=self.draw)
        ids = torch.randint(-1, E, (self.size, M, K), generator=self.draw)
        if self.form is not Form.STANDARD:
            chosen = torch.rand(self.size, M, E, generator=self.draw).topk(K).indices
            ids = chosen.masked_fill(ids < 0, -1)
        sizes = torch.randint(0, M + 1, (self.size,), generator=self.draw).tolist()
        return Batch(x, ids, torch.rand(self.size, M, K, generator=self.draw), sizes)

    def arguments(self, batch: Batch) -> tuple[torch.Tensor, Routing, dict[str, Any]]:
        own = slice(batch.sizes[self.rank])
        routing = Routing(batch.ids[self.rank, own], batch.weights[self.rank, own])
        return batch.x[self.rank, own], routing, {"num_experts": E, "expert_map": None, "payload": self.payload}

    def prepare(self, batch: Batch, *, split: bool = False) -> tuple[Any, Routing]:
        """What `prepare` gives, or the second half of it."""
        x, routing, named = self.arguments(batch)
        return (self.backend.prepare_start if split else self.backend.prepare)(x, routing, **named), routing

    def finalize(
        self, batch: Batch, dispatched: Any, routing: Routing, *, y: Any = None, out: Any = None, split: bool = False
    ) -> torch.Tensor:
        out = torch.full((batch.sizes[self.rank], H), torch.nan) if out is None else out
        arguments = (self.expert_rows(batch, self.rank) if y is None else y, dispatched.handle, routing, out)
        if split:
            self.backend.finalize_start(*arguments)()
        else:
            self.backend.finalize(*arguments)
        return out

    def seen(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All ranks' rows as they arrive `[W · M, …]`."""
        rows = in_rows(batch.x)
        return (rows, None) if self.scales is None else formats.quantize(rows, fp8(self.scales))

    def choices(self, batch: Batch) -> dict[int, list[int]]:
        """Local expert → the rows that chose it, in their order."""
        found: dict[int, list[int]] = {local: [] for local in range(len(self.held[self.rank]))}
        for row, ids in enumerate(in_rows(batch.ids).tolist()):
            token, source = divmod(row, self.size)
            for expert in ids if token < batch.sizes[source] else ():
                if expert in self.held[self.rank]:
                    found[self.held[self.rank].index(expert)].append(row)
        return found

    def arrivals_are_right(self, batch: Batch, got: Dispatched) -> bool:
        x, x_scale = self.seen(batch)
        if self.form is not Form.STANDARD:
            assert got.tokens_per_expert is not None
            right = True
            for local, rows in self.choices(batch).items():
                right &= int(got.tokens_per_expert[local]) == len(rows)
                right &= same(got.x[local, : len(rows)], x[rows])
                right &= x_scale is None or same(got.x_scale[local, : len(rows)], x_scale[rows])  # type: ignore[index]
            return right
        assert got.topk_ids is not None and got.topk_weights is not None  # noqa: PT018 - for the type checker
        wanted = torch.full((self.size * M, K), -1, dtype=torch.int32)
        for row, ids in enumerate(in_rows(batch.ids).tolist()):
            token, source = divmod(row, self.size)
            for k, expert in enumerate(ids if token < batch.sizes[source] else ()):
                if expert in self.held[self.rank]:
                    wanted[row, k] = self.held[self.rank].index(expert)
        here = wanted >= 0
        rows = here.any(1)
        return (
            torch.equal(got.topk_ids, wanted)
            and torch.equal(got.topk_weights[here], in_rows(batch.weights)[here])
            and got.num_rows.tolist() == [self.size * max(batch.sizes)]  # type: ignore[union-attr]
            and same(got.x[rows], x[rows])
            and (x_scale is None or same(got.x_scale[rows], x_scale[rows]))  # type: ignore[index]
        )

    def expert_rows(self, batch: Batch, rank: int) -> torch.Tensor:
        """What this rank's experts make of their rows, NaN where there is none: some numbers that tell all apart."""
        rows = in_rows(batch.x) * (rank + 2)
        if self.form is Form.STANDARD:
            return rows
        y = torch.full((len(self.held[rank]), self.size * M, H), torch.nan)
        for local, chosen in self.choices(batch).items():
            y[local, : len(chosen)] = rows[chosen] + local
        return y

    def expected(self, batch: Batch) -> torch.Tensor:
        total = torch.zeros(batch.sizes[self.rank], H)
        for token in range(len(total)):
            ids, weights = batch.ids[self.rank, token].tolist(), batch.weights[self.rank, token]
            row = batch.x[self.rank, token]
            parts = [
                [(row * (rank + 2) + held.index(expert), k) for k, expert in enumerate(ids) if expert in held]
                for rank, held in enumerate(self.held)
            ]
            if self.form is Form.EXACT:
                order = sorted((k, part) for per_rank in parts for part, k in per_rank)  # type: ignore[type-var]
                parts = [[(part, k) for k, part in order]]
            for rank, per_rank in enumerate(parts):
                if self.form is Form.STANDARD:
                    total[token] += row * (rank + 2) if per_rank else 0
                else:
                    rows = torch.stack([part for part, _ in per_rank]) if per_rank else torch.empty(0, H)
                    total[token] += weighted_sum(rows, list(range(len(rows))), weights[[k for _, k in per_rank]])
        return total

    def step(self, steps_in_flight: int, *, split: bool = False) -> int:
        """How many comparisons failed."""
        batches = [self.batch() for _ in range(steps_in_flight)]
        flights = [(batch, *self.prepare(batch, split=split)) for batch in batches]
        wrong = 0
        for batch, dispatched, routing in reversed(flights):
            arrived = dispatched() if split else dispatched
            wrong += not self.arrivals_are_right(batch, arrived)
            wrong += not torch.equal(self.finalize(batch, arrived, routing, split=split), self.expected(batch))
        return wrong


def in_rows(of_sources: torch.Tensor) -> torch.Tensor:
    """`[W, M, …]` as `[W · M, …]`, in the order in which a rank gets it."""
    return of_sources.transpose(0, 1).flatten(0, 1)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def wrong_steps(
    group: VirtualGroup,
    memory: type[EmulatedMemory],
    seed: int,
    steps: int,
    form: Form = Form.STANDARD,
    scales: ScaleFormat | None = None,
) -> int:
    rank = Rank(group, memory, seed, form, scales, timeout_s=20.0 if memory is EmulatedMemory else 1.0)
    in_flight = random.Random(seed)
    return sum(rank.step(in_flight.randint(1, 2), split=in_flight.random() < 0.5) for _ in range(steps))


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_interleaving_gives_the_same_numbers(ranks, form):
    assert run_on_ranks(ranks, wrong_steps, EmulatedMemory, 0, 10, form) == [0] * ranks


@pytest.mark.parametrize("scales", SCHEMES)
def test_rows_that_are_quantized_as_they_are_sent(form, scales):
    assert run_on_ranks(2, wrong_steps, EmulatedMemory, 1, 4, form, scales) == [0, 0]


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 4])
def test_hundreds_of_routings(ranks, form):
    for seed in range(10):
        assert run_on_ranks(ranks, wrong_steps, EmulatedMemory, seed, 40, form) == [0] * ranks


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


class MakesRowsTooEarly(EmulatedMemory):
    """The experts' rows are replaced while another rank may still fetch those of the step before."""

    def dispatch(self, lane: int, *arguments: Any, **named: Any) -> None:
        self.area(lane, "sums", torch.float32, self.layout.sums, self.layout.pitch).fill_(torch.nan)
        super().dispatch(lane, *arguments, **named)


BROKEN = [CountsTooEarly, WaitsForItself, WaitsForTheStepBefore, WaitsForHalf, ClearsNoIds]
SENT_OR_FETCHED = [(broken, layout.BULK_FROM) for broken in BROKEN] + [
    (broken, 1) for broken in (*BROKEN, MakesRowsTooEarly)
]


@pytest.mark.parametrize(("broken", "bulk_from"), SENT_OR_FETCHED)
def test_without_one_of_its_pieces_it_is_wrong(broken, bulk_from, monkeypatch):
    monkeypatch.setattr(layout, "BULK_FROM", bulk_from)
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
    drawn, right = rank.batch(), True
    for sizes in ([0, 0], [M, M]):
        batch = attrs.evolve(drawn, sizes=sizes)
        dispatched, routing = rank.prepare(batch)
        right &= rank.arrivals_are_right(batch, dispatched)
        right &= torch.equal(rank.finalize(batch, dispatched, routing), rank.expected(batch))
    return right


def test_counts_are_kept_for_programs_that_read_them_late():
    assert run_on_ranks(2, an_empty_step_and_a_full_one, IdleProgramIsLate) == [True, True]
    assert run_on_ranks(2, an_empty_step_and_a_full_one, IdleProgramReadsTheNextCounts) != [True, True]


def late(group: VirtualGroup, stage: str, form: Form) -> tuple[list[str], torch.Tensor, int]:
    """What is said where rank 1 is late and then again, the step's results, and steps that are wrong after a reset."""
    rank = Rank(group, EmulatedMemory, 0, form, timeout_s=0.3)
    late, said, out = group.rank == 1, ["nothing", "nothing"], torch.zeros(M, H)
    batch = attrs.evolve(rank.batch(), sizes=[M] * group.size)
    for attempt in range(2):
        try:
            if late and stage == "dispatch":
                group.store.get("the others have given up")
            dispatched, routing = rank.prepare(batch)
            if late and stage == "combine":
                group.store.get("the others have given up")
            rank.finalize(batch, dispatched, routing, out=out)
        except CollectiveError as error:
            said[attempt] = str(error)
        finally:
            if not late:
                group.store.set("the others have given up", b"")
    rank.backend.reset()
    return said, out, sum(rank.step(2, split=bool(number % 2)) for number in range(4))


@pytest.mark.parametrize(("stage", "form"), [("dispatch", Form.STANDARD), ("combine", Form.EXACT)])
def test_all_ranks_learn_who_was_waited_for_and_go_on_after_a_reset(stage, form):
    for (first, second), out, wrong in run_on_ranks(3, late, stage, form):
        assert f"waited for rank 1 in {stage}" in first
        assert second == first  # nothing more is tried
        assert bool(out.isnan().all()) == (stage == "combine")  # a dispatch that is lost gives nothing to combine
        assert wrong == 0


def begin_reset_and_end(group: VirtualGroup) -> None:
    rank = Rank(group, EmulatedMemory, 4)
    batch = rank.batch()
    dispatched, routing = rank.prepare(batch)
    receive, _ = rank.prepare(batch, split=True)
    rank.backend.reset()
    with pytest.raises(MoEError, match="was reset"):
        rank.finalize(batch, dispatched, routing)
    with pytest.raises(MoEError, match="was reset"):
        receive()
    rank.backend.release(dispatched.handle)
    assert rank.step(2) == 0
    dispatched, routing = rank.prepare(batch)
    out = torch.empty(batch.sizes[group.rank], H)
    end = rank.backend.finalize_start(rank.expert_rows(batch, group.rank), dispatched.handle, routing, out)
    rank.backend.reset()
    with pytest.raises(MoEError, match="was reset"):
        end()
    assert rank.step(2) == 0


def test_a_reset_ends_what_is_in_flight():
    run_on_ranks(2, begin_reset_and_end)


def abandon(group: VirtualGroup, form: Form) -> torch.Tensor:
    rank = Rank(group, EmulatedMemory, 1, form)
    chosen = torch.tensor([E - 2, E - 1, -1] if form is not Form.STANDARD else [E - 1] * K)
    drawn = rank.batch()
    batch = attrs.evolve(drawn, ids=chosen.expand(group.size, M, K), sizes=[M] * group.size)
    dispatched, routing = rank.prepare(batch)  # all choose experts of the last rank
    out = torch.zeros(M, H)
    if group.rank == group.size - 1:
        rank.backend.release(dispatched.handle)
        rank.backend.release(dispatched.handle)  # a second time it is nothing
    else:
        out = rank.finalize(batch, dispatched, routing)
    assert rank.step(2) == 0  # both lanes are free, and the ranks are in step
    return out


def test_a_step_that_a_rank_gave_up_is_no_number(form):
    first, second, _ = run_on_ranks(3, abandon, form)
    assert bool(first.isnan().all())
    assert bool(second.isnan().all())


def fail_to_send(group: VirtualGroup) -> int:
    rank = Rank(group, EmulatedMemory, 5)
    batch = attrs.evolve(rank.batch(), sizes=[M] * group.size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank.backend._connection, "dispatch", None)
        with pytest.raises(TypeError):
            rank.prepare(batch)
    dispatched, routing = rank.prepare(batch)
    nothing: Any = None
    with pytest.raises(AttributeError):
        rank.backend.finalize(nothing, dispatched.handle, routing, torch.empty(M, H))
    rank.backend.release(dispatched.handle)  # as `MoEKernel` does
    return rank.step(2)


def test_what_was_not_sent_keeps_no_lane():
    assert run_on_ranks(2, fail_to_send) == [0, 0]


class TakesWholeTensors(EmulatedMemory):
    """As the kernels do."""

    def dispatch(self, lane: int, layer: Any, *sent: Any, **named: Any) -> None:
        assert all(tensor.is_contiguous() for tensor in sent)
        super().dispatch(lane, layer, *sent, **named)

    def combine(self, lane: int, layer: Any, y: torch.Tensor, *theirs: Any, **named: Any) -> None:
        assert all(tensor.is_contiguous() for tensor in (*theirs, *([] if self.layout.bulk else [y])))
        super().combine(lane, layer, y, *theirs, **named)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


def steps_on_strided_tensors(group: VirtualGroup, form: Form) -> int:
    rank, wrong = Rank(group, TakesWholeTensors, 7, form), 0
    drawn = rank.batch()
    batch = Batch(strided(drawn.x), strided(drawn.ids), strided(drawn.weights), [M] * group.size)
    for split in (False, True):
        arrived, routing = rank.prepare(batch, split=split)
        out, y = strided(torch.full((M, H), torch.nan)), strided(rank.expert_rows(batch, rank.rank))
        rank.finalize(batch, arrived() if split else arrived, routing, y=y, out=out, split=split)
        wrong += not torch.equal(out, rank.expected(batch))
    return wrong


def test_tensors_of_any_strides(form):
    assert run_on_ranks(2, steps_on_strided_tensors, form) == [0, 0]


def refuse(group: VirtualGroup) -> None:
    rank = Rank(group, EmulatedMemory, 2)
    batch = attrs.evolve(rank.batch(), sizes=[M] * group.size)
    most = rank.prepare(batch)
    other = rank.prepare(batch)
    with pytest.raises(MoEError, match="2 micro-batches are in flight"):
        rank.prepare(batch)
    for dispatched, routing in (other, most):
        rank.finalize(batch, dispatched, routing)
    with pytest.raises(MoEError, match="consumed"):
        rank.finalize(batch, *most)
    x, routing, named = rank.arguments(batch)
    with pytest.raises(CapacityError, match=r"T = 5 tokens.*max_tokens_per_rank = 4"):
        rank.backend.prepare(torch.ones(M + 1, H), routing, **named)
    for payload in ("fp8_block", "nvfp4"):
        with pytest.raises(MoEError, match=f"payload = '{payload}'"):
            rank.backend.prepare(x, routing, **named | {"payload": payload})


def test_what_can_not_be_is_refused():
    run_on_ranks(2, refuse)
