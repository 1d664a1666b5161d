"""Whole layers between GPUs of one host, behind moe-symm and NIXL EP in one run: what is a faster dispatch worth?

    torchrun --standalone --nproc-per-node 4 -m benchmarks.symm_layers [--json layers.json]

All have the same weights and the same experts; `symm_batched` hands them rows as NIXL EP does. Before a layer is timed,
some tokens are computed anew in fp32, each by the weights of its experts, and the layers' whole outputs are compared.

Printed for each: a pair of dispatch and combine alone, a step, what of the step is no GEMM; then beside NIXL EP's how
often this fits into NIXL EP's, the share of the time saved on the pair that is saved on the step, how much faster the
step is, and how much it could be: down to the time in which the weights of the chosen experts can be read.

Shape letters: T tokens on this rank · H hidden · I intermediate · E experts · K top-k.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist

import moe_core
from benchmarks.cases import ceilings, relative_error
from benchmarks.ranks import LARGE, Ranks, SharedExpert
from moe_core.timing import capture, event_us

OURS, THEIRS = ("symm", "symm_batched"), "nixl_ep"
TOKENS = (1, 8, 64, 128)
SKEWED = (8, 128)
INTERMEDIATE = (2048, 256)
SCHEMES = {"unquantized": 2, "fp8_block": 1}  # bytes of a weight
HOT = 20.0  # a logit that is always chosen
SETS = 4  # of inputs; even, since NIXL EP has two buffers that take turns
PAIRS = 10
ROUNDS = 3
REPLAYS = 4  # under the profiler
PROBED = 2  # tokens that are computed anew
ERROR = 0.006  # relative Frobenius: one rounding of activations and rows each to bf16
MATMUL = re.compile(r"slots_|scan_|gemm|alternating|specialized")  # kernels that stream weights


@attrs.frozen
class Case:
    """One cell: both layers are timed on the same tokens."""

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


def interleaved_us(ranks: Ranks, calls: dict[str, list[Callable[[], object]]]) -> dict[str, float]:
    """One graph per name, replayed in turns so that what drifts hits all; the slowest rank's best, per call."""
    graphs = {name: capture(each) for name, each in calls.items()}
    best = dict.fromkeys(calls, float("inf"))
    for _, name in itertools.product(range(ROUNDS), calls):
        ranks.group.barrier()
        best[name] = min(best[name], event_us(graphs[name].replay, repeats=10) / len(calls[name]))
    return {name: ranks.worst(us) for name, us in best.items()}


def steps(ranks: Ranks, layer: Any, case: Case) -> list[Callable[[], object]]:
    sets = [inputs(ranks, case, seed) for seed in range(SETS)]
    return [functools.partial(layer, x, router_logits=logits) for x, logits in sets]


def pairs(ranks: Ranks, layer: Any, case: Case) -> list[Callable[[], object]]:
    """Dispatch and combine alone; the experts' rows are whatever is there."""
    x, logits = inputs(ranks, case, 0)
    weights, ids = choices(logits)
    kernel = layer.kernel
    made: list[torch.Tensor] = []

    def pair() -> None:
        flight = kernel.dispatch(x, moe_core.Routing(ids, weights))
        if not made:
            place = kernel.prepare_finalize.expert_output(flight.dispatched, flight.out)
            shape = (*flight.dispatched.x.shape[:-1], x.shape[1])
            made.append(torch.randn(shape, device=x.device).bfloat16() if place is None else place)
        kernel.combine(flight, made[0])()

    return [pair] * PAIRS


def not_matmul_us(ranks: Ranks, calls: list[Callable[[], object]]) -> tuple[float, dict[str, float]]:
    """Of a step, what is no GEMM; from the kernels' own times, as a graph of all calls is replayed.

    A kernel takes from the end of the one before it to its own end. Steps and GEMMs are those of the rank where they
    take longest. The first replay and the first step of each are left out: ranks begin them apart.

    Returns: (per step, kernel → time per step on this rank).
    """
    graph, steps = capture(calls), REPLAYS * len(calls)
    ranks.group.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    kernels.sort(key=lambda event: event.time_range.start)
    assert len(kernels) % steps == 0, f"{len(kernels)} kernels in {steps} steps"
    kept = [step for step in range(len(calls), steps) if step % len(calls)]
    spans, of_kernel = torch.zeros(2, steps), defaultdict[str, float](float)
    reached = kernels[0].time_range.start
    for number, kernel in enumerate(kernels):
        step, before = number * steps // len(kernels), reached
        reached = max(reached, kernel.time_range.end)
        spans[0, step] += reached - before
        if MATMUL.search(kernel.name):
            spans[1, step] += reached - max(before, kernel.time_range.start)
        if step in kept:
            of_kernel[kernel.name] += (reached - before) / len(kept)
    longest = spans.to(ranks.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    assert longest[1].all(), f"no kernel is known as a GEMM among {sorted(of_kernel)}"
    return (longest[0] - longest[1])[kept].mean().item(), dict(of_kernel)


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
    pair = interleaved_us(ranks, {name: pairs(ranks, layer, case) for name, layer in layers.items()})
    step = interleaved_us(ranks, calls)
    stream = stream_us(ranks, case, copy_rate)
    ceiling = f"(ceiling {step[THEIRS] / stream:.2f})"
    found: dict[str, Any] = attrs.asdict(case) | {"stream_us": stream}
    for name in (THEIRS, *OURS):
        rest, kernels = not_matmul_us(ranks, calls[name])
        found[name] = {"pair_us": pair[name], "step_us": step[name], "not_matmul_us": rest, "kernels_us": kernels}
        line = f"{case.tokens:5} {name:13} {pair[name]:7.1f} {step[name]:8.1f} {rest:8.1f}"
        if name != THEIRS:
            saved = (step[THEIRS] - step[name]) / (pair[THEIRS] - pair[name])
            faster, rest_faster = step[THEIRS] / step[name], found[THEIRS]["not_matmul_us"] / rest
            found[name] |= {"saved": saved, "faster": faster, "not_matmul_faster": rest_faster}
            line += f"  {rest_faster:5.2f} {saved:8.2f} {faster:8.3f} {ceiling}"
        ranks.say(line)
    return found


def both(ranks: Ranks, case: Case, **options: Any) -> dict[str, Any]:
    sizes = LARGE | {"intermediate_size": case.intermediate}
    return {name: ranks.layer(sizes, name, case.scheme, cuda_graph=True, **options) for name in (*OURS, THEIRS)}


def tables(ranks: Ranks, cases: list[Case]) -> Iterator[dict[str, Any]]:
    copy_rate, _ = ceilings()
    for (scheme, intermediate), group in itertools.groupby(cases, lambda case: (case.scheme, case.intermediate)):
        wanted = list(group)
        layers = both(ranks, wanted[0])
        payloads = {name: layer.plan.payload for name, layer in layers.items()}
        ranks.say(f"\n{scheme}, I = {intermediate}; on the wire {payloads}; copy {copy_rate / 1e12:.2f} TB/s")
        for routing, of_routing in itertools.groupby(wanted, lambda case: case.routing):
            cells = list(of_routing)
            if not all(are_right(ranks, layers, cell) for cell in cells):
                yield {"scheme": scheme, "intermediate": intermediate, "routing": routing, "wrong": True}
                continue
            ranks.say(f"{routing}, us:\n    T                  pair     step  no GEMM  ratio    saved   faster")
            yield from [measure(ranks, layers, cell, copy_rate) for cell in cells]
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
        layers = both(ranks, case, shared=shared, shared_experts_order=order)
        x, logits = inputs(ranks, case, 0)
        outs = {name: layer(x, router_logits=logits) for name, layer in layers.items()}
        first = first or outs
        wrong = max(ranks.worst(relative_error(outs[name], first[name])) for name in outs)
        if wrong > ERROR:
            ranks.say(f"{order.name}: WRONG, {wrong:.4f} from {orders.SEQUENTIAL.name}")
            yield {"order": order.name, "wrong": True}
            continue
        step = interleaved_us(ranks, {name: steps(ranks, layer, case) for name, layer in layers.items()})
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
    found = list(tables(ranks, cases))
    if "overlap" in parts:
        found += overlap(ranks)
    if options.json and ranks.rank == 0:
        options.json.write_text(json.dumps({"ranks": ranks.size, "rows": found}, indent=1))
    ranks.group.barrier()
    dist.destroy_process_group()
    if any(row.get("wrong") for row in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
