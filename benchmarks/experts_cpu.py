"""The torch experts beside transformers' three, on this machine's CPU.

    python benchmarks/experts_cpu.py                     # both dtypes, T = 1, 16, 128, 512
    python benchmarks/experts_cpu.py --dtype bf16 --tokens 1 16 --rounds 40 --json result.json

Ids and router weights are given to all four; ours runs as a step does: `MoEKernel` with dispatch `local`, workspaces
allocated inside. One round runs all four once, in random order, on the same routing; the next round has another
routing. Printed are medians over rounds, with the 10th and 90th percentile. What computes a wrong result gets no time.

Shape letters: T tokens · H hidden · I intermediate · E experts · K top-k.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig
from transformers import __version__ as transformers_version
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_core.build import plan
from moe_core.config import ActivationSpec, MoEConfig
from moe_core.kernel import MoEKernel
from moe_core.reference import moe_reference
from moe_core.types import ExpertWeights, GateUpLayout, Routing

OURS = "moe_core"
BASELINES = ("eager", "grouped_mm", "batched_mm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest error over largest value, against the reference in fp32."""
ROUTINGS = 4

Step = Callable[[torch.Tensor, Routing], torch.Tensor]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 512], metavar="T")
    for name, default in (("experts", 64), ("topk", 8), ("hidden", 2048), ("intermediate", 768)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument(
        "--max-copy-gib", type=float, default=4.0, help="leave batched_mm out where it copies more weights than this"
    )
    parser.add_argument("--json", type=Path, help="write every time to this file")
    return parser.parse_args()


def make_module(args: argparse.Namespace, dtype: torch.dtype) -> Qwen3MoeExperts:
    """transformers' own experts with random weights."""
    config = Qwen3MoeConfig(
        num_experts=args.experts,
        num_experts_per_tok=args.topk,
        hidden_size=args.hidden,
        moe_intermediate_size=args.intermediate,
    )
    config._experts_implementation = "eager"
    module = Qwen3MoeExperts(config).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            for expert in parameter:
                expert.normal_(std=0.02)
    return module


def make_steps(args: argparse.Namespace, module: Qwen3MoeExperts, dtype: torch.dtype) -> dict[str, Step]:
    config = MoEConfig(
        num_experts=args.experts,
        top_k=args.topk,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        dtype=dtype,
    )
    kernel = MoEKernel(plan(config, dispatch="local", experts="torch", device="cpu"))
    weights = expert_weights(module)

    def transformers_step(name: str) -> Step:
        def step(x: torch.Tensor, routing: Routing) -> torch.Tensor:
            module.config._experts_implementation = name
            result: torch.Tensor = module(x, routing.topk_ids, routing.topk_weights)
            return result

        return step

    steps: dict[str, Step] = {OURS: lambda x, routing: kernel(x, routing, weights)[0]}
    return steps | {name: transformers_step(name) for name in BASELINES}


def expert_weights(module: Qwen3MoeExperts) -> ExpertWeights:
    return ExpertWeights(module.gate_up_proj.data, module.down_proj.data, GateUpLayout.GATE_UP)


def make_inputs(args: argparse.Namespace, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[Routing]]:
    x = torch.randn(tokens, args.hidden).to(dtype)
    routings = []
    for _ in range(ROUTINGS):
        weights, ids = torch.randn(tokens, args.experts).softmax(-1).topk(args.topk)
        routings.append(Routing(ids, weights / weights.sum(-1, keepdim=True)))
    return x, routings


def batched_mm_gib(args: argparse.Namespace, tokens: int, dtype: torch.dtype) -> float:
    """How much weight batched_mm gathers at once: both projections of every choice."""
    return tokens * args.topk * 3 * args.intermediate * args.hidden * dtype.itemsize / 2**30


def errors(
    steps: dict[str, Step], module: Qwen3MoeExperts, x: torch.Tensor, routings: list[Routing]
) -> dict[str, float]:
    """Largest error over largest value, of every step on every routing."""
    worst = dict.fromkeys(steps, 0.0)
    for routing in routings:
        truth = moe_reference(x, routing.topk_ids, routing.topk_weights, expert_weights(module), ActivationSpec())
        for name, step in steps.items():
            error = (step(x, routing).float() - truth).abs().max() / truth.abs().max()
            worst[name] = max(worst[name], float(error))
    return worst


def measure(steps: dict[str, Step], x: torch.Tensor, routings: list[Routing], rounds: int) -> dict[str, list[float]]:
    """Milliseconds, one list entry per round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        routing, order = routings[number % len(routings)], list(steps)
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            steps[name](x, routing)
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def summary(times: list[float]) -> str:
    deciles = statistics.quantiles(times, n=10) if len(times) > 1 else times * 9
    return f"{statistics.median(times):8.2f} ({deciles[0]:.2f}–{deciles[-1]:.2f})"


def run_case(args: argparse.Namespace, name: str, module: Qwen3MoeExperts, tokens: int) -> dict[str, object]:
    """Check, time and print one row of the table."""
    dtype = DTYPES[name]
    steps = make_steps(args, module, dtype)
    x, routings = make_inputs(args, tokens, dtype)
    copied = batched_mm_gib(args, tokens, dtype)
    if copied > args.max_copy_gib:
        del steps["batched_mm"]
    error = errors(steps, module, x, routings)
    wrong = [step for step, value in error.items() if not value <= TOLERANCE[name]]
    times = measure({step: run for step, run in steps.items() if step not in wrong}, x, routings, args.rounds)
    cells = []
    for step in (OURS, *BASELINES):
        if step in times:
            cells.append(summary(times[step]))
        else:
            cells.append(f"wrong: {error[step]:.1e}" if step in wrong else f"copies {copied:.0f} GiB")
    ratio = None
    if OURS in times and len(times) > 1:
        ratio = min(statistics.median(times[b]) for b in times if b != OURS) / statistics.median(times[OURS])
    shown = "-" if ratio is None else f"{ratio:.2f} ×"
    print(f"| {name} | {tokens:4d} | " + " | ".join(f"{cell:24}" for cell in cells) + f" | {shown} |", flush=True)
    return {"dtype": name, "tokens": tokens, "milliseconds": times, "errors": error, "speed_over_best_baseline": ratio}


def main() -> None:
    args = parse_arguments()
    random.seed(0)
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    environment = {
        "torch": torch.__version__,
        "transformers": transformers_version,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "shape": {"E": args.experts, "K": args.topk, "H": args.hidden, "I": args.intermediate},
        "rounds": args.rounds,
    }
    print(environment)
    print(f"\nmilliseconds, median of {args.rounds} rounds (10th–90th percentile)\n")
    print("| dtype | T | " + " | ".join((OURS, *BASELINES)) + " | speed over best baseline |")
    print("|" + "---|" * (len(BASELINES) + 4))
    rows = []
    with torch.no_grad():
        for name in args.dtype:
            module = make_module(args, DTYPES[name])
            rows += [run_case(args, name, module, tokens) for tokens in args.tokens]
    if args.json:
        args.json.write_text(json.dumps({"environment": environment, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
