"""moe-symm with many tokens per rank: every bit, then its time beside the wire's and NCCL's.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.symm_throughput [--json throughput.json]

The wire's rate is the better of two: all ranks store to all others at once, from a kernel that does nothing else; each
rank's copy engine writes to one neighbour. NCCL moves the same deduplicated rows there and back, and neither packs them
nor adds them up. Bytes are those that leave the rank which sends most.

Shape letters: T tokens on this rank · M the largest T · H hidden · E experts · K top-k · W ranks.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
import triton
import triton.language as tl

from benchmarks.symm import LARGE, LIMIT_S, check, phase, say
from benchmarks.symm_reference import Batch, Reference
from moe_core.group import TorchGroup
from moe_core.timing import capture, event_us
from moe_core.types import Routing
from moe_symm.peers import PeerMemory

SIZES = (512, 1024, 2048, 4096, 8192)
ROUTINGS = 8
ROUNDS = 3
PAIRS = 4


@triton.jit(do_not_specialize=["offset", "rank"])
def store_to_all(peers, offset, source, words, rank, W: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program serves one of the other ranks; `words` of 4 bytes go to each."""
    program = tl.program_id(0)
    target = (rank + 1 + program % (W - 1)) % W
    base = tl.multiple_of((tl.load(peers + target) + offset).to(tl.pointer_type(tl.int32)), 16)
    for first in range(program // (W - 1) * BLOCK, words, tl.num_programs(0) // (W - 1) * BLOCK):
        place = first + tl.arange(0, BLOCK)
        tl.store(base + place, tl.load(source + place, mask=place < words), mask=place < words)


def best_us(group: TorchGroup, call: Callable[[], object], calls: int = 1) -> float:
    """The slowest rank's best median, per call of `calls` that the graph holds."""
    times = []
    for _ in range(ROUNDS):
        group.barrier()
        times.append(event_us(call, repeats=7) / calls)
    told = torch.tensor([min(times)], device="cuda")
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return told.item()


def rows_sent(bench: Reference, batch: Batch) -> list[list[int]]:
    """[source][target] → rows: one for each token and rank that holds a chosen expert."""
    chosen = batch.ids.clamp(min=0).long()
    held = [((local[chosen] >= 0) & (batch.ids >= 0)).any(2).sum(1) for local in bench.local]
    rows: list[list[int]] = torch.stack(held, dim=1).tolist()
    return rows


def wire_rate(bench: Reference, size: int) -> dict[str, float]:
    """Bytes per second out of a rank, `size` bytes to each of the others, into the rows of a lane that is free."""
    memory, others = bench.backend._connection, bench.size - 1
    assert isinstance(memory, PeerMemory)
    words, offset = size // 64 * 16, bench.backend.layout.offsets["rows"]
    source = torch.randint(1 << 30, (words,), dtype=torch.int32, device="cuda")
    there = memory._handle.get_buffer((bench.rank + 1) % bench.size, (words,), torch.int32, offset // 4)

    def store() -> None:
        grid = (128 // others * others,)
        store_to_all[grid](memory._peers[0], offset, source, words, bench.rank, W=bench.size, BLOCK=8192, num_warps=16)

    store()
    bytes_to_one = words * 4.0
    return {
        "stores to all": bytes_to_one * others / best_us(bench.group, store) * 1e6,
        "copy engine": bytes_to_one / best_us(bench.group, lambda: there.copy_(source)) * 1e6,
    }


def nccl_us(bench: Reference, rows: list[list[int]]) -> float:
    """The rows of the batch to their ranks and back."""
    out, into = rows[bench.rank], [sent[bench.rank] for sent in rows]
    sent = torch.randn(sum(out), bench.shape.hidden, device="cuda").to(bench.shape.dtype)
    arrived = sent.new_empty(sum(into), bench.shape.hidden)

    def there_and_back() -> None:
        dist.all_to_all_single(arrived, sent, into, out)
        dist.all_to_all_single(sent, arrived, out, into)

    return best_us(bench.group, there_and_back)


def pair_us(bench: Reference, batch: Batch, tokens: int) -> tuple[float, int]:
    """(a dispatch and a combine, wrong elements of the last one's output). The experts' rows are where they belong."""
    backend, own = bench.backend, slice(tokens)
    x, routing = batch.x[bench.rank, own], Routing(batch.ids[bench.rank, own], batch.weights[bench.rank, own])
    out = torch.full_like(x, torch.nan)

    def pair(first: bool = False) -> None:
        dispatched = bench.prepare(batch)
        place, y = backend.expert_output(dispatched, out), bench.y[bench.rank]
        if first and place is not None:
            place.copy_(y)
        backend.finalize(y if place is None else place, dispatched.handle, routing, out)

    pair(first=True)
    bench.group.barrier()
    graph = capture([pair] * PAIRS)
    us = best_us(bench.group, graph.replay, PAIRS)
    return us, int(bench.group.all_reduce(bench.wrong_sums(batch, out)))


def measure(group: TorchGroup, tokens: int) -> dict[str, Any]:
    bench = Reference(group, attrs.evolve(LARGE, tokens=tokens))
    bench.poison()
    wrong, steps = check(bench, ROUTINGS)
    batch = bench.batch([tokens] * group.size, dropped=0.0)
    rows = rows_sent(bench, batch)
    remote = max(sum(sent) - sent[rank] for rank, sent in enumerate(rows)) * LARGE.hidden * LARGE.dtype.itemsize
    us, wrong_after = pair_us(bench, batch, tokens)
    rates = wire_rate(bench, remote // (group.size - 1))
    nccl, rate = nccl_us(bench, rows), 2 * remote / us * 1e6
    shown = ", ".join(f"{name} {each / 1e9:.0f}" for name, each in rates.items())
    say(
        f"T {tokens}: {steps} steps, {wrong} wrong; pair {us:.1f} us ({wrong_after} wrong), NCCL {nccl:.1f}; "
        f"{rate / 1e9:.0f} GB/s, {rate / max(rates.values()):.1%} of the wire's ({shown})"
    )
    return {
        "tokens": tokens, "wrong": wrong + wrong_after, "pair_us": us, "nccl_us": nccl, "bytes_each_way": remote,
        "rates": rates,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="T (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write what was found here")
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", timeout=timedelta(seconds=LIMIT_S), device_id=device)
    group = TorchGroup(timeout_s=LIMIT_S / 2)
    say(f"{group.size} × {torch.cuda.get_device_name()}, torch {torch.__version__}")
    found = []
    for tokens in map(int, options.sizes.split(",")):
        with phase(f"T = {tokens}"):
            found.append(measure(group, tokens))
        torch.cuda.empty_cache()
    if options.json and group.rank == 0:
        options.json.write_text(json.dumps({"ranks": group.size, "rows": found}, indent=1))
    dist.barrier()
    dist.destroy_process_group()
    if any(row["wrong"] for row in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
