"""Dispatch between GPUs of one host: held to one rank's numbers first, then timed, every backend in one run.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.ranks [--json ranks.json]

Shape letters: T tokens on this rank · H hidden · I intermediate · E experts · K top-k.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import moe_core
from benchmarks.cases import capture, event_us, relative_error
from moe_core.group import TorchGroup
from moe_core.plugins import registry

SCHEMES = ("unquantized", "fp8_block", "nvfp4")
SMALL = {"num_experts": 32, "top_k": 4, "hidden_size": 2048, "intermediate_size": 256, "max_tokens_per_rank": 32}
LARGE = {"num_experts": 256, "top_k": 8, "hidden_size": 7168, "intermediate_size": 2048, "max_tokens_per_rank": 128}
TOKENS = {"equal": (16, 16, 16, 16), "unequal": (3, 32, 1, 7), "none on a rank": (5, 0, 9, 0)}
TIMED = (1, 8, 64, 128)
OVERLAPPED = (128, 1024)
PAIRS = 10  # of dispatch and combine in one graph
ERROR = 0.006  # relative Frobenius, against one rank: partial sums are rounded to bf16


class Ranks:
    """This rank, its group, and what it says."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
            dist.init_process_group("nccl", timeout=timedelta(seconds=60), device_id=self.device)
        else:
            self.device = torch.device("cpu")
            dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        self.group = TorchGroup(timeout_s=60)
        self.rank, self.size = self.group.rank, self.group.size

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def worst(self, value: float) -> float:
        """The largest of all ranks' values; NaN counts as larger than any."""
        told = torch.tensor([float("inf") if value != value else value], device=self.device, dtype=torch.float64)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return told.item()

    def layer(
        self, sizes: dict[str, int], dispatch: str | None, scheme: str, *, runner: str = "default",
        shared: torch.nn.Module | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """A layer over all ranks (`dispatch`), or whole on each of them (None), with the same random weights."""
        config = moe_core.MoEConfig(**(sizes | options), has_shared_experts=shared is not None, dtype=torch.bfloat16)
        arguments: dict[str, Any] = {
            "scheme": scheme,
            "device": self.device,
            "runner": runner,
            "shared_experts": shared,
        }
        if dispatch is not None:
            parallel = moe_core.MoEParallelConfig.fold(dp_size=self.size, dp_rank=self.rank, expert_parallel=True)
            arguments |= {"parallel": parallel, "group": self.group, "dispatch": dispatch}
        layer = moe_core.build_runner(config, **arguments)
        fill(layer)
        return layer


def fill(layer: Any) -> None:
    """Random weights, the same for every split over ranks."""
    config, own = layer.plan.config, set(layer.routed_experts.expert_map.local_experts)
    h, i = config.hidden_size, config.intermediate_size
    for expert in range(config.num_experts):
        if expert in own:
            generator = torch.Generator(layer.routed_experts.device).manual_seed(expert)
            for name, shape in {"gate": (i, h), "up": (i, h), "down": (h, i)}.items():
                values = torch.randn(shape, generator=generator, device=generator.device).mul_(shape[1] ** -0.5)
                layer.routed_experts.load_expert(expert, name, values.bfloat16())
    layer.routed_experts.pack_weights()


def served_by(layer: Any) -> str:
    return "+".join(each.candidate.name for each in layer.plan.ranges)


def inputs(ranks: Ranks, sizes: dict[str, int], tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(ranks.device).manual_seed(1000 * seed + ranks.rank)
    x = torch.randn(tokens, sizes["hidden_size"], generator=generator, device=ranks.device).bfloat16()
    return x, torch.randn(tokens, sizes["num_experts"], generator=generator, device=ranks.device)


def error_of(layer: Any, single: Any, x: torch.Tensor, logits: torch.Tensor) -> float:
    out = layer(x, router_logits=logits)
    return relative_error(out, single(x, router_logits=logits)) if x.shape[0] else 0.0


def check(ranks: Ranks, dispatches: list[str], schemes: list[str], steps: int, soak: int) -> list[str]:
    """Every dispatch × scheme × token counts, then random steps, then a soak; returns the dispatches that are right."""
    right = []
    for dispatch in dispatches:
        fine, ran = True, []
        for scheme in schemes:
            try:
                layer = ranks.layer(SMALL, dispatch, scheme)
            except moe_core.UnsupportedError as error:
                ranks.say(f"{dispatch:12} {scheme:12} refused: {str(error).splitlines()[0]}")
                continue
            single = ranks.layer(SMALL, None, scheme)
            errors = {}
            for name, counts in TOKENS.items():
                x, logits = inputs(ranks, SMALL, counts[ranks.rank % 4], 1)
                errors[name] = ranks.worst(error_of(layer, single, x, logits))
            ran.append((scheme, layer, single))
            fine &= max(errors.values()) <= ERROR
            shown = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
            ranks.say(f"{dispatch:12} {scheme:12} {served_by(layer):14} {shown}")
        if not ran:
            continue
        _, layer, single = ran[0]
        choose, most = random.Random(ranks.rank), 0.0
        for step in range(steps):
            x, logits = inputs(ranks, SMALL, choose.randint(0, SMALL["max_tokens_per_rank"]), step)
            most = max(most, error_of(layer, single, x, logits))
        most = ranks.worst(most)
        ranks.say(f"{dispatch:12} {steps} random steps, 0 to {SMALL['max_tokens_per_rank']} tokens: {most:.4f}")
        if soak and ranks.device.type == "cuda":
            grown = ranks.worst(float(soak_bytes(ranks, layer, soak)))
            ranks.say(f"{dispatch:12} {soak} steps of soak: memory grew by {grown:.0f} bytes")
            most = float("inf") if grown else most
        if fine and most <= ERROR:
            right.append(dispatch)
        else:
            ranks.say(f"{dispatch:12} WRONG: not timed")
    return right


def soak_bytes(ranks: Ranks, layer: Any, steps: int) -> int:
    """How many bytes of device memory `steps` steps of changing sizes leave behind."""
    choose = random.Random(7 + ranks.rank)
    sets = [inputs(ranks, SMALL, tokens, tokens) for tokens in range(SMALL["max_tokens_per_rank"] + 1)]
    before = 0
    for step in range(steps):
        layer(*choose.choice(sets))
        if step == 100:  # by then everything that is made on first use is there
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    layer.check()
    return torch.cuda.memory_allocated() - before


def pair_us(ranks: Ranks, layer: Any, tokens: int) -> float:
    """Dispatch and combine alone, experts left out: a graph of `PAIRS` pairs, slowest rank."""
    x, logits = inputs(ranks, LARGE, tokens, 3)
    scores, ids = logits.softmax(dim=1).topk(LARGE["top_k"], dim=1)
    kernel = layer.kernel
    made: dict[str, torch.Tensor] = {}

    def pair() -> None:
        flight = kernel.dispatch(x, moe_core.Routing(ids, scores))
        if "out" not in made:
            shape = (*flight.dispatched.x.shape[:-1], LARGE["hidden_size"])
            made["out"] = torch.randn(shape, device=x.device, dtype=torch.bfloat16)
        kernel.combine(flight, made["out"])()

    return replay_us(ranks, [pair] * PAIRS)


def replay_us(ranks: Ranks, calls: list[Callable[[], object]]) -> float:
    graph = capture(calls)
    best = float("inf")
    for _ in range(3):
        ranks.group.barrier()
        best = min(best, event_us(graph.replay, repeats=10) / len(calls))
    return ranks.worst(best)


def step_us(ranks: Ranks, layer: Any, tokens: int) -> float:
    """A whole step of the layer, by graph, over four sets of inputs."""
    sets = [inputs(ranks, LARGE, tokens, seed) for seed in range(4)]
    return replay_us(ranks, [lambda x=x, logits=logits: layer(x, router_logits=logits) for x, logits in sets])


def timings(ranks: Ranks, dispatches: list[str]) -> list[dict[str, Any]]:
    """Pair and step of each dispatch, in microseconds."""
    rows = []
    for scheme, dispatch in itertools.product(("unquantized", "fp8_block"), dispatches):
        try:
            layer = ranks.layer(LARGE, dispatch, scheme, cuda_graph=True)
        except moe_core.UnsupportedError as error:
            ranks.say(f"{dispatch:12} {scheme:12} refused: {str(error).splitlines()[0]}")
            continue
        row: dict[str, Any] = {"dispatch": dispatch, "scheme": scheme, "experts": served_by(layer)}
        row["pair_us"] = {tokens: pair_us(ranks, layer, tokens) for tokens in TIMED}
        row["step_us"] = {tokens: step_us(ranks, layer, tokens) for tokens in TIMED}
        rows.append(row)
        for what in ("pair_us", "step_us"):
            times = " ".join(f"{row[what][tokens]:9.1f}" for tokens in TIMED)
            ranks.say(f"{dispatch:12} {scheme:12} {row['experts']:14} {what:8} {times}")
        del layer
        torch.cuda.empty_cache()
    return rows


class SharedExpert(torch.nn.Module):
    """One gated expert of the layer's own sizes, which every token visits."""

    def __init__(self, hidden: int, intermediate: int, device: torch.device) -> None:
        super().__init__()
        make = {"bias": False, "dtype": torch.bfloat16, "device": device}
        self.up = torch.nn.Linear(hidden, 2 * intermediate, **make).requires_grad_(False)
        self.down = torch.nn.Linear(intermediate, hidden, **make).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        out: torch.Tensor = self.down(torch.nn.functional.silu(gate) * up)
        return out


def overlaps(ranks: Ranks, dispatches: list[str]) -> list[dict[str, Any]]:
    """What is gained where something runs beside the wire: steps with shared experts, and in two micro-batches.

    Every variant is held to the first one's numbers before it is timed.
    """
    order = moe_core.SharedExpertsOrder
    variants = {
        "shared before": ("default", order.SEQUENTIAL),
        "shared inside": ("default", order.INTERNAL),
        "two batches": ("two_batch", order.INTERNAL),
    }
    rows: list[dict[str, Any]] = []
    for dispatch, tokens in itertools.product(dispatches, OVERLAPPED):
        sizes = LARGE | {"max_tokens_per_rank": tokens}
        shared = SharedExpert(sizes["hidden_size"], sizes["intermediate_size"], ranks.device)
        row: dict[str, Any] = {"dispatch": dispatch, "tokens": tokens}
        x, logits = inputs(ranks, sizes, tokens, 5)
        wanted = None
        for name, (runner, when) in variants.items():
            try:
                layer = ranks.layer(
                    sizes, dispatch, "unquantized", runner=runner, shared=shared, shared_experts_order=when,
                    cuda_graph=True,
                )  # fmt: skip
            except moe_core.UnsupportedError as error:
                ranks.say(f"{dispatch:12} {tokens:5} {name:14} refused: {str(error).splitlines()[0]}")
                continue
            out = layer(x, router_logits=logits)
            wanted = out if wanted is None else wanted
            wrong = ranks.worst(relative_error(out, wanted))
            row[name] = step_us(ranks, layer, tokens) if wrong <= ERROR else None
            shown = "WRONG" if row[name] is None else f"{row[name]:9.1f}"
            ranks.say(f"{dispatch:12} {tokens:5} {name:14} {shown}")
            del layer
            torch.cuda.empty_cache()
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dispatch", help="only these, separated by commas; default: all that carry tokens and run here"
    )
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="checked ones (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="random steps, each compared (default: 1000)")
    parser.add_argument("--soak", type=int, default=10_000, help="steps of soak (default: 10000)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    ranks = Ranks()
    found = registry().dispatch
    usable = [name for name, each in found.items() if each.capabilities.carries_tokens and each.probe().ok]
    dispatches = options.dispatch.split(",") if options.dispatch else usable
    where = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "processes on the CPU"
    ranks.say(f"{ranks.size} × {where}, torch {torch.__version__}; relative error against one rank")
    right = check(ranks, dispatches, options.schemes.split(","), options.steps, options.soak)
    if ranks.device.type == "cpu":
        dist.destroy_process_group()
        return
    ranks.say(
        f"\nmicroseconds at T = {', '.join(map(str, TIMED))} tokens a rank, H 7168, I 2048, E 256, K 8, CUDA graph"
    )
    rows = timings(ranks, right)
    ranks.say("\nmicroseconds a step with a shared expert, by tokens a rank: what hides behind the wire")
    overlapped = overlaps(ranks, right)
    if options.json and ranks.rank == 0:
        written = {"ranks": ranks.size, "rows": rows, "overlaps": overlapped}
        options.json.write_text(json.dumps(written, indent=2))
    ranks.group.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
