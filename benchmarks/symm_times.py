"""What a dispatch and a combine take, in one CUDA graph of ten such pairs, every contender in turn in one run.

All contenders get the same rows and routings, another one for each pair of a graph; no experts run. A time is the
median over rounds of the slowest rank's. What a graph has put out last is compared with the reference.

Shape letters: T tokens on this rank · M the largest T · H hidden · E experts · K top-k · W ranks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import attrs
import torch
import torch.distributed as dist

from benchmarks.symm_reference import Batch, Reference, Shape, capture
from moe_core.config import MoEParallelConfig
from moe_core.group import TorchGroup
from moe_core.quant import ScaleFormat
from moe_core.types import ExpertPlacement, Routing
from moe_symm.layout import Form

TOKENS = (1, 8, 64, 128)
PAIRS = 10
ROUNDS = 7
REPLAYS = 10
SKEWS = ("one hot expert", "one hot rank")

Say = Callable[[str], None]


def pairs(group: TorchGroup, against: str | None, say: Say) -> list[dict[str, Any]]:
    """All cells: H 7168 and 4096, bf16 and fp8 on the wire, then skewed routing."""
    cells = []
    for hidden in (7168, 4096):
        for scales in (None, ScaleFormat.FP32):
            contenders = _contenders(group, Shape(hidden, scales=scales), against)
            for tokens in TOKENS:
                cells.append(_cell(group, contenders, tokens, None, say))
            if scales is None and hidden == 7168:
                cells += [_cell(group, contenders, tokens, skew, say) for skew in SKEWS for tokens in (8, 128)]
            del contenders
    return cells


def unlike_nixl_ep(group: TorchGroup) -> int:
    """Elements of the exact form's output that differ in a bit from NIXL EP's, on all ranks, for the same experts.

    An expert multiplies by a number of its own: where its rows stand does not matter, and the two have other orders.
    """
    shape, wrong = Shape(7168, form=Form.EXACT), torch.zeros((), dtype=torch.int64, device="cuda")
    ours, theirs = Symm(group, shape), NixlEP(group, attrs.evolve(shape, form=Form.BATCHED))
    for sizes in ([shape.tokens] * group.size, [rank * 37 for rank in range(group.size)]):
        batch = ours.bench.batch(sizes)
        outs = [_through_experts(each, batch, group.rank) for each in (ours.bench.backend, theirs.backend)]
        wrong += (outs[0].view(torch.int16) != outs[1].view(torch.int16)).sum()
    return int(group.all_reduce(wrong))


def _through_experts(backend: Any, batch: Batch, rank: int) -> torch.Tensor:
    own = slice(batch.sizes[rank])
    x, routing = batch.x[rank, own], Routing(batch.ids[rank, own], batch.weights[rank, own])
    dispatched = backend.prepare(x, routing, num_experts=256, expert_map=None, payload="model dtype")
    held = dispatched.x.shape[0]
    factor = 1 + (torch.arange(held, device="cuda") + rank * held) % 7 / 8
    out = torch.empty_like(x)
    backend.finalize((dispatched.x.float() * factor[:, None, None]).to(x.dtype), dispatched.handle, routing, out)
    return out


class Symm:
    """moe-symm in one form, whole or in halves."""

    def __init__(self, group: TorchGroup, shape: Shape, *, split: bool = False) -> None:
        self.bench, self.split = Reference(group, shape), split
        self.name = f"symm {shape.form.value}{', halves' if split else ''}"

    def pair(self, batch: Batch) -> torch.Tensor:
        dispatched = self.bench.prepare_start(batch)() if self.split else self.bench.prepare(batch)
        return self.bench.finalize(batch, dispatched, split=self.split)

    def wrong(self, batch: Batch, out: torch.Tensor) -> int:
        return int(self.bench.group.all_reduce(self.bench.wrong_sums(batch, out)))


class NixlEP:
    """moe-nixl-ep over NIXL EP. Its own benchmark checks its bits."""

    name = "nixl_ep"

    def __init__(self, group: TorchGroup, shape: Shape) -> None:
        from moe_nixl_ep.prepare_finalize import make

        parallel = MoEParallelConfig.fold(dp_size=group.size, dp_rank=group.rank, expert_parallel=True)
        self.backend = make(shape.config, parallel, shape.scheme, group, ExpertPlacement.LINEAR)
        self.payload = "model dtype" if shape.scales is None else shape.scheme.name
        self.rank, sizes = group.rank, self.backend.shape
        self.rows = torch.randn(
            sizes.experts_per_rank, sizes.slots * sizes.ranks, shape.hidden, device="cuda", dtype=shape.dtype
        )
        self.experts = shape.experts

    def pair(self, batch: Batch) -> torch.Tensor:
        own = slice(batch.sizes[self.rank])
        x, routing = batch.x[self.rank, own], Routing(batch.ids[self.rank, own], batch.weights[self.rank, own])
        dispatched = self.backend.prepare(x, routing, num_experts=self.experts, expert_map=None, payload=self.payload)
        out = torch.empty_like(x)
        self.backend.finalize(self.rows, dispatched.handle, routing, out)
        return out

    def wrong(self, batch: Batch, out: torch.Tensor) -> int:
        return 0


def _contenders(group: TorchGroup, shape: Shape, against: str | None) -> list[Any]:
    found: list[Any] = [Symm(group, attrs.evolve(shape, form=form)) for form in Form]
    found += [Symm(group, attrs.evolve(shape, form=form), split=True) for form in (Form.STANDARD, Form.BATCHED)]
    return [*found, NixlEP(group, shape)] if against else found


def _cell(group: TorchGroup, contenders: list[Any], tokens: int, skew: str | None, say: Say) -> dict[str, Any]:
    bench, shape = contenders[0].bench, contenders[0].bench.shape
    batches = [_skewed(bench.batch([tokens] * group.size, dropped=0.0), skew, shape, group) for _ in range(PAIRS)]
    outs: dict[str, torch.Tensor] = {}

    def steps(contender: Any) -> list[Callable[[], None]]:
        def step(batch: Batch) -> None:
            outs[contender.name] = contender.pair(batch)

        return [lambda batch=batch: step(batch) for batch in batches]  # type: ignore[misc]

    group.barrier()
    graphs = {contender.name: capture(steps(contender)) for contender in contenders}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):  # in turn, so that what drifts hits all
        for name, graph in graphs.items():
            times[name].append(_replay_us(graph))
    us = {name: round(statistics.median(each), 1) for name, each in times.items()}
    wrong = {contender.name: contender.wrong(batches[-1], outs[contender.name]) for contender in contenders}
    wire = "fp8" if shape.scales else "bf16"
    told = ", ".join(
        f"{name} {time:.1f}{f' ({wrong[name]} WRONG)' if wrong[name] else ''}" for name, time in us.items()
    )
    say(f"W {group.size}, H {shape.hidden}, {wire}, T {tokens}{f', {skew}' if skew else ''}: {told} us")
    return {"hidden": shape.hidden, "wire": wire, "tokens": tokens, "skew": skew, "us": us, "wrong": wrong}


def _skewed(batch: Batch, skew: str | None, shape: Shape, group: TorchGroup) -> Batch:
    """Every token also chooses expert 0; or all choices are experts of rank 0."""
    ids = batch.ids.clone()
    if skew == SKEWS[0]:
        ids[..., 0] = torch.where((ids == 0).any(-1), ids[..., 0], 0)
    elif skew == SKEWS[1]:
        held = shape.experts // group.size
        ids = torch.rand(*ids.shape[:2], held, device="cuda", generator=_same_everywhere()).topk(shape.top_k).indices
    return attrs.evolve(batch, ids=ids.to(batch.ids.dtype))


def _same_everywhere() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(11)


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of a pair, on the slowest rank."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    graph.replay()
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    told = torch.tensor([start.elapsed_time(end) * 1e3 / REPLAYS / PAIRS], device="cuda")
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return told.item()
