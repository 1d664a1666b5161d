"""What a dispatch case asks: each function drives the backend on virtual ranks and raises `Violation`.

Shape letters: T tokens on one rank · H hidden · E experts · E_l local experts · K top-k · R received rows · C capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from moe_core.errors import CapacityError, MoEError
from moe_core.kernel import Flight
from moe_core.testing.case import Skip, Violation
from moe_core.testing.compare import Truth, Untouched, as_bytes, check_numbers, same_bits
from moe_core.testing.dispatch_bench import DispatchBench, M, Rank, Setting
from moe_core.testing.oracle import IdentityExperts
from moe_core.testing.virtual import Faults
from moe_core.types import Routing

_MOST_IN_FLIGHT = 4
"""Steps that a case keeps in flight in one layer, of whoever declares a larger number."""
PATIENCE_S = 0.2
"""How long others wait for a rank that was made to vanish. Giving up too early is an error too, so it is allowed."""


def numbers(bench: DispatchBench, setting: Setting, duty: str, faults: Faults | None = None) -> None:
    """One step on every rank, against the truth."""
    bench.check(setting, bench.on_ranks(setting, Rank.run, faults=faults), duty, explain=True)


def runs(bench: DispatchBench, setting: Setting) -> None:
    """A layer is built, and one step ends; its numbers are for other cases."""
    bench.on_ranks(setting, Rank.run)


def many_steps(bench: DispatchBench, setting: Setting) -> None:
    """Six steps of one layer with other sizes each: nothing of a step may be left for the next."""
    outs = bench.on_ranks(setting, lambda rank: [rank.run(number) for number in range(6)])
    for number in range(6):
        bench.check(setting, [of_rank[number] for of_rank in outs], "no state between steps", number)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows apart": lambda t: torch.cat([t, torch.full_like(t, 7)], dim=1)[:, : t.shape[1]],
    "transposed": lambda t: t.T.contiguous().T,
    "every other column": lambda t: torch.stack([t, torch.full_like(t, 7)], dim=2).flatten(1)[:, ::2],
    "offset": lambda t: torch.cat([torch.full_like(t[:1], 7) if len(t) else t, t])[1 if len(t) else 0 :],
}
"""Ways in which a tensor `[T, N]` may lie in memory."""


def strided(bench: DispatchBench, setting: Setting, layout: str, what: str) -> None:
    """The same numbers, however the inputs lie; and what lies between them stays as it is."""

    def work(rank: Rank) -> torch.Tensor:
        x, routing = rank.batch()
        change = LAYOUTS[layout]
        if what == "hidden_states":
            x = change(x)
        else:
            routing = Routing(change(routing.topk_ids), change(routing.topk_weights))
        seen = Untouched(hidden_states=x, topk_ids=routing.topk_ids, topk_weights=routing.topk_weights)
        out = rank.land(rank.kernel.dispatch(x, routing))
        seen.check("the step")
        return out

    bench.check(setting, bench.on_ranks(setting, work), "strides")


def reads_only(bench: DispatchBench, setting: Setting) -> None:
    """No stage writes what it was handed: looked at after every stage."""

    def work(rank: Rank) -> torch.Tensor:
        x, routing = rank.batch()
        table = rank.kernel.expert_map.expert_map(rank.device)
        seen = Untouched(
            hidden_states=x, topk_ids=routing.topk_ids, topk_weights=routing.topk_weights, expert_map=table
        )
        flight = rank.kernel.dispatch(x, routing)
        seen.check("prepare")
        place = rank.backend.expert_output(flight.dispatched, flight.out)
        if place is not None and _share_memory(place, x):
            raise Violation("read-only inputs", "expert_output is the memory of hidden_states")
        rows = flight.dispatched.x
        held = as_bytes(rows).clone()  # no more of its storage: there other ranks may write what comes back
        expert_out = rank.kernel.run_experts(flight, rank.weights)
        seen.check("the experts, which write where expert_output says,")
        if not torch.equal(as_bytes(rows), held):
            raise Violation("read-only inputs", "the experts, which write where expert_output says, wrote into x")
        rank.kernel.combine(flight, expert_out)()
        seen.check("finalize")
        if _share_memory(flight.out, x):
            raise Violation("read-only inputs", "out is the memory of hidden_states")
        return flight.out

    bench.check(setting, bench.on_ranks(setting, work), "rows")


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(a.numel() and b.numel()) and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def flights(bench: DispatchBench, setting: Setting, order: Sequence[int]) -> None:
    """Several `prepare` before any `finalize`, and the finalizes in the given order."""
    _enough_slots(bench, len(order))

    def work(rank: Rank) -> list[torch.Tensor]:
        started = [rank.dispatch(number) for number in range(len(order))]
        computed = [rank.kernel.run_experts(flight, rank.weights) for flight in started]
        for number in order:
            rank.kernel.combine(started[number], computed[number])()
        return [flight.out for flight in started]

    outs = bench.on_ranks(setting, work)
    for number in range(len(order)):
        bench.check(setting, [of_rank[number] for of_rank in outs], "calls in flight", number)


def interleaved(bench: DispatchBench, setting: Setting) -> None:
    """A pipeline: the second batch starts before the first lands, the third before the second, …"""
    _enough_slots(bench, 2)

    def work(rank: Rank) -> list[torch.Tensor]:
        outs, flight = [], rank.dispatch(0)
        for number in range(1, 4):
            following = rank.dispatch(number)
            outs.append(rank.land(flight))
            flight = following
        return [*outs, rank.land(flight)]

    outs = bench.on_ranks(setting, work)
    for number in range(4):
        bench.check(setting, [of_rank[number] for of_rank in outs], "calls in flight", number)


def _enough_slots(bench: DispatchBench, wanted: int) -> None:
    limit = bench.candidate.capabilities.max_in_flight
    if limit is not None and limit < wanted:
        raise Skip(f"declares max_in_flight = {limit}")


def two_layers(bench: DispatchBench, setting: Setting) -> None:
    """Two layers of one model, each with as many steps in flight as are declared: they share nothing.

    Layers whose handles count together (`shared_in_flight`) have half as many each; of one alone they take turns.
    """
    caps = bench.candidate.capabilities
    each = 1 if caps.max_in_flight is None else min(caps.max_in_flight, _MOST_IN_FLIGHT)
    if caps.shared_in_flight:
        each //= 2

    def work(rank: Rank) -> list[torch.Tensor]:
        layers = (rank, bench.rank(setting, rank.group))
        if not each:
            return [layers[number % 2].run(number) for number in range(3)]
        started = [layers[number % 2].dispatch(number) for number in range(2 * each)]
        return [layers[number % 2].land(flight) for number, flight in enumerate(started)]

    outs = bench.on_ranks(setting, work)
    for number in range(len(outs[0])):
        bench.check(setting, [of_rank[number] for of_rank in outs], "no state between layers", number)


def shared_slots(bench: DispatchBench, setting: Setting) -> None:
    """Two layers whose handles count together: the step that is one too many is refused, and takes nothing."""
    limit = bench.candidate.capabilities.max_in_flight
    assert limit is not None, "who counts handles has a number of them"

    def work(rank: Rank) -> list[torch.Tensor]:
        layers = (rank, bench.rank(setting, rank.group))

        def all_slots(first: int) -> list[torch.Tensor]:
            started = [layers[number % 2].dispatch(first + number) for number in range(limit)]
            _refuses_another(layers[limit % 2], limit)
            return [layers[number % 2].land(flight) for number, flight in enumerate(started)]

        return all_slots(0) + all_slots(limit)

    outs = bench.on_ranks(setting, work)
    for number in range(2 * limit):
        bench.check(setting, [of_rank[number] for of_rank in outs], "calls in flight", number)


def _refuses_another(layer: Rank, limit: int) -> None:
    try:
        layer.dispatch()
    except MoEError as error:
        if "in flight" in str(error):
            return
        says = f"was refused without the reason, which is how many are in flight: {error}"
        raise Violation("calls in flight", f"a step too many over two layers {says}") from error
    says = f"shared_in_flight with max_in_flight = {limit} is declared"
    raise Violation("calls in flight", f"two layers had {limit + 1} steps in flight, and {says}")


def handle_once(bench: DispatchBench, setting: Setting, how: str) -> None:
    """A handle is taken once, with an error that says so the second time; None is not taken for one."""

    def work(rank: Rank) -> None:
        flight = rank.dispatch()
        expert_out = rank.kernel.run_experts(flight, rank.weights)
        handle: Any = None
        if how == "twice":
            handle = flight.dispatched.handle
            rank.kernel.combine(flight, expert_out)()
        try:
            rank.backend.finalize(expert_out, handle, flight.routing, torch.empty_like(flight.out))
        except MoEError:
            return
        except Exception as error:
            if how == "nothing":  # any error will do: the core never hands this in
                return
            raise Violation(
                "handles",
                f"a handle the second time raised {type(error).__name__}: {error}; the contract "
                "is a MoEError that says so",
            ) from error
        raise Violation("handles", f"finalize took {'the same handle twice' if how == 'twice' else 'None as a handle'}")

    bench.on_ranks(setting, work)


def handle_of_another(bench: DispatchBench, setting: Setting) -> None:
    """A handle of one layer in another layer's `finalize`: an error or the right numbers, never the other's rows."""
    if bench.launched is not None:
        raise Skip("a handle of another layer is asked on virtual ranks, where nobody waits for ever")

    def work(rank: Rank) -> torch.Tensor:
        other = bench.rank(setting, rank.group)
        flight = rank.dispatch(0)
        other.dispatch(1)
        expert_out = rank.kernel.run_experts(flight, rank.weights)
        other.backend.finalize(expert_out, flight.dispatched.handle, flight.routing, flight.out)
        return flight.out

    outs = bench.on_ranks(setting, work, return_errors=True)
    if not _raised(outs):
        bench.check(setting, outs, "handles")


def _raised(outs: Sequence[Any]) -> list[BaseException]:
    """The errors among what ranks returned; a violation is no answer, and is raised."""
    errors = [out for out in outs if isinstance(out, BaseException)]
    for error in errors:
        if isinstance(error, Violation | AssertionError):
            raise error
    return errors


def released(bench: DispatchBench, setting: Setting) -> None:
    """An exception in the experts gives the slot back: more often than there are slots, then a step that is right."""

    def work(rank: Rank) -> torch.Tensor:
        limit = bench.candidate.capabilities.max_in_flight
        for _ in range((limit or 2) + 1):
            flight = rank.dispatch()
            broken: Any = None
            try:
                rank.kernel.run_experts(flight, broken)
            except (AttributeError, TypeError):
                continue
            raise Skip("a rank got no rows, so its experts could not fail")
        return rank.run(1)

    bench.check(setting, bench.on_ranks(setting, work), "release", 1)


def unknown_payload(bench: DispatchBench, setting: Setting) -> None:
    """What it can't put on the wire it refuses; it does not send something else."""

    def work(rank: Rank) -> None:
        x, routing = rank.admitted()
        try:
            rank.backend.prepare(x, routing, **{**rank.named, "payload": "a scheme that nobody knows"})
        except (MoEError, ValueError):
            return
        raise Violation("refusals", "prepare took a payload that it does not know")

    bench.on_ranks(setting, work)


def too_many_tokens(bench: DispatchBench, setting: Setting, who: str) -> None:
    """One token above `max_tokens_per_rank`: the right numbers or an error, never wrong ones."""
    if bench.launched is not None and who != "all ranks":
        raise Skip("a rank that fails alone is asked on virtual ranks")

    def work(rank: Rank) -> torch.Tensor | None:
        x, routing = rank.batch()
        if who == "all ranks" or rank.group.rank == 0:
            x = torch.cat([x, x[:1]])
            routing = Routing(
                torch.cat([routing.topk_ids, routing.topk_ids[:1]]),
                torch.cat([routing.topk_weights, routing.topk_weights[:1]]),
            )
        out = rank.land(rank.kernel.dispatch(x, routing))
        rank.kernel.check()
        return out[: rank.setting.sizes()[rank.group.rank]]

    outs = bench.on_ranks(setting, work, return_errors=True)
    errors = _raised(outs)
    if not errors:
        bench.check(setting, [out for out in outs if out is not None], "capacity")
    elif not any(isinstance(error, CapacityError) for error in errors):
        raise Violation(
            "capacity",
            f"T = {M + 1} with max_tokens_per_rank = {setting.most} raised {type(errors[0]).__name__}: {errors[0]}; "
            "the contract is a CapacityError that says which limit to raise",
        )


def split_is_whole(bench: DispatchBench, setting: Setting) -> None:
    """Both forms give the same bits."""

    def work(rank: Rank) -> tuple[torch.Tensor, torch.Tensor]:
        x, routing = rank.admitted()
        outs = [torch.full_like(x, torch.nan) for _ in range(2)]
        for out, split in zip(outs, (True, False), strict=True):
            if split:
                dispatched = rank.backend.prepare_start(x, routing, **rank.named)()
            else:
                dispatched = rank.backend.prepare(x, routing, **rank.named)
            expert_out = rank.kernel.run_experts(Flight(dispatched, routing, out), rank.weights)
            if split:
                rank.backend.finalize_start(expert_out, dispatched.handle, routing, out)()
            else:
                rank.backend.finalize(expert_out, dispatched.handle, routing, out)
        return outs[0], outs[1]

    outs = bench.on_ranks(setting, work)
    bench.check(setting, [whole for _, whole in outs], "split form")
    for rank, (split_out, whole) in enumerate(outs):
        if not same_bits(split_out, whole):
            raise Violation("split form", f"rank {rank}: prepare and prepare_start … finalize_start differ in bits")


def halves_interleaved(bench: DispatchBench, setting: Setting) -> None:
    """Two steps whose halves alternate: both prepares start before either is received, and so do both finalizes."""
    _enough_slots(bench, 2)

    def work(rank: Rank) -> list[torch.Tensor]:
        batches = [rank.admitted(number) for number in range(2)]
        receives = [rank.backend.prepare_start(x, routing, **rank.named) for x, routing in batches]
        started = [
            Flight(receive(), routing, torch.full_like(x, torch.nan))
            for receive, (x, routing) in zip(receives, batches, strict=True)
        ]
        results = [rank.kernel.run_experts(flight, rank.weights) for flight in started]
        finishes = [
            rank.backend.finalize_start(result, flight.dispatched.handle, flight.routing, flight.out)
            for result, flight in zip(results, started, strict=True)
        ]
        for finish in finishes:
            finish()
        return [flight.out for flight in started]

    outs = bench.on_ranks(setting, work)
    for number in range(2):
        bench.check(setting, [of_rank[number] for of_rank in outs], "split form", number)


def late_receive(bench: DispatchBench, setting: Setting) -> None:
    """Between the halves of the split form other work runs, which reuses memory: the second half must not care."""

    def work(rank: Rank) -> torch.Tensor:
        x, routing = rank.batch()
        flight = rank.kernel.dispatch(x, routing)
        expert_out = rank.kernel.run_experts(flight, rank.weights)
        finish = rank.kernel.combine(flight, expert_out)
        scratch = [torch.full_like(expert_out, torch.nan) for _ in range(3)]
        finish()
        del scratch
        return flight.out

    bench.check(setting, bench.on_ranks(setting, work), "split form")


def same_each_time(bench: DispatchBench, setting: Setting) -> None:
    """The same bits in the same layer, in another one, and whichever rank comes first."""
    twice = bench.on_ranks(setting, lambda rank: [rank.run(), rank.run()])
    faults = Faults(jitter=0.001, seed=3) if bench.launched is None else None  # real ranks jitter by themselves
    others = bench.on_ranks(setting, Rank.run, faults=faults)
    for rank, ((first, second), other) in enumerate(zip(twice, others, strict=True)):
        if not same_bits(first, second):
            raise Violation("determinism", f"rank {rank}: the second step gave other bits for the same inputs")
        if not same_bits(first, other):
            raise Violation("determinism", f"rank {rank}: other bits when ranks arrive in another order")


def spreads_nothing(bench: DispatchBench, setting: Setting, value: float) -> None:
    """NaN or Inf in one token of rank 0 reaches that token's row and no other."""

    def work(rank: Rank) -> torch.Tensor:
        x, routing = rank.batch()
        if (rank.group.rank == 0 or setting.topology == "replicated") and x.shape[0]:
            x[0, 1] = value
        return rank.land(rank.kernel.dispatch(x, routing))

    outs = bench.on_ranks(setting, work)
    clean = bench.on_ranks(setting, Rank.run)
    for rank, (out, usual) in enumerate(zip(outs, clean, strict=True)):
        hit = rank == 0 or setting.topology == "replicated"
        if hit and bench.possible(setting).output_is_reduced and bool(out[:1].isfinite().any()):
            raise Violation("rows", f"rank {rank}: a token with {value} in it came out finite")
        kept = slice(1 if hit else 0, None)
        if not torch.allclose(out[kept].double(), usual[kept].double(), rtol=1e-3, atol=1e-3):
            raise Violation("padding is not read", f"rank {rank}: {value} in one token changed another token's row")


def survives(bench: DispatchBench, setting: Setting, collective: int) -> None:
    """A rank vanishes: every other one ends, with an error or with the right numbers."""
    gone = setting.world - 1
    faults = Faults(drop={gone: collective})
    outs = bench.on_ranks(setting, Rank.run, faults=faults, timeout_s=PATIENCE_S, return_errors=True)
    _raised([out for rank, out in enumerate(outs) if rank != gone])
    if all(isinstance(out, torch.Tensor) for out in outs):
        bench.check(setting, outs, "faults")
        raise Skip(f"a step has no collective number {collective}")
    right = bench.on_ranks(setting, Rank.run)
    for rank, out in enumerate(outs):
        returned = isinstance(out, torch.Tensor) and rank != gone
        if returned and not torch.allclose(out.double(), right[rank].double(), rtol=1e-2, atol=1e-2):
            raise Violation("faults", f"rank {gone} vanished, and rank {rank} returned wrong numbers")


def writes_all(bench: DispatchBench, setting: Setting) -> None:
    """`finalize` writes every element of `out`, whatever stood in it, and nothing beside it."""

    def work(rank: Rank) -> torch.Tensor:
        flight = rank.dispatch()
        wide = torch.full((flight.out.shape[0] + 2, flight.out.shape[1]), 77.0, dtype=flight.out.dtype)
        wide = wide.to(rank.device)
        before = wide.clone()
        flight = attrs.evolve(flight, out=wide[1:-1])
        out = rank.land(flight)
        for row in (0, -1):
            if not same_bits(wide[row], before[row]):
                raise Violation("out is written whole", "finalize wrote beside out")
        return out

    bench.check(setting, bench.on_ranks(setting, work), "out is written whole")


def empty_steps(bench: DispatchBench, setting: Setting) -> None:
    """A step without tokens between two with some: every rank enters the same collectives."""
    nobody = attrs.evolve(setting, tokens="none")

    def work(rank: Rank) -> tuple[torch.Tensor, torch.Tensor]:
        first = rank.run(0)
        empty = attrs.evolve(rank, setting=nobody).run(0)
        if tuple(empty.shape) != (0, setting.hidden):
            raise Violation("empty steps", f"no tokens gave {tuple(empty.shape)}")
        return first, rank.run(1)

    outs = bench.on_ranks(setting, work)
    bench.check(setting, [first for first, _ in outs], "empty steps")
    bench.check(setting, [second for _, second in outs], "empty steps", 1)


def captured(bench: DispatchBench, setting: Setting) -> None:
    """A dispatch and its combine can be captured in a CUDA graph, and a replay follows its inputs."""
    if bench.device.type != "cuda":
        raise Skip("CUDA graphs need a CUDA device")

    def work(rank: Rank) -> None:
        rank.kernel.experts[:] = [IdentityExperts()]
        x, routing = rank.batch(0)

        def step() -> torch.Tensor:
            return rank.land(rank.kernel.dispatch(x, routing))

        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for number in (0, 4):  # batches of one size
            fresh, chosen = rank.batch(number)
            x.copy_(fresh)
            routing.topk_ids.copy_(chosen.topk_ids)
            routing.topk_weights.copy_(chosen.topk_weights)
            graph.replay()
            total = chosen.topk_weights.double().sum(dim=1, keepdim=True).cpu()
            wanted = Truth.of(fresh.double().cpu() * total)
            check_numbers(out.cpu(), wanted, duty="graph capture", steps=16.0)

    bench.on_ranks(setting, work)
