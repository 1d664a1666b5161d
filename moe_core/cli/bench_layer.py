"""What `moe-core bench` measures: one layer's experts step, ours and the baselines' on the same weights and inputs.

Shape letters: T tokens · H hidden · I intermediate · E experts · K top-k.

Floor of a case = the larger of bytes moved over the measured copy rate and FLOPs over the measured matmul rate. FLOPs =
6·T·K·H·I; bytes = distinct experts touched · bytes of one expert + one read and one write of the tokens. Fraction =
floor / time. Nothing is timed before its result has been compared with the reference.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from moe_core.build import plan
from moe_core.cli.measure import synchronize
from moe_core.config import ActivationSpec, MoEConfig
from moe_core.errors import UnsupportedError
from moe_core.kernel import MoEKernel
from moe_core.reference import moe_reference
from moe_core.tuner import TOLERANCE
from moe_core.types import ExpertWeights, GateUpLayout, Routing

INPUT_SETS = 8
"""Inputs rotate, so that no activation is in a cache by accident."""
CHECKED_TOKENS = 64
"""Tokens of each set that are compared with the reference, which is slow."""
BASELINES = ("eager", "grouped_mm", "batched_mm")
MAX_COPIED_BYTES = 8 * 2**30
"""batched_mm gathers every choice's weights; above this it is left out."""


@attrs.frozen
class Shape:
    """One model's experts."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b", 2048, 768, 128, 8),
        Shape("deepseek-v3-tp8", 7168, 256, 256, 8),
        Shape("gpt-oss-120b-dims", 2880, 2880, 128, 4),
        Shape("mixtral-8x7b", 4096, 14336, 8, 2),
    )
}

Inputs = tuple[torch.Tensor, Routing]
Step = Callable[[torch.Tensor, Routing], torch.Tensor]


@attrs.frozen
class Result:
    """One contestant in one case.

    Attributes:
        name: an experts backend, or "transformers eager" and so on.
        microseconds: median of a step, or None.
        spread: (10th, 90th percentile) of it.
        host_microseconds: until the call returns, without waiting for the device.
        error: relative Frobenius error.
        fraction: of the roofline.
        why_not: in place of a time.
    """

    name: str
    microseconds: float | None = None
    spread: tuple[float, float] | None = None
    host_microseconds: float | None = None
    error: float | None = None
    fraction: float | None = None
    why_not: str = ""


def parse_shape(text: str) -> Shape:
    """A name from `SHAPES`, or "H,I,E,K"."""
    if text in SHAPES:
        return SHAPES[text]
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--shape {text!r}: pass one of {', '.join(SHAPES)}, or four numbers H,I,E,K")
    return Shape(text, *(int(part) for part in parts))


@torch.no_grad()
def measure_case(
    shape: Shape,
    tokens: int,
    weights: ExpertWeights,
    backends: Sequence[str],
    rates: tuple[float, float],
    rounds: int,
) -> list[Result]:
    """Check and time every contestant on one shape and one T, interleaved, in random order."""
    dtype, device = weights.w2.dtype, weights.w2.device
    sets = [_inputs(shape, tokens, seed, dtype, device) for seed in range(INPUT_SETS)]
    steps, results = _contestants(shape, tokens, weights, backends)
    errors = {name: max(_error(step, item, weights) for item in sets[:2]) for name, step in steps.items()}
    wrong = {name for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    results += [Result(name, error=errors[name], why_not=f"wrong: relative error {errors[name]:.1e}") for name in wrong]
    right = {name: step for name, step in steps.items() if name not in wrong}
    times, host = _times(right, sets, rounds, device)
    floor = _floor(shape, tokens, sets, dtype, rates)
    for name, values in times.items():
        deciles = statistics.quantiles(values, n=10)
        median = statistics.median(values)
        results.append(
            Result(
                name,
                median * 1e6,
                (deciles[0] * 1e6, deciles[-1] * 1e6),
                statistics.median(host[name]) * 1e6,
                errors[name],
                floor / median,
            )
        )
    return results


def random_weights(shape: Shape, dtype: torch.dtype, device: torch.device) -> ExpertWeights:
    """Random values, gate and up in halves, as most checkpoints have them."""
    w13 = torch.empty(shape.experts, 2 * shape.intermediate, shape.hidden, dtype=dtype, device=device)
    w2 = torch.empty(shape.experts, shape.hidden, shape.intermediate, dtype=dtype, device=device)
    for expert in range(shape.experts):  # one by one: the fp32 draws of all would double the peak
        w13[expert].normal_(std=shape.hidden**-0.5)
        w2[expert].normal_(std=shape.intermediate**-0.5)
    return ExpertWeights(w13, w2, GateUpLayout.GATE_UP)


def machine_rates(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """(bytes per second of a copy, read and written; FLOP per second of a square matmul), measured now."""
    cuda = device.type == "cuda"
    source = torch.empty((2 << 30) if cuda else (256 << 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / _best(lambda: target.copy_(source), device)
    size = 8192 if cuda else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return copy, 2 * size**3 / _best(lambda: torch.mm(a, b), device)


def _best(call: Callable[[], object], device: torch.device) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _inputs(shape: Shape, tokens: int, seed: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Uniform random routing without duplicates in a row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, shape.experts, generator=generator).topk(shape.top_k, dim=1).indices
    weights = torch.softmax(torch.randn(tokens, shape.top_k, generator=generator), dim=1)
    x = torch.randn(tokens, shape.hidden, generator=generator).to(dtype)
    return x.to(device), Routing(ids.to(device), weights.to(device))


def _contestants(
    shape: Shape, tokens: int, weights: ExpertWeights, backends: Sequence[str]
) -> tuple[dict[str, Step], list[Result]]:
    """The steps that can run, and a result for each that can't."""
    config = MoEConfig(
        num_experts=shape.experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        dtype=weights.w2.dtype,
    )
    steps: dict[str, Step] = {}
    refused: list[Result] = []
    for name in backends:
        try:
            made = plan(config, experts=name, device=weights.w2.device, routing_is_external=True)
        except UnsupportedError as error:
            found = [item for report in error.rejections for item in report.rejections]
            found.sort(key=lambda item: item.candidate != f"experts {name}")  # what speaks against itself comes first
            refused.append(Result(name, why_not=found[0].reason if found else str(error)))
            continue
        kernel = MoEKernel(made)
        steps[name] = lambda x, routing, kernel=kernel: kernel(x, routing, weights)[0]  # type: ignore[misc]
    module = _transformers_experts(shape, weights)
    for name in BASELINES if module is not None else ():
        copied = tokens * shape.top_k * 3 * shape.intermediate * shape.hidden * weights.w2.element_size()
        if name == "batched_mm" and copied > MAX_COPIED_BYTES:
            refused.append(Result(f"transformers {name}", why_not=f"would copy {copied / 2**30:.0f} GiB of weights"))
            continue
        steps[f"transformers {name}"] = _transformers_step(module, name)
    return steps, refused


def _transformers_experts(shape: Shape, weights: ExpertWeights) -> Any | None:
    """transformers' own experts on the same storage; None where transformers is not installed."""
    try:
        from transformers import Qwen3MoeConfig  # noqa: PLC0415 - an extra
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts  # noqa: PLC0415 - an extra
    except ImportError:
        return None
    config = Qwen3MoeConfig(
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
    )
    config._experts_implementation = "eager"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(weights.w13, requires_grad=False)
    module.down_proj = torch.nn.Parameter(weights.w2, requires_grad=False)
    return module


def _transformers_step(module: Any, name: str) -> Step:
    def step(x: torch.Tensor, routing: Routing) -> torch.Tensor:
        module.config._experts_implementation = name
        out: torch.Tensor = module(x, routing.topk_ids, routing.topk_weights)
        return out

    return step


def _error(step: Step, inputs: Inputs, weights: ExpertWeights) -> float:
    x, routing = inputs
    some = slice(0, CHECKED_TOKENS)
    ids, router_weights = routing.topk_ids[some], routing.topk_weights[some]
    wanted = moe_reference(x[some], ids, router_weights, weights, ActivationSpec())
    return float((step(x, routing)[some].float() - wanted).norm() / wanted.norm())


def _times(
    steps: dict[str, Step], sets: list[Inputs], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each step, whole and on the host, one entry per round; all contestants in turn, in random order."""
    whole: dict[str, list[float]] = {name: [] for name in steps}
    host: dict[str, list[float]] = {name: [] for name in steps}
    rotating, order = itertools.cycle(sets), random.Random(0)
    for _ in range(rounds):
        x, routing = next(rotating)
        for name in order.sample(list(steps), len(steps)):
            synchronize(device)
            start = time.perf_counter()
            steps[name](x, routing)
            host[name].append(time.perf_counter() - start)
            synchronize(device)
            whole[name].append(time.perf_counter() - start)
    return whole, host


def _floor(shape: Shape, tokens: int, sets: list[Inputs], dtype: torch.dtype, rates: tuple[float, float]) -> float:
    """Seconds that no implementation can undercut, at the measured rates."""
    copy_rate, matmul_rate = rates
    distinct = statistics.mean(routing.topk_ids.unique().numel() for _, routing in sets)
    one_expert = 3 * shape.hidden * shape.intermediate * dtype.itemsize
    moved = distinct * one_expert + 2 * tokens * shape.hidden * dtype.itemsize + 8 * tokens * shape.top_k
    flops = 6 * tokens * shape.top_k * shape.hidden * shape.intermediate
    return max(moved / copy_rate, flops / matmul_rate)
