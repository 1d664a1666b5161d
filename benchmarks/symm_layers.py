"""Whole layers between GPUs of one host, behind moe-symm and NIXL EP in one run: what is a faster dispatch worth?

    torchrun --standalone --nproc-per-node 4 -m benchmarks.symm_layers [--json layers.json]

All have the same weights and the same experts; `symm_batched` hands them rows as NIXL EP does. Before a layer is timed,
some tokens are computed anew in fp32, each by the weights of its experts, and the layers' whole outputs are compared.

Printed for each: a pair of dispatch and combine alone, a step, what of the step is no GEMM; then beside NIXL EP's how
often this fits into NIXL EP's, the share of the time saved on the pair that is saved on the step, how much faster the
step is, and how much it could be: down to the time in which the weights of the chosen experts can be read.

A saving of 15 us in a step of 1500 is less than what a chip's clocks drift by in a second. So all graphs take turns,
replay by replay, and what is saved is the median of the differences within a turn. Beside the share stands what each
fifth of the turns, taken alone, gives: the least and the most.

Shape letters: T tokens on this rank · H hidden · I intermediate · E experts · K top-k.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist

import moe_core
from benchmarks.cases import ceilings, relative_error
from benchmarks.ranks import LARGE, Ranks, SharedExpert
from moe_core.timing import capture

OURS, THEIRS = ("symm", "symm_batched"), "nixl_ep"
TOKENS = (1, 8, 64, 128)
SKEWED = (8, 128)
INTERMEDIATE = (2048, 256)
SCHEMES = {"unquantized": 2, "fp8_block": 1}  # bytes of a weight
HOT = 20.0  # a logit that is always chosen
SETS = 8  # of inputs, all in one graph; even, since NIXL EP has two buffers that take turns
TURNS = 40  # of all graphs
PARTS = 5  # of the turns, for the spread
REPLAYS = 6  # under the profiler
PROBED = 2  # tokens that are computed anew
ERROR = 0.006  # relative Frobenius: one rounding of activations and rows each to bf16
MATMUL = re.compile(r"slots_|scan_|stream_|gemm|alternating|specialized")  # kernels that stream weights


@attrs.frozen
class Case:
    """One cell: all layers are timed on the same tokens."""

    scheme: str
    intermediate: int
    routing: str
    tokens: int


def logits_of(routing: str, shape: tuple[int, int], generator: torch.Generator, size: int) -> torch.Tensor:
    """Random; with one expert, or K experts of the first rank, that everybody chooses."""
    logits = torch.randn(shape, generator=generator, device=generator.device)
    if routing == "hot expert":
        logits[:, 0] += HOT
    elif routing == "hot rank":
        logits[:, : shape[1] // size] += HOT
    return logits


def inputs(ranks: Ranks, case: Case, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(ranks.device).manual_seed(1000 * seed + ranks.rank)
    x = torch.randn(case.tokens, LARGE["hidden_size"], generator=generator, device=ranks.device).bfloat16()
    return x, logits_of(case.routing, (case.tokens, LARGE["num_experts"]), generator, ranks.size)


def choices(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids of softmax, then top-k: what the layers' router does by default."""
    return logits.softmax(dim=1).topk(LARGE["top_k"], dim=1)


def computed_anew(x: torch.Tensor, logits: torch.Tensor, intermediate: int) -> torch.Tensor:
    """`[T, H]` in fp32, from weights drawn as `benchmarks.ranks.fill` draws them."""
    hidden, out = x.shape[1], torch.zeros(x.shape, device=x.device)
    weights, ids = choices(logits)
    for token, k in itertools.product(range(len(x)), range(LARGE["top_k"])):
        generator = torch.Generator(x.device).manual_seed(int(ids[token, k]))

        def drawn(rows: int, columns: int, generator: torch.Generator = generator) -> torch.Tensor:
            values = torch.randn((rows, columns), generator=generator, device=generator.device)
            return values.mul_(columns**-0.5).bfloat16().float()

        gate, up = drawn(intermediate, hidden), drawn(intermediate, hidden)
        row = x[token].float()
        act = torch.nn.functional.silu(gate @ row) * (up @ row)
        out[token] += weights[token, k] * (drawn(hidden, intermediate) @ act)
    return out


def are_right(ranks: Ranks, layers: dict[str, Any], case: Case) -> bool:
    """Both against fp32 and against each other. Quantized, both are as far from fp32 as the scheme takes them."""
    x, logits = inputs(ranks, case, 0)
    wanted = computed_anew(x[:PROBED], logits[:PROBED], case.intermediate)
    outs = {name: layer(x, router_logits=logits) for name, layer in layers.items()}
    off = {name: ranks.worst(relative_error(out[:PROBED], wanted)) for name, out in outs.items()}
    apart = {name: ranks.worst(relative_error(outs[name], outs[THEIRS])) for name in OURS}
    if case.scheme == "unquantized":
        fine = max(*off.values(), *apart.values()) <= ERROR
    else:
        fine = max(off.values()) <= 1.05 * min(off.values())
    shown = ", ".join(f"{name} {error:.4f}" for name, error in off.items())
    others = ", ".join(f"{name} {error:.4f}" for name, error in apart.items())
    ranks.say(f"T {case.tokens}: from fp32 {shown}; from {THEIRS} {others}{'' if fine else '  WRONG'}")
    return fine


def in_turns(ranks: Ranks, calls: dict[str, list[Callable[[], object]]]) -> dict[str, torch.Tensor]:
    """A graph per name, replayed in turns, forth and back: name → microseconds per call `[TURNS]`, slowest rank."""
    graphs = {name: capture(each) for name, each in calls.items()}
    order, warmup = list(graphs), 2
    turns = [order[::-1] if turn % 2 else order for turn in range(warmup + TURNS)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(len(order) + 1)] for _ in turns]
    ranks.group.barrier()
    for turn, marks in zip(turns, events, strict=True):
        for name, mark in zip(turn, marks, strict=False):
            mark.record()
            graphs[name].replay()
        marks[-1].record()
    torch.cuda.synchronize()
    us = torch.zeros(len(order), TURNS, device=ranks.device)
    for number, (turn, marks) in enumerate(zip(turns[warmup:], events[warmup:], strict=True)):
        for place, name in enumerate(turn):
            ms = marks[place].elapsed_time(marks[place + 1])
            us[order.index(name), number] = ms * 1e3 / len(calls[name])
    dist.all_reduce(us, op=dist.ReduceOp.MAX)
    return dict(zip(order, us.cpu(), strict=True))


def saved(theirs: torch.Tensor, ours: torch.Tensor, saved_on_pair: float) -> list[float]:
    """The share of what the pair saves that the step saves: of all turns, then the least and most of their parts."""
    differences = theirs - ours
    shares = [each.median().item() / saved_on_pair for each in (differences, *differences.chunk(PARTS))]
    return [shares[0], min(shares[1:]), max(shares[1:])]


def steps(ranks: Ranks, layer: Any, case: Case) -> list[Callable[[], object]]:
    sets = [inputs(ranks, case, seed) for seed in range(SETS)]
    return [functools.partial(layer, x, router_logits=logits) for x, logits in sets]


def pairs(ranks: Ranks, layer: Any, case: Case) -> list[Callable[[], object]]:
    """Dispatch and combine alone, of the same tokens as the steps; the experts' rows are whatever is there."""
    kernel = layer.kernel
    made: list[torch.Tensor] = []

    def pair(x: torch.Tensor, routing: moe_core.Routing) -> None:
        flight = kernel.dispatch(x, routing)
        if not made:
            place = kernel.prepare_finalize.expert_output(flight.dispatched, flight.out)
            shape = (*flight.dispatched.x.shape[:-1], x.shape[1])
            made.append(torch.randn(shape, device=x.device).bfloat16() if place is None else place)
        kernel.combine(flight, made[0])()

    def routed(seed: int) -> Callable[[], object]:
        x, logits = inputs(ranks, case, seed)
        weights, ids = choices(logits)
        return functools.partial(pair, x, moe_core.Routing(ids, weights))

    return [routed(seed) for seed in range(SETS)]


def not_matmul_us(ranks: Ranks, calls: list[Callable[[], object]]) -> tuple[float, dict[str, float]]:
    """Of a step, what is no GEMM; from the kernels' own times, as a graph of all calls is replayed.

    A kernel takes from the end of the one before it to its own end. Steps and GEMMs are those of the rank where they
    take longest. The first replay and the first step of each are left out: ranks begin them apart. Of each step the
    median of the replays is taken.

    Returns: (per step, kernel → time per step on this rank).
    """
    graph = capture(calls)
    ranks.group.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    kernels.sort(key=lambda event: event.time_range.start)
    launched, left = divmod(len(kernels), REPLAYS * len(calls))
    assert not left, f"{len(kernels)} kernels in {REPLAYS} × {len(calls)} steps"
    names = [kernel.name for kernel in kernels]
    start, end = torch.tensor([[k.time_range.start, k.time_range.end] for k in kernels], dtype=torch.float64).T
    reached = end.cummax(0).values
    before = torch.cat([start[:1], reached[:-1]])
    streams = torch.tensor([bool(MATMUL.search(name)) for name in names])
    spans = torch.stack([reached - before, (reached - before.maximum(start)) * streams])
    spans = spans.view(2, REPLAYS, len(calls), launched).to(ranks.device)
    own = spans[0, 1:, 1:].median(0).values.mean(0).tolist()
    longest = spans.sum(3)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    assert longest[1].all(), f"no kernel is known as a GEMM among {sorted(set(names))}"
    rest = (longest[0] - longest[1])[1:, 1:].median(0).values.mean().item()
    return rest, {name: sum(us for us, of in zip(own, names, strict=False) if of == name) for name in names[:launched]}


def stream_us(ranks: Ranks, case: Case, copy_rate: float) -> float:
    """The weights of the experts that a step touches, on the rank that has most of them: no step is shorter."""
    touched = []
    for seed in range(SETS):
        _, ids = choices(inputs(ranks, case, seed)[1])
        chosen = ids.new_zeros(LARGE["num_experts"]).index_fill_(0, ids.flatten(), 1)
        dist.all_reduce(chosen, op=dist.ReduceOp.MAX)
        touched.append(chosen.view(ranks.size, -1).sum(1).max().item())
    weights = 3 * LARGE["hidden_size"] * case.intermediate * SCHEMES[case.scheme]
    return sum(touched) / SETS * weights / copy_rate * 1e6


def measure(ranks: Ranks, layers: dict[str, Any], case: Case, copy_rate: float) -> dict[str, Any]:
    calls = {name: steps(ranks, layer, case) for name, layer in layers.items()}
    pair = in_turns(ranks, {name: pairs(ranks, layer, case) for name, layer in layers.items()})
    step = in_turns(ranks, calls)
    stream = stream_us(ranks, case, copy_rate)
    found: dict[str, Any] = attrs.asdict(case) | {"stream_us": stream}
    for name in (THEIRS, *OURS):
        rest, kernels = not_matmul_us(ranks, calls[name])
        pair_us, step_us = pair[name].median().item(), step[name].median().item()
        found[name] = {"pair_us": pair_us, "step_us": step_us, "not_matmul_us": rest, "kernels_us": kernels}
        line = f"{case.tokens:5} {name:13} {pair_us:7.1f} {step_us:8.1f} {rest:8.1f}"
        if name != THEIRS:
            shares = saved(step[THEIRS], step[name], (pair[THEIRS] - pair[name]).median().item())
            faster, rest_faster = found[THEIRS]["step_us"] / step_us, found[THEIRS]["not_matmul_us"] / rest
            found[name] |= {"saved": shares, "faster": faster, "not_matmul_faster": rest_faster}
            line += f"  {rest_faster:5.2f}   {shares[0]:5.2f} ({shares[1]:5.2f} to {shares[2]:5.2f}) {faster:7.3f}"
            line += f" (ceiling {found[THEIRS]['step_us'] / stream:.2f})"
        ranks.say(line)
    return found


def all_of(ranks: Ranks, case: Case, **options: Any) -> dict[str, Any]:
    sizes = LARGE | {"intermediate_size": case.intermediate}
    return {name: ranks.layer(sizes, name, case.scheme, cuda_graph=True, **options) for name in (*OURS, THEIRS)}


def tables(ranks: Ranks, cases: list[Case]) -> Iterator[dict[str, Any]]:
    copy_rate, _ = ceilings()
    for (scheme, intermediate), group in itertools.groupby(cases, lambda case: (case.scheme, case.intermediate)):
        wanted = list(group)
        layers = all_of(ranks, wanted[0])
        payloads = {name: layer.plan.payload for name, layer in layers.items()}
        ranks.say(f"\n{scheme}, I = {intermediate}; on the wire {payloads}; copy {copy_rate / 1e12:.2f} TB/s")
        for routing, of_routing in itertools.groupby(wanted, lambda case: case.routing):
            cells = list(of_routing)
            if not all(are_right(ranks, layers, cell) for cell in cells):
                yield attrs.asdict(cells[0]) | {"wrong": True}
                continue
            ranks.say(f"{routing}, us:\n    T                  pair     step  no GEMM  ratio   saved   faster")
            yield from (measure(ranks, layers, cell, copy_rate) for cell in cells)
        del layers
        torch.cuda.empty_cache()


def overlap(ranks: Ranks) -> Iterator[dict[str, Any]]:
    """A step with a shared expert: before the dispatch, inside the combine, or on a stream of its own."""
    case = Case("unquantized", INTERMEDIATE[0], "uniform", TOKENS[-1])
    shared = SharedExpert(LARGE["hidden_size"], case.intermediate, ranks.device)
    orders = moe_core.SharedExpertsOrder
    ranks.say(f"\nwith a shared expert, I = {case.intermediate}, T = {case.tokens}: us a step")
    first: dict[str, torch.Tensor] = {}
    for order in (orders.SEQUENTIAL, orders.INTERNAL, orders.MULTI_STREAM):
        layers = all_of(ranks, case, shared=shared, shared_experts_order=order)
        x, logits = inputs(ranks, case, 0)
        outs = {name: layer(x, router_logits=logits) for name, layer in layers.items()}
        first = first or outs
        wrong = max(ranks.worst(relative_error(outs[name], first[name])) for name in outs)
        if wrong > ERROR:
            ranks.say(f"{order.name}: WRONG, {wrong:.4f} from {orders.SEQUENTIAL.name}")
            yield {"order": order.name, "wrong": True}
            continue
        turns = in_turns(ranks, {name: steps(ranks, layer, case) for name, layer in layers.items()})
        step = {name: us.median().item() for name, us in turns.items()}
        ranks.say(f"{order.name:14} " + ", ".join(f"{name} {us:.1f}" for name, us in step.items()))
        yield {"order": order.name, "step_us": step}
        del layers
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="steps,skew,overlap", help="(default: %(default)s)")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    parts, ranks = options.parts.split(","), Ranks()
    ranks.say(f"{ranks.size} × {torch.cuda.get_device_name()}, torch {torch.__version__}; {LARGE}")
    cases = []
    for scheme, intermediate in itertools.product(options.schemes.split(","), INTERMEDIATE):
        if "steps" in parts:
            cases += [Case(scheme, intermediate, "uniform", tokens) for tokens in TOKENS]
        if "skew" in parts and scheme == "unquantized" and intermediate == INTERMEDIATE[0]:
            skews = itertools.product(("hot expert", "hot rank"), SKEWED)
            cases += [Case(scheme, intermediate, skew, tokens) for skew, tokens in skews]
    found = []
    for row in itertools.chain(tables(ranks, cases), overlap(ranks) if "overlap" in parts else ()):
        found.append(row)
        if options.json and ranks.rank == 0:
            options.json.write_text(json.dumps({"ranks": ranks.size, "rows": found}, indent=1))
    ranks.group.barrier()
    dist.destroy_process_group()
    if any(row.get("wrong") for row in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
