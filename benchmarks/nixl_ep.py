"""moe-nixl-ep between the GPUs of one host: its bits, a rank that is late, and its cost over the bare library.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.nixl_ep [--json nixl_ep.json]

Every phase has a time limit, at which the process says where it stands and ends; torchrun then ends the others.

Shape letters: T tokens on this rank · H hidden · E experts · E_l local experts · K top-k · M the largest T · C row
capacity.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.group import TorchGroup
from moe_core.quant import UNQUANTIZED
from moe_core.types import MODEL_DTYPE_PAYLOAD, Dispatched, ExpertPlacement, Routing
from moe_nixl_ep.emulation import fused_multiply_add, quantize
from moe_nixl_ep.limits import SCALE_GROUP
from moe_nixl_ep.prepare_finalize import NixlEPPrepareAndFinalize, RanksMaskedError, make

E, K, M = 256, 8, 128
TOKENS = (1, 8, 64, 128)
PAIRS = 10
ROUNDS = 7
PAYLOADS = (MODEL_DTYPE_PAYLOAD, "fp8_block")
LIMIT_S = 45
DEVICE = "cuda"


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A part that must end in time."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    began = time.monotonic()
    yield
    faulthandler.cancel_dump_traceback_later()
    say(f"-- {name}: {time.monotonic() - began:.1f} s")


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def backend(hidden: int, *, experts: int = E, timeout_s: float = 20.0) -> NixlEPPrepareAndFinalize:
    config = MoEConfig(
        num_experts=experts,
        top_k=K,
        hidden_size=hidden,
        intermediate_size=64,
        max_tokens_per_rank=M,
        dtype=torch.bfloat16,
    )
    group = TorchGroup(timeout_s=timeout_s)
    parallel = MoEParallelConfig.fold(dp_size=group.size, dp_rank=group.rank, expert_parallel=True)
    return make(config, parallel, UNQUANTIZED, group, ExpertPlacement.LINEAR)


def choices(rank: int, tokens: int, seed: int, *, drop: bool = True) -> Routing:
    """The same on every rank that asks for it, so that each knows what the others send."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    ids = torch.rand(tokens, E, generator=generator).topk(K, dim=1).indices
    weights = torch.rand(tokens, K, generator=generator)
    if drop:
        ids = ids.masked_fill(torch.rand(tokens, K, generator=generator) < 0.1, -1)
        ids[-1:] = -1
    return Routing(ids.to(DEVICE, torch.int32), weights.to(DEVICE))


def batch(tokens: int, hidden: int, seed: int, *, drop: bool = True) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator(DEVICE).manual_seed(1000 * seed + dist.get_rank())
    x = torch.randn(tokens, hidden, generator=generator, device=DEVICE).bfloat16()
    return x, choices(dist.get_rank(), tokens, seed, drop=drop)


def expert(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Stands for an expert: a factor of its own, rounded to bf16 once. Its bits are easily foretold."""
    return (x.float() * (1 + ids.float() % 7 / 8).unsqueeze(-1)).bfloat16()


def received_rows(x: torch.Tensor, payload: str) -> torch.Tensor:
    """What experts see of the rows: as they are, or through the library's own quantizer, as fp32."""
    if payload == MODEL_DTYPE_PAYLOAD:
        return x
    missing = -x.shape[1] % SCALE_GROUP
    q, scale = quantize(torch.nn.functional.pad(x, (0, missing)), payload.endswith("ue8m0"))
    return (q.float() * scale.repeat_interleave(SCALE_GROUP, dim=1))[:, : x.shape[1]]


def run_experts(dispatched: Dispatched, rank: int) -> torch.Tensor:
    """`[E_l, C, H]`, NaN in rows past the counts, which must not matter."""
    rows, counts = dispatched.x, dispatched.tokens_per_expert
    assert counts is not None
    if dispatched.x_scale is not None:
        rows = rows.float() * dispatched.x_scale.repeat_interleave(SCALE_GROUP, dim=2)[..., : rows.shape[2]]
    ids = torch.arange(rows.shape[0], device=rows.device) + rank * rows.shape[0]
    y = expert(rows, ids.unsqueeze(1).expand(rows.shape[:2]))
    empty = torch.arange(rows.shape[1], device=rows.device) >= counts.unsqueeze(1)
    return y.masked_fill(empty.unsqueeze(-1), torch.nan)


def foretold(x: torch.Tensor, routing: Routing, payload: str) -> torch.Tensor:
    """The combine's bits: fused multiply-adds in the order of K."""
    seen, total = received_rows(x, payload), torch.zeros(x.shape, device=x.device)
    for k in range(K):
        ids, weights = routing.topk_ids[:, k], routing.topk_weights[:, k : k + 1]
        added = fused_multiply_add(expert(seen, ids), weights, total)
        total = torch.where((ids < 0).unsqueeze(1), total, added)
    return total.bfloat16()


def prepare(layer: NixlEPPrepareAndFinalize, x: torch.Tensor, routing: Routing, payload: str) -> Dispatched:
    return layer.prepare(x, routing, num_experts=E, expert_map=None, payload=payload)


def check(layer: NixlEPPrepareAndFinalize, counts: tuple[int, ...], payload: str, seed: int) -> int:
    """Wrong values of one step on this rank; two micro-batches are in flight, and land in the order of their start."""
    rank, hidden, wrong = dist.get_rank(), layer.hidden, 0
    batches = [batch(counts[rank], hidden, seed + i) for i in range(2)]
    flights = [prepare(layer, x, routing, payload) for x, routing in batches]
    for i, ((x, routing), flight) in enumerate(zip(batches, flights, strict=True)):
        everyone = torch.cat([choices(r, tokens, seed + i).topk_ids for r, tokens in enumerate(counts)])
        own = torch.arange(flight.x.shape[0], device=DEVICE) + rank * flight.x.shape[0]
        assert flight.tokens_per_expert is not None
        wrong += int((flight.tokens_per_expert != (everyone.flatten() == own.unsqueeze(1)).sum(1)).sum())
        place = layer.expert_output(flight, x)
        y = run_experts(flight, rank)
        if place is not None:
            place.copy_(y)
        out = torch.full_like(x, torch.nan)
        layer.finalize(y if place is None else place, flight.handle, routing, out)
        wanted = foretold(x, routing, payload)
        wrong += int((out.view(torch.int16) != wanted.view(torch.int16)).sum())
    return wrong


def check_all(size: int) -> int:
    """Wrong values in all: widths with and without padding, payloads, token counts, modes, steps of random sizes."""
    wrong = 0
    for hidden in (7168, 2880):
        layer = backend(hidden)
        for payload in (*PAYLOADS, "fp8_block_ue8m0"):
            for counts in ((1,) * size, (17,) * size, (M,) * size, (0, 3, 6, 9, 1, 0, 128, 2)[:size]):
                found = total(check(layer, counts, payload, sum(counts)))
                if found:
                    say(f"H {hidden} {payload} T {counts}: {found} wrong values")
                wrong += found
        torch.use_deterministic_algorithms(True, warn_only=True)  # in which torch fills what is allocated
        wrong += sum(check(layer, (M,) * size, payload, 7) for payload in PAYLOADS)
        torch.use_deterministic_algorithms(False)
        before = torch.cuda.memory_allocated()
        for step in range(100):
            counts = tuple(int(n) for n in torch.randint(0, 33, (size,), generator=torch.Generator().manual_seed(step)))
            wrong += check(layer, counts, PAYLOADS[step % 2], 50 + step)
        layer.check()
        grown = torch.cuda.memory_allocated() - before
        say(f"H {hidden}: 28 cases and 200 random steps, memory grew by {grown} bytes")
    wrong = total(wrong)
    say(f"wrong values on all ranks: {wrong}")
    return wrong


def total(value: float, op: Any = dist.ReduceOp.SUM) -> Any:
    told = torch.tensor(value)
    dist.all_reduce(told, op=op)
    return told.item()


def pairs(layer: NixlEPPrepareAndFinalize, tokens: int, payload: str) -> dict[str, Callable[[], None]]:
    """One dispatch and one combine: by the library's own calls, and by the adapter's."""
    x, routing = batch(tokens, layer.hidden, 3, drop=False)
    raw, slots, quantized = layer._buffer.raw, layer.shape.slots, payload != MODEL_DTYPE_PAYLOAD
    rows = torch.randn(layer.shape.experts_per_rank, slots * layer.shape.ranks, layer.hidden, device=DEVICE).bfloat16()
    out = torch.empty_like(x)

    def bare() -> None:
        _, _, handle, _, _ = raw.low_latency_dispatch(x, routing.topk_ids, slots, E, use_fp8=quantized)
        raw.low_latency_combine(rows, routing.topk_ids, routing.topk_weights, handle, out=out)

    def ours() -> None:
        layer.finalize(rows, prepare(layer, x, routing, payload).handle, routing, out)

    return {"library": bare, "moe-nixl-ep": ours}


def capture(pair: Callable[[], None]) -> torch.cuda.CUDAGraph:
    pair()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # UCX's own threads may call CUDA
        for _ in range(PAIRS):
            pair()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of a pair, on the slowest rank."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    graph.replay()
    start.record()
    for _ in range(10):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(total(start.elapsed_time(end) * 100 / PAIRS, dist.ReduceOp.MAX))


def timings() -> list[dict[str, Any]]:
    layer, rows = backend(7168), []
    for payload in PAYLOADS:
        for tokens in TOKENS:
            graphs = {name: capture(pair) for name, pair in pairs(layer, tokens, payload).items()}
            times: dict[str, list[float]] = {name: [] for name in graphs}
            for _ in range(ROUNDS):  # interleaved, so that what drifts hits both
                for name, graph in graphs.items():
                    times[name].append(replay_us(graph))
            bare, ours = (statistics.median(times[name]) for name in ("library", "moe-nixl-ep"))
            say(
                f"{payload:12} T {tokens:4}: library {bare:7.1f} us, moe-nixl-ep {ours:7.1f} us, {ours / bare - 1:+.1%}"
            )
            rows.append({"payload": payload, "tokens": tokens, "library_us": bare, "moe_nixl_ep_us": ours})
    layer.check()
    return rows


def late_rank() -> list[int]:
    """The last rank misses a step by more than the timeout; the others go on and are told who. What rank 0 was told."""
    rank, size = dist.get_rank(), dist.get_world_size()
    layer = backend(2048, timeout_s=2.0)
    x, routing = batch(4, 2048, 5)
    told: list[int] = []
    if rank == size - 1:
        time.sleep(6)
    else:
        began = time.monotonic()
        dispatched = prepare(layer, x, routing, MODEL_DTYPE_PAYLOAD)
        layer.finalize(run_experts(dispatched, rank), dispatched.handle, routing, torch.empty_like(x))
        try:
            layer.check()
        except RanksMaskedError as error:
            told = list(error.ranks)
            say(f"after {time.monotonic() - began:.1f} s: {error}")
    dist.barrier()
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    size, dist_rank = dist.get_world_size(), dist.get_rank()
    say(f"{size} × {torch.cuda.get_device_name()}, torch {torch.__version__}")
    with phase("connection"):
        layer = backend(7168)
        say(f"{layer.shape}, UCX_TLS={os.environ.get('UCX_TLS')}")
    with phase("bits"):
        wrong = check_all(size)
    with phase("pairs in a CUDA graph, the slowest rank"):
        rows = timings()
    with phase("a late rank"):
        told = late_rank()
    if options.json and dist.get_rank() == 0:
        options.json.write_text(json.dumps({"ranks": size, "wrong": wrong, "late": told, "pairs": rows}, indent=2))
    dist.destroy_process_group()
    if wrong or (dist_rank == 0 and told != [size - 1]):
        sys.exit(1)


if __name__ == "__main__":
    main()
