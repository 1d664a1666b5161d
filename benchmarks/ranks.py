"""Dispatch between GPUs of one host: held to one rank's numbers first, then timed, every backend in one run.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.ranks [--only checks] [--json ranks.json]

On 4 GPUs the checks are made over all of them, and over two groups of 2, which share the work.

Shape letters: T tokens on this rank · H hidden · I intermediate · E experts · K top-k · M the largest T of any rank.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import moe_core
from benchmarks.cases import capture, event_us, relative_error
from benchmarks.rank_checks import ERROR, check
from moe_core import formats
from moe_core.group import TorchGroup
from moe_core.interfaces import Group
from moe_core.plugins import registry
from moe_core.tuner import INPUT_AMAX

LARGE = {"num_experts": 256, "top_k": 8, "hidden_size": 7168, "intermediate_size": 2048, "max_tokens_per_rank": 128}
TIMED = (1, 8, 64, 128)
SIZED = (256, 512, 1024)  # steps whose buffers are of just their size
OVERLAPPED = (128, 1024, 4096)
PAIRS = 10  # of dispatch and combine in one graph
PATIENCE_S = 300  # groups that share the work wait for each other


class Ranks:
    """This rank, a group that it is in, and what it says.

    Args:
        group: None: all ranks that torchrun has started.
        number: which of the groups of this size it is.
        of: how many there are.
    """

    def __init__(self, group: Group | None = None, number: int = 0, of: int = 1) -> None:
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if group is None:
            backend, known = ("nccl", self.device) if self.device.type == "cuda" else ("gloo", None)
            dist.init_process_group(backend, timeout=timedelta(seconds=PATIENCE_S), device_id=known)
            group = TorchGroup(timeout_s=PATIENCE_S)
        self.group, self.number, self.of = group, number, of
        self.rank, self.size = group.rank, group.size

    def parts(self) -> list[Ranks]:
        """The groups that this rank is in, of 2 ranks, of 4 and so on up to all."""
        found, size = [], 2
        while size < self.size and self.size % size == 0:
            groups = [dist.new_group(range(first, first + size)) for first in range(0, self.size, size)]
            number = self.rank // size
            found.append(Ranks(TorchGroup(groups[number], timeout_s=PATIENCE_S), number, len(groups)))
            size *= 2
        return [*found, self]

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def worst(self, value: float) -> float:
        """The largest of the group's values; NaN counts as larger than any."""
        told = torch.tensor([float("inf") if value != value else value], device=self.device, dtype=torch.float64)
        return self.group.all_gather(told).max().item()

    def layer(
        self, sizes: dict[str, int], dispatch: str | None, scheme: str, *, experts: str | None = None,
        runner: str = "default", shared: torch.nn.Module | None = None, alone: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        """A layer over the group's ranks, with random weights, the same however they are split.

        Args:
            alone: the whole layer on this rank.
            options: more fields of `MoEConfig`.
        """
        config = moe_core.MoEConfig(**(sizes | options), has_shared_experts=shared is not None, dtype=torch.bfloat16)
        parallel = moe_core.MoEParallelConfig.fold(dp_size=self.size, dp_rank=self.rank, expert_parallel=True)
        layer = moe_core.build_runner(
            config, parallel=None if alone else parallel, group=None if alone else self.group, scheme=scheme,
            device=self.device, dispatch=dispatch, experts=experts, runner=runner, shared_experts=shared,
        )  # fmt: skip
        fill(layer)
        return layer

    def inputs(
        self, sizes: dict[str, int], tokens: int, seed: int, *, rank: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states `[T, H]` and logits `[T, E]`, this rank's own, or those of another rank of the group."""
        generator = torch.Generator(self.device).manual_seed(1000 * seed + (self.rank if rank is None else rank))
        x = torch.randn(tokens, sizes["hidden_size"], generator=generator, device=self.device).bfloat16()
        return x, torch.randn(tokens, sizes["num_experts"], generator=generator, device=self.device)


def fill(layer: Any) -> None:
    """Random weights, the same for every split over ranks, and scales of their inputs where the scheme reads them."""
    config, own = layer.plan.config, set(layer.routed_experts.expert_map.local_experts)
    h, i, scale = config.hidden_size, config.intermediate_size, input_scale(layer)
    for expert in range(config.num_experts):
        if expert in own:
            generator = torch.Generator(layer.routed_experts.device).manual_seed(expert)
            for name, shape in {"gate": (i, h), "up": (i, h), "down": (h, i)}.items():
                values = torch.randn(shape, generator=generator, device=generator.device).mul_(shape[1] ** -0.5)
                layer.routed_experts.load_expert(expert, name, values.bfloat16())
                if scale is not None:
                    layer.routed_experts.load_expert(expert, f"{name}_input_scale", scale)
    layer.routed_experts.pack_weights()


def input_scale(layer: Any) -> torch.Tensor | None:
    """Of static scales, for inputs that are normally distributed; None: the scheme reads none."""
    spec = layer.plan.scheme.activation
    if spec is None or "_input_scale" not in layer.routed_experts.quant_method.required_kinds(packed=False):
        return None
    of = formats.global_scale_of if spec.second_level else formats.scale_of
    return of(torch.tensor(INPUT_AMAX), spec)


def served_by(layer: Any) -> str:
    return "+".join(each.candidate.name for each in layer.plan.ranges)


def pair_us(ranks: Ranks, layer: Any, tokens: int) -> float:
    """Dispatch and combine alone, experts left out: a graph of `PAIRS` pairs, slowest rank."""
    return replay_us(ranks, [pair_of(ranks, layer, tokens)] * PAIRS)


def pair_of(ranks: Ranks, layer: Any, tokens: int) -> Callable[[], None]:
    x, logits = ranks.inputs(LARGE, tokens, 3)
    scores, ids = logits.softmax(dim=1).topk(LARGE["top_k"], dim=1)
    kernel = layer.kernel
    made: dict[str, torch.Tensor] = {}

    def pair() -> None:
        flight = kernel.dispatch(x, moe_core.Routing(ids, scores))
        if "out" not in made:
            shape = (*flight.dispatched.x.shape[:-1], LARGE["hidden_size"])
            made["out"] = torch.randn(shape, device=x.device, dtype=torch.bfloat16)
        kernel.combine(flight, made["out"])()

    return pair


def bare_us(ranks: Ranks, layer: Any) -> float | None:
    """The collectives of such a pair alone, with the same bytes; None where a dispatch goes by other ways."""
    group, entered = ranks.group, list[Callable[[], object]]()

    def noted(name: str) -> Callable[..., Any]:
        collective = getattr(group, name)

        def enter(tensor: torch.Tensor, *sizes: Any) -> Any:
            rows = torch.empty_like(tensor).view(torch.uint8).random_().view(tensor.dtype)
            entered.append(lambda: collective(rows, *sizes)())
            return collective(tensor, *sizes)

        return enter

    for name in ("all_gather_start", "reduce_scatter_start", "all_to_all_start"):
        setattr(group, name, noted(name))
    try:
        pair_of(ranks, layer, 1)()
    finally:
        for name in ("all_gather_start", "reduce_scatter_start", "all_to_all_start"):
            delattr(group, name)
    return replay_us(ranks, entered * PAIRS) * len(entered) if entered else None


def replay_us(ranks: Ranks, calls: list[Callable[[], object]]) -> float:
    graph = capture(calls)
    best = float("inf")
    for _ in range(3):
        ranks.group.barrier()
        best = min(best, event_us(graph.replay, repeats=10) / len(calls))
    return ranks.worst(best)


def step_us(ranks: Ranks, layer: Any, tokens: int) -> float:
    """A whole step of the layer, by graph, over four sets of inputs."""
    sets = [ranks.inputs(LARGE, tokens, seed) for seed in range(4)]
    return replay_us(ranks, [lambda x=x, logits=logits: layer(x, router_logits=logits) for x, logits in sets])


def timings(ranks: Ranks, dispatches: list[str]) -> list[dict[str, Any]]:
    """Pair, its bare collectives, and step of each dispatch, in microseconds."""
    rows = []
    for scheme, dispatch in itertools.product(("unquantized", "fp8_block"), dispatches):
        try:
            layer = ranks.layer(LARGE, dispatch, scheme, cuda_graph=True)
        except moe_core.UnsupportedError as error:
            ranks.say(f"{dispatch:12} {scheme:12} refused: {str(error).splitlines()[0]}")
            continue
        row: dict[str, Any] = {"dispatch": dispatch, "scheme": scheme, "experts": served_by(layer)}
        row["bare_us"] = bare_us(ranks, layer)
        row["pair_us"] = {tokens: pair_us(ranks, layer, tokens) for tokens in TIMED}
        row["step_us"] = {tokens: step_us(ranks, layer, tokens) for tokens in TIMED}
        rows.append(row)
        for what in ("pair_us", "step_us"):
            times = " ".join(f"{row[what][tokens]:9.1f}" for tokens in TIMED)
            ranks.say(f"{dispatch:12} {scheme:12} {row['experts']:14} {what:8} {times}")
        if row["bare_us"] is not None:
            ranks.say(f"{dispatch:12} {scheme:12} {'':14} the pair's collectives alone {row['bare_us']:9.1f}")
        del layer
        row["sized_us"] = {tokens: sized_us(ranks, dispatch, scheme, tokens) for tokens in SIZED}
        shown = ", ".join(
            f"{tokens}: {us:.1f}" if us else f"{tokens}: refused" for tokens, us in row["sized_us"].items()
        )
        ranks.say(f"{dispatch:12} {scheme:12} step_us where that many tokens are the most: {shown}")
    return rows


def sized_us(ranks: Ranks, dispatch: str, scheme: str, tokens: int) -> float | None:
    """A step of T = M; None: refused."""
    torch.cuda.empty_cache()
    try:
        layer = ranks.layer(LARGE | {"max_tokens_per_rank": tokens}, dispatch, scheme, cuda_graph=True)
    except moe_core.UnsupportedError:
        return None
    return step_us(ranks, layer, tokens)


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
        "shared beside": ("default", order.MULTI_STREAM),
        "two batches": ("two_batch", order.INTERNAL),
    }
    rows: list[dict[str, Any]] = []
    for dispatch, tokens in itertools.product(dispatches, OVERLAPPED):
        sizes = LARGE | {"max_tokens_per_rank": tokens}
        shared = SharedExpert(sizes["hidden_size"], sizes["intermediate_size"], ranks.device)
        row: dict[str, Any] = {"dispatch": dispatch, "tokens": tokens}
        x, logits = ranks.inputs(sizes, tokens, 5)
        wanted = None
        for name, (runner, when) in variants.items():
            try:
                layer = ranks.layer(
                    sizes, dispatch, "unquantized", runner=runner, shared=shared,
                    cuda_graph=True, shared_experts_order=when,
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
    parser.add_argument("--schemes", help="checked ones, separated by commas; default: all that are installed")
    parser.add_argument("--steps", type=int, default=1000, help="random steps, each compared (default: 1000)")
    parser.add_argument("--soak", type=int, default=10_000, help="steps of soak (default: 10000)")
    parser.add_argument("--only", choices=("checks", "times", "overlaps"), help="one part of it; default: all")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    ranks, found = Ranks(), registry()
    usable = [name for name, each in found.dispatch.items() if each.capabilities.carries_tokens and each.probe().ok]
    asked = right = options.dispatch.split(",") if options.dispatch else usable
    schemes = options.schemes.split(",") if options.schemes else list(found.quant_methods)
    where = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "processes on the CPU"
    ranks.say(f"{ranks.size} × {where}, torch {torch.__version__}; relative error against one rank")
    written: dict[str, Any] = {"ranks": ranks.size}
    if options.only in (None, "checks"):
        right = written["right"] = check(ranks, asked, schemes, options.steps, options.soak)
    if ranks.device.type == "cuda" and options.only in (None, "times"):
        ranks.say(f"\nmicroseconds at T = {', '.join(map(str, TIMED))} tokens a rank, {LARGE}, CUDA graph")
        written["rows"] = timings(ranks, right)
    if ranks.device.type == "cuda" and options.only in (None, "overlaps"):
        ranks.say("\nmicroseconds a step with a shared expert, by tokens a rank: what hides behind the wire")
        written["overlaps"] = overlaps(ranks, right)
    if options.json and ranks.rank == 0:
        options.json.write_text(json.dumps(written, indent=2))
    ranks.group.barrier()
    dist.destroy_process_group()
    if right != asked:
        sys.exit(1)


if __name__ == "__main__":
    main()
