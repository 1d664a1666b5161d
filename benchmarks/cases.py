"""Shapes, inputs, floors and timing that the experts benchmarks share.

T tokens · H hidden · I intermediate · E experts · K top-k.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moe_core import timing
from moe_core.ops import Activation
from moe_core.timing import capture, event_us  # noqa: F401 - the other benchmarks take their timing from here

NUM_INPUT_SETS = 8  # inputs rotate, so that nothing is in L2 by accident
GRAPH_UP_TO = 1024  # larger steps are timed eagerly: their host time does not matter
MAX_PROCESSES = 16  # that compile beside one another: each holds a torch of its own


@dataclass(frozen=True)
class Shape:
    """One model's experts; `transposed`: weights stored [E, H, 2I] and [E, I, H], rows interleaved, bias and clamp."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    transposed: bool = False

    @property
    def activation(self) -> Activation:
        if self.transposed:
            return Activation("swiglu_oai", "interleaved", limit=7.0)
        return Activation("silu", "gate_up")


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b", 2048, 768, 128, 8),
        Shape("deepseek-v3-tp8", 7168, 256, 256, 8),
        Shape("gpt-oss-120b-dims", 2880, 2880, 128, 4),
        Shape("mixtral-8x7b", 4096, 14336, 8, 2),
        Shape("gpt-oss-120b", 2880, 2880, 128, 4, transposed=True),
    )
}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)


@dataclass
class Weights:
    w13: torch.Tensor
    w2: torch.Tensor
    bias13: torch.Tensor | None = None
    bias2: torch.Tensor | None = None


@dataclass
class Inputs:
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def make_weights(shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> Weights:
    """Random weights with rows of unit norm, as views where the shape says so."""
    e, h, i = shape.experts, shape.hidden, shape.intermediate
    if device == "meta":
        w13, w2 = torch.empty(e, 2 * i, h, device=device, dtype=dtype), torch.empty(e, h, i, device=device, dtype=dtype)
    else:
        w13 = torch.randn(e, 2 * i, h, device=device, dtype=dtype).mul_(h**-0.5)
        w2 = torch.randn(e, h, i, device=device, dtype=dtype).mul_(i**-0.5)
    if not shape.transposed:
        return Weights(w13, w2)
    w13, w2 = w13.view(e, h, 2 * i).transpose(1, 2), w2.view(e, i, h).transpose(1, 2)
    bias13, bias2 = torch.empty(e, 2 * i, device=device, dtype=dtype), torch.empty(e, h, device=device, dtype=dtype)
    if device != "meta":
        bias13.normal_(), bias2.normal_()
    return Weights(w13, w2, bias13, bias2)


def make_inputs(shape: Shape, tokens: int, seed: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Uniform random routing without duplicates in a row, fixed seed."""
    if device == "meta":
        ids = torch.empty(tokens, shape.top_k, dtype=torch.int32, device=device)
        x = torch.empty(tokens, shape.hidden, dtype=dtype, device=device)
        return Inputs(x, ids, torch.empty(tokens, shape.top_k, device=device))
    generator = torch.Generator(device).manual_seed(seed)
    draw = {"generator": generator, "device": device}
    ids = torch.rand(tokens, shape.experts, **draw).topk(shape.top_k, dim=1).indices
    weights = torch.softmax(torch.randn(tokens, shape.top_k, **draw), dim=1)
    x = torch.randn(tokens, shape.hidden, **draw).to(dtype)
    return Inputs(x, ids.to(torch.int32), weights)


def reference(shape: Shape, weights: Weights, inputs: Inputs, tokens: list[int]) -> torch.Tensor:
    """The step for some tokens in float32, one token at a time."""
    from moe_core.ops import experts_step_torch

    rows = []
    for t in tokens:
        e = inputs.ids[t].long()
        local = torch.arange(shape.top_k, device=e.device)[None, :]
        rows.append(
            experts_step_torch(
                inputs.x[t : t + 1].float(), local, inputs.weights[t : t + 1], weights.w13[e], weights.w2[e],
                activation=shape.activation,
                bias13=None if weights.bias13 is None else weights.bias13[e],
                bias2=None if weights.bias2 is None else weights.bias2[e],
            )
        )  # fmt: skip
    return torch.cat(rows)


def rows_to_check(tokens: int, most: int = 24) -> list[int]:
    """Evenly spread tokens, the first and the last among them: the reference takes K experts for each."""
    return [int(row) for row in torch.linspace(0, tokens - 1, min(tokens, most))]


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error; NaN if anything is not finite."""
    if not torch.isfinite(out).all():
        return float("nan")
    return ((out.float() - expected.float()).norm() / expected.float().norm()).item()


def floor_us(shape: Shape, tokens: int, distinct: float, copy_rate: float, matmul_rate: float) -> float:
    """max(bytes / copy rate, FLOPs / matmul rate): weights of the touched experts once, x and out once, ids."""
    weight_bytes = distinct * 6 * shape.hidden * shape.intermediate
    moved = weight_bytes + 4 * tokens * shape.hidden + 8 * tokens * shape.top_k
    flops = 6 * tokens * shape.top_k * shape.hidden * shape.intermediate
    return max(moved / copy_rate, flops / matmul_rate) * 1e6


def distinct_experts(sets: list[Inputs]) -> float:
    """Mean number of experts that the input sets touch."""
    return statistics.mean(s.ids.unique().numel() for s in sets)


def step_us(calls: list[Callable[[], object]], tokens: int, repeats: int = 10, pause: float = 0.5) -> float:
    """Time of one of `calls`, which are one step on several input sets: a graph of all up to T = 1024, else eager."""
    return timing.step_us(calls, graph=tokens <= GRAPH_UP_TO, repeats=repeats, pause=pause)


def compile_ahead(compile_one: Callable[[Any], None], jobs: Iterable[Any]) -> None:
    """Fills Triton's cache by `compile_one` of each job, in processes beside one another."""
    processes = min(os.cpu_count() or 1, MAX_PROCESSES)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(compile_one, jobs):
            pass


def ceilings() -> tuple[float, float]:
    """(copy rate in bytes per second, read and written; bf16 matmul rate in FLOP per second)."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / event_us(partial(target.copy_, source)) * 1e6
    del source, target
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    matmul = 2 * 8192**3 / event_us(lambda: torch.mm(a, b.T), 12, 4) * 1e6
    return copy, matmul
