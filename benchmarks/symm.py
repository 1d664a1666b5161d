"""moe-symm between the GPUs of one host: every bit of it, ranks that do not come, and what a pair takes.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.symm [--against nixl_ep] [--json symm.json]

Nothing is timed before it is right: each check counts the elements whose bits differ from a reference in plain torch,
on every rank, and all timed graphs are compared too. Every phase has a time limit.

Shape letters: T tokens on this rank · M the largest T · H hidden · E experts · E_l local experts · C row capacity ·
K top-k · W ranks · R = W · M.
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

from benchmarks.symm_reference import Reference, Shape, capture
from moe_core.errors import CollectiveError
from moe_core.group import TorchGroup
from moe_core.quant import ScaleFormat
from moe_core.types import ExpertPlacement
from moe_symm.layout import Form

LIMIT_S = 60
CYCLES = 400_000  # of the longest delay of a rank: about 0.2 ms
LATE_S = 2.0
GRIDS = (1, 8, 16)
"""Numbers of tokens whose dispatches have other grids than the most has."""

LARGE = Shape(7168)
SHAPES = (
    LARGE,
    attrs.evolve(LARGE, scales=ScaleFormat.FP32),
    attrs.evolve(LARGE, scales=ScaleFormat.UE8M0, tokens=64),
    attrs.evolve(LARGE, form=Form.BATCHED),
    attrs.evolve(LARGE, form=Form.BATCHED, scales=ScaleFormat.FP32),
    attrs.evolve(LARGE, form=Form.EXACT),
    Shape(4096),
    Shape(2056, experts=10, top_k=5, tokens=33, dtype=torch.float16),
    Shape(2056, experts=10, top_k=5, tokens=33, dtype=torch.float16, form=Form.BATCHED, scales=ScaleFormat.UE8M0),
    Shape(77, experts=9, top_k=3, tokens=7, dtype=torch.float32, placement=ExpertPlacement.ROUND_ROBIN),
    Shape(
        77, experts=9, top_k=3, tokens=7, dtype=torch.float32, placement=ExpertPlacement.ROUND_ROBIN, form=Form.EXACT
    ),
    Shape(512, experts=64, top_k=16, tokens=640, form=Form.BATCHED),  # more ids than a program looks at together
    Shape(2052, experts=64, top_k=6, tokens=1100),  # rows that are fetched
)
LATE = {
    "dispatch": Shape(256, experts=9, top_k=3, tokens=5),
    "combine": Shape(256, experts=9, top_k=3, tokens=6, form=Form.BATCHED),
}
"""Stage that a rank is late for → a shape of its own, so that the buffer is too, with a time limit of its own."""


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


def delay(choose: random.Random) -> None:
    torch.cuda._sleep(choose.randrange(1, CYCLES))


def check(bench: Reference, routings: int) -> tuple[int, int]:
    """Random routings, equal, unequal and zero counts, one step or two in flight, whole and in halves, late ranks.

    Returns: (elements compared on all ranks that are wrong, steps).
    """
    together, alone = random.Random(3), random.Random(bench.rank)
    wrong, steps, most = torch.zeros((), dtype=torch.int64, device="cuda"), 0, bench.shape.tokens
    for number in range(routings):
        few = min(most, GRIDS[number // 4 % len(GRIDS)])
        kinds = ([most] * bench.size, [few] * bench.size, [together.randint(0, most) for _ in range(bench.size)])
        sizes = [*kinds, [most * (rank == number % bench.size) for rank in range(bench.size)]][number % 4]
        flights, split = [], together.random() < 0.5
        for _ in range(1 + number % 2):
            batch = bench.batch(sizes, dropped=(0.1, 0.9, 1.0, 0.0)[number // 4 % 4])
            if number % 3 == 0:
                batch = attrs.evolve(batch, ids=batch.ids.long())
            if number % 5:
                delay(alone)
            flights.append((batch, bench.prepare_start(batch) if split else bench.prepare(batch)))
        for batch, flight in reversed(flights):
            dispatched = flight() if split else flight
            wrong += bench.wrong_arrivals(batch, dispatched)
            if number % 7:
                delay(alone)
            out = bench.finalize(batch, dispatched, poisoned=True, split=split)
            wrong += bench.wrong_sums(batch, out)
            steps += 1
    bench.backend.check()
    return int(bench.group.all_reduce(wrong)), steps


def check_graph(bench: Reference, replays: int) -> int:
    """One graph of two steps, replayed with other routings under random delays; elements that are wrong."""
    alone, sizes = random.Random(bench.rank), [bench.shape.tokens] * bench.size
    static = bench.batch(sizes)
    kept: list[Any] = []

    def step() -> None:
        dispatched = bench.prepare(static)
        copies = {
            name: value.clone() for name, value in attrs.asdict(dispatched).items() if isinstance(value, torch.Tensor)
        }
        kept.append((attrs.evolve(dispatched, **copies), bench.finalize(static, dispatched)))

    bench.group.barrier()
    graph = capture([step, step])
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for number in range(replays):
        batch = bench.batch(sizes)
        static.ids.copy_(batch.ids)
        static.weights.copy_(batch.weights)
        delay(alone)
        graph.replay()
        for dispatched, out in kept[-1 - (number % 10 == 0) :]:
            wrong += bench.wrong_arrivals(static, dispatched)
            wrong += bench.wrong_sums(static, out)
    bench.backend.check()
    return int(bench.group.all_reduce(wrong))


def late_rank(shape: Shape, stage: str) -> dict[str, Any]:
    """The last rank does not come for a while: what every rank's error says, after how long, and whether all is right
    after a reset."""
    bench = Reference(TorchGroup(timeout_s=LATE_S), shape)
    batch = bench.batch([shape.tokens] * bench.size)
    late = bench.rank == bench.size - 1
    bench.finalize(batch, bench.prepare(batch))
    torch.cuda.synchronize()
    bench.group.barrier()
    torch.cuda.synchronize()
    said, poisoned, began = "", False, time.monotonic()
    try:
        if late and stage == "dispatch":
            time.sleep(2 * LATE_S)
        dispatched = bench.prepare(batch)
        if late and stage == "combine":
            torch.cuda.synchronize()
            time.sleep(2 * LATE_S)
        out = bench.finalize(batch, dispatched)
        torch.cuda.synchronize()
        poisoned = bool(out.isnan().all())
        bench.backend.check()
    except CollectiveError as error:
        said = str(error)
    seconds = time.monotonic() - began
    bench.backend.reset()
    wrong, _ = check(bench, 20)
    every: list[Any] = [None] * bench.size
    dist.all_gather_object(every, {"said": said, "all NaN": poisoned, "after s": round(seconds, 1)})
    return {"stage": stage, "ranks": every, "wrong after the reset": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routings", type=int, default=100, help="of each check (default: 100)")
    parser.add_argument("--replays", type=int, default=200, help="of each graph (default: 200)")
    parser.add_argument("--soak", type=int, default=0, help="routings, and ten times as many replays")
    parser.add_argument("--against", choices=["nixl_ep"], help="time this dispatch in the same run")
    parser.add_argument("--only", choices=["checks", "times", "late"], nargs="*", help="leave out the rest")
    parser.add_argument("--json", type=Path, help="write what was found here")
    options = parser.parse_args()
    parts = options.only or ["checks", "times", "late"]
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", timeout=timedelta(seconds=LIMIT_S), device_id=device)
    group = TorchGroup(timeout_s=LIMIT_S / 2)
    found: dict[str, Any] = {"ranks": group.size, "wrong": 0, "pairs": [], "late": []}
    say(f"{group.size} × {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for shape in SHAPES if "checks" in parts else ():
        with phase(str(shape)):
            bench = Reference(group, shape)
            bench.poison()
            wrong, steps = check(bench, options.routings)
            in_graphs = check_graph(bench, options.replays)
            size = bench.backend.layout.total_bytes / 1e6
            say(f"{size:.1f} MB; {steps} steps: {wrong} wrong; {options.replays} replays: {in_graphs} wrong")
            found["wrong"] += wrong + in_graphs
    for form, times in ((Form.STANDARD, 10), (Form.BATCHED, 1)) if options.soak else ():
        with phase(f"soak, {form.value}"):
            bench = Reference(group, attrs.evolve(LARGE, form=form))
            wrong, steps = check(bench, options.soak)
            in_graphs = check_graph(bench, times * options.soak)
            say(f"{steps} steps: {wrong} wrong; {times * options.soak} replays: {in_graphs} wrong")
            found["wrong"] += wrong + in_graphs
    if "times" in parts and not found["wrong"]:
        from benchmarks import symm_times

        with phase("bits of the exact form and of NIXL EP"):
            unlike = symm_times.unlike_nixl_ep(group) if options.against else 0
            say(f"elements that differ: {unlike}")
            found["wrong"] += unlike
        with phase("pairs"):
            found["pairs"] = symm_times.pairs(group, options.against, say)
    for stage, shape in LATE.items() if "late" in parts else ():
        with phase(f"a rank that does not come to a {stage}"):
            found["late"].append(late_rank(shape, stage))
            say(str(found["late"][-1]))
            found["wrong"] += found["late"][-1]["wrong after the reset"]
    if options.json and group.rank == 0:
        options.json.write_text(json.dumps(found, indent=1))
    dist.barrier()
    dist.destroy_process_group()
    if found["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
