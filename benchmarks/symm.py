"""moe-symm between the GPUs of one host: every bit of it, a rank that does not come, and its time.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.symm [--json symm.json]

Nothing is timed before it is right: each check counts the elements whose bits differ from a reference in plain torch,
on every rank, and all timed graphs are compared too. Every phase has a time limit.

Shape letters: T tokens on this rank · M the largest T · H hidden · E experts · K top-k · W ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist

from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.errors import CollectiveError
from moe_core.expert_map import ExpertMapManager
from moe_core.group import TorchGroup
from moe_core.timing import capture, event_us
from moe_core.types import MODEL_DTYPE_PAYLOAD, Dispatched, ExpertPlacement, Routing
from moe_symm.peers import connect
from moe_symm.prepare_finalize import SymmPrepareAndFinalize, make

TOKENS = (1, 8, 64, 128)
PAIRS = 10
LIMIT_S = 40
CYCLES = 400_000  # of the longest delay of a rank: about 0.2 ms


@attrs.frozen
class Shape:
    """A layer: what `MoEConfig` wants to know."""

    hidden: int
    experts: int = 256
    top_k: int = 8
    tokens: int = 128
    dtype: torch.dtype = torch.bfloat16
    placement: ExpertPlacement = ExpertPlacement.LINEAR


LARGE, MEDIUM = Shape(7168), Shape(4096)
ODD = (
    Shape(2056, experts=10, top_k=5, tokens=33, dtype=torch.float16),
    Shape(77, experts=9, top_k=3, tokens=7, dtype=torch.float32, placement=ExpertPlacement.ROUND_ROBIN),
)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A part that must end in time."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    began = time.monotonic()
    yield
    faulthandler.cancel_dump_traceback_later()
    say(f"-- {name}: {time.monotonic() - began:.1f} s")


class Bench:
    """One shape over all ranks: every rank knows every rank's tokens and experts' rows, since it can draw them."""

    def __init__(self, group: TorchGroup, shape: Shape) -> None:
        self.group, self.shape, self.rank, self.size = group, shape, group.rank, group.size
        config = MoEConfig(
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden_size=shape.hidden,
            intermediate_size=64,
            max_tokens_per_rank=shape.tokens,
            dtype=shape.dtype,
        )
        parallel = MoEParallelConfig.fold(dp_size=group.size, dp_rank=group.rank, expert_parallel=True)
        self.backend: SymmPrepareAndFinalize = make(config, parallel, group, shape.placement, connect=connect)
        self.generator = torch.Generator("cuda").manual_seed(7)
        self.owner = torch.zeros(shape.experts, dtype=torch.int32, device="cuda")
        for rank in range(group.size):
            held = ExpertMapManager(shape.experts, group.size, rank, shape.placement).local_experts
            self.owner[held.start : held.stop : held.step] = rank
        self.local = ExpertMapManager(shape.experts, group.size, group.rank, shape.placement).expert_map("cuda")
        rows = group.size * shape.tokens
        self.x = self._draw(group.size, shape.tokens, shape.hidden)
        self.y = self._draw(group.size, rows, shape.hidden)

    def _draw(self, *extents: int) -> torch.Tensor:
        return torch.randn(*extents, generator=self.generator, device="cuda").to(self.shape.dtype)

    def routing(self, dropped: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
        """All ranks' ids int32 `[W, M, K]`, some of them -1, and weights `[W, M, K]`."""
        shape = self.shape
        scores = torch.rand(self.size, shape.tokens, shape.experts, generator=self.generator, device="cuda")
        weights, ids = scores.topk(shape.top_k, dim=-1)
        gone = torch.rand(ids.shape, generator=self.generator, device="cuda") < dropped
        return ids.masked_fill(gone, -1).to(torch.int32), weights

    def prepare(self, ids: torch.Tensor, weights: torch.Tensor, tokens: int) -> tuple[Dispatched, Routing]:
        routing = Routing(ids[self.rank, :tokens], weights[self.rank, :tokens])
        arguments: dict[str, Any] = {"num_experts": self.shape.experts, "expert_map": None}
        return self.backend.prepare(
            self.x[self.rank, :tokens], routing, payload=MODEL_DTYPE_PAYLOAD, **arguments
        ), routing

    def new_out(self, tokens: int) -> torch.Tensor:
        return torch.full((tokens, self.shape.hidden), torch.nan, dtype=self.shape.dtype, device="cuda")

    def wrong_arrivals(
        self,
        x: torch.Tensor,
        got: torch.Tensor,
        told: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        sizes: list[int],
    ) -> torch.Tensor:
        """How many elements of what `prepare` gave (`x`, ids, weights) are not what was sent here; on the device."""
        shape = self.shape
        there = torch.arange(shape.tokens, device="cuda") < torch.tensor(sizes, device="cuda")[:, None]
        wanted = torch.where(ids >= 0, self.local[ids.clamp(min=0).long()], -1).masked_fill(~there[..., None], -1)
        here = wanted >= 0
        by_source = (self.size, shape.tokens, -1)
        wrong = (got.view(by_source) != wanted).sum()
        wrong += ((told.view(by_source) != weights) & here).sum()
        return wrong + ((x.reshape(by_source) != self.x) & here.any(-1, keepdim=True)).sum()

    def expected(self, ids: torch.Tensor, tokens: int) -> torch.Tensor:
        """The sum over ranks, in their order, in fp32."""
        own = ids[self.rank, :tokens]
        owner = torch.where(own >= 0, self.owner[own.clamp(min=0).long()], -1)
        total = torch.zeros(tokens, self.shape.hidden, device="cuda")
        for rank in range(self.size):
            first = self.rank * self.shape.tokens
            rows = self.y[rank, first : first + tokens].float()
            total = torch.where((owner == rank).any(1, keepdim=True), total + rows, total)
        return total.to(self.shape.dtype)


def delay(choose: random.Random) -> None:
    torch.cuda._sleep(choose.randrange(1, CYCLES))


def check(bench: Bench, routings: int) -> tuple[int, int]:
    """Random routings, equal, unequal and zero counts, one step or two in flight, ranks that are late.

    Returns: (elements compared on this rank that are wrong, steps).
    """
    together, alone = random.Random(3), random.Random(bench.rank)
    wrong, steps, most = torch.zeros((), dtype=torch.int64, device="cuda"), 0, bench.shape.tokens
    for number in range(routings):
        kinds = ([most] * bench.size, [1] * bench.size, [together.randint(0, most) for _ in range(bench.size)])
        sizes = [*kinds, [most * (rank == number % bench.size) for rank in range(bench.size)]][number % 4]
        flights, tokens = [], sizes[bench.rank]
        for _ in range(1 + number % 2):
            ids, weights = bench.routing(dropped=(0.1, 0.9, 1.0, 0.0)[number // 4 % 4])
            given = ids.long() if number % 3 == 0 else ids
            if number % 5:
                delay(alone)
            flights.append((*bench.prepare(given, weights, tokens), ids, weights))
        for dispatched, routing, ids, weights in reversed(flights):
            assert dispatched.topk_ids is not None
            assert dispatched.topk_weights is not None
            wrong += bench.wrong_arrivals(
                dispatched.x, dispatched.topk_ids, dispatched.topk_weights, ids, weights, sizes
            )
            if number % 7:
                delay(alone)
            out = bench.new_out(tokens)
            bench.backend.finalize(bench.y[bench.rank], dispatched.handle, routing, out)
            wrong += (out != bench.expected(ids, tokens)).sum()
            steps += 1
    bench.backend.check()
    return int(bench.group.all_reduce(wrong)), steps


def check_graph(bench: Bench, replays: int) -> int:
    """One graph of two steps, replayed with other routings under random delays; elements that are wrong."""
    alone, most = random.Random(bench.rank), bench.shape.tokens
    ids, weights = bench.routing()
    static = (ids.clone(), weights.clone())
    kept: list[tuple[torch.Tensor, ...]] = []
    out = bench.new_out(most)

    def step() -> None:
        dispatched, routing = bench.prepare(*static, most)
        assert dispatched.topk_ids is not None
        assert dispatched.topk_weights is not None
        kept.append((dispatched.x.clone(), dispatched.topk_ids.clone(), dispatched.topk_weights.clone()))
        bench.backend.finalize(bench.y[bench.rank], dispatched.handle, routing, out)

    bench.group.barrier()
    graph = capture([step, step])
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(replays):
        ids, weights = bench.routing()
        static[0].copy_(ids)
        static[1].copy_(weights)
        delay(alone)
        graph.replay()
        for x, got, told in kept[-2:]:
            wrong += bench.wrong_arrivals(x, got, told, ids, weights, [most] * bench.size)
        wrong += (out != bench.expected(ids, most)).sum()
    bench.backend.check()
    return int(bench.group.all_reduce(wrong))


def pair_us(bench: Bench, tokens: int) -> float:
    """Dispatch and combine in a graph of `PAIRS`, slowest rank; infinity if its output is wrong."""
    ids, weights = bench.routing(dropped=0.0)
    out = bench.new_out(tokens)

    def pair() -> None:
        dispatched, routing = bench.prepare(ids, weights, tokens)
        bench.backend.finalize(bench.y[bench.rank], dispatched.handle, routing, out)

    bench.group.barrier()
    graph = capture([pair] * PAIRS)
    best = float("inf")
    for _ in range(3):
        bench.group.barrier()
        best = min(best, event_us(graph.replay, repeats=10) / PAIRS)
    if not torch.equal(out, bench.expected(ids, tokens)):
        best = float("inf")
    told = torch.tensor([best], device="cuda")
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return told.item()


def late_rank(shape: Shape) -> list[str]:
    """The last rank does not come for a while: what every rank's error says. The shape is one of its own, so that the
    buffer is too, with a time limit of its own."""
    bench = Bench(TorchGroup(timeout_s=2.0), shape)
    ids, weights = bench.routing()
    torch.cuda.synchronize()
    bench.group.barrier()
    torch.cuda.synchronize()
    said = ""
    try:
        if bench.rank == bench.size - 1:
            time.sleep(4.0)
        dispatched, routing = bench.prepare(ids, weights, shape.tokens)
        out = bench.new_out(shape.tokens)
        bench.backend.finalize(bench.y[bench.rank], dispatched.handle, routing, out)
        torch.cuda.synchronize()
        bench.backend.check()
    except CollectiveError as error:
        said = str(error)
    every: list[Any] = [None] * bench.size
    dist.all_gather_object(every, said)
    return every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routings", type=int, default=200, help="of each check (default: 200)")
    parser.add_argument("--json", help="write what was found here")
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", timeout=timedelta(seconds=LIMIT_S), device_id=device)
    group = TorchGroup(timeout_s=LIMIT_S / 2)
    found: dict[str, Any] = {"ranks": group.size, "wrong": 0, "pairs": []}
    say(f"{group.size} × {torch.cuda.get_device_name()}, torch {torch.__version__}")
    benches = {}
    for shape in (LARGE, MEDIUM, *ODD):
        with phase(f"H = {shape.hidden}, E = {shape.experts}, K = {shape.top_k}, M = {shape.tokens}, {shape.dtype}"):
            bench = benches[shape] = Bench(group, shape)
            wrong, steps = check(bench, options.routings)
            in_graphs = check_graph(bench, options.routings)
            say(f"{bench.backend.layout.total_bytes / 1e6:.1f} MB; {steps} steps: {wrong} wrong; replays: {in_graphs}")
            found["wrong"] += wrong + in_graphs
    if not found["wrong"]:
        for shape in (LARGE, MEDIUM):
            with phase(f"pairs, H = {shape.hidden}"):
                times = {tokens: pair_us(benches[shape], tokens) for tokens in TOKENS}
                found["pairs"].append({"hidden": shape.hidden, "us": times})
                say(f"H = {shape.hidden}: " + ", ".join(f"T = {t} {us:.1f} us" for t, us in times.items()))
        with phase("a rank that does not come"):
            found["late"] = late_rank(attrs.evolve(ODD[1], tokens=5))
            say("\n".join(found["late"]))
    if options.json and group.rank == 0:
        Path(options.json).write_text(json.dumps(found, indent=1))
    dist.barrier()
    dist.destroy_process_group()
    if found["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
