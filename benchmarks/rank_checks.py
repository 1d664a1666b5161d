"""Layers over ranks held to one rank's numbers: the product of what is installed, random steps, and a soak.

Shape letters: T tokens on this rank · M the largest T of any rank · W ranks.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

import moe_core
from benchmarks.cases import relative_error
from moe_core.plugins import registry
from moe_core.types import ActivationFormat
from moe_core.watchdog import limited

if TYPE_CHECKING:
    from benchmarks.ranks import Ranks

SMALL = {"num_experts": 32, "top_k": 4, "hidden_size": 2048, "intermediate_size": 256, "max_tokens_per_rank": 32}
TOKENS = {"equal": (16, 16, 16, 16), "unequal": (3, 32, 1, 7), "none on a rank": (5, 0, 9, 0)}
ERROR = 0.006
"""Relative Frobenius, against one rank: partial sums are rounded to bf16."""
LIMIT_S = 120
"""Of a phase; then the process says where it stands, and ends."""


def check(ranks: Ranks, dispatches: list[str], schemes: list[str], steps: int, soak: int) -> list[str]:
    """All of it, on all ranks and on smaller groups of them; returns the dispatches that are right."""
    parts = ranks.parts()
    wrong = product(parts, dispatches, schemes)
    for part, dispatch in itertools.product(parts, dispatches):
        if long_run(part, dispatch, steps, soak) > ERROR:
            wrong.add(dispatch)
    for dispatch in wrong:
        ranks.say(f"{dispatch:12} WRONG: not timed")
    return [dispatch for dispatch in dispatches if dispatch not in wrong]


def product(parts: list[Ranks], dispatches: list[str], schemes: list[str]) -> set[str]:
    """Dispatch × scheme × experts × number of ranks × token counts, whatever fits; returns wrong dispatches."""
    wrong: set[str] = set()
    ran = refused = 0
    for part, dispatch, scheme, experts in itertools.product(parts, dispatches, schemes, registry().experts):
        try:
            layer = part.layer(SMALL, dispatch, scheme, experts=experts)
        except moe_core.UnsupportedError:
            refused += 1
            continue
        with limited(f"rank {part.rank} of {part.size} in {dispatch} with {experts}", LIMIT_S):
            single = same_kernels(part, layer, scheme, experts)
            errors = {}
            for name, counts in TOKENS.items():
                x, logits = part.inputs(SMALL, counts[part.rank % 4], 1)
                errors[name] = part.worst(error_of(layer, single, x, logits))
        ran += 1
        if max(errors.values()) > ERROR:
            wrong.add(dispatch)
        shown = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
        part.say(f"{part.size} ranks, {dispatch:12} {scheme:14} {experts:18} {shown}")
    parts[-1].say(f"{ran} products ran, {refused} were refused")
    return wrong


Step = Callable[..., torch.Tensor]


def same_kernels(part: Ranks, layer: Any, scheme: str, experts: str | None) -> Step:
    """One rank with as many rows in the same kernels: another format or row bound has other kernels, and where these
    round otherwise, the 8-bit input of the second GEMM takes other values.
    """
    rows = SMALL["max_tokens_per_rank"] * part.size
    batched = layer.plan.activation_format is ActivationFormat.BATCHED
    sizes, dispatch = SMALL | {"max_tokens_per_rank": rows}, "batched" if batched else "local"
    single = part.layer(sizes, dispatch, scheme, experts=experts, alone=True)

    def step(x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        padded = (functional.pad(each, (0, 0, 0, rows - each.shape[0])) for each in (x, router_logits))
        out: torch.Tensor = single(*padded)
        return out[: x.shape[0]]

    return step


def error_of(layer: Step, single: Step, x: torch.Tensor, logits: torch.Tensor) -> float:
    out = layer(x, router_logits=logits)
    return relative_error(out, single(x, router_logits=logits)) if x.shape[0] else 0.0


def long_run(ranks: Ranks, dispatch: str, steps: int, soak: int) -> float:
    """The largest error of `steps` random steps; infinity if `soak` more leave memory behind."""
    layer = ranks.layer(SMALL, dispatch, "unquantized")
    single = same_kernels(ranks, layer, "unquantized", None)
    choose, most = random.Random(ranks.rank), 0.0
    where = f"{ranks.size} ranks, {dispatch:12}"
    with limited(f"rank {ranks.rank} of {ranks.size} in random steps of {dispatch}", LIMIT_S):
        for step in range(steps):
            x, logits = ranks.inputs(SMALL, choose.randint(0, SMALL["max_tokens_per_rank"]), step)
            most = max(most, error_of(layer, single, x, logits))
        most = ranks.worst(most)
    ranks.say(f"{where} {steps} random steps, 0 to {SMALL['max_tokens_per_rank']} tokens: {most:.4f}")
    if soak and ranks.device.type == "cuda":
        with limited(f"rank {ranks.rank} of {ranks.size} in the soak of {dispatch}", LIMIT_S):
            grown = ranks.worst(float(soak_bytes(ranks, layer, soak)))
        ranks.say(f"{where} {soak} steps of soak: memory grew by {grown:.0f} bytes")
        most = float("inf") if grown else most
    return most


def soak_bytes(ranks: Ranks, layer: Any, steps: int) -> int:
    """How many bytes of device memory `steps` steps of changing sizes leave behind."""
    choose = random.Random(7 + ranks.rank)
    sets = [ranks.inputs(SMALL, tokens, tokens) for tokens in range(SMALL["max_tokens_per_rank"] + 1)]
    before = 0
    for step in range(steps):
        layer(*choose.choice(sets))
        if step == 100:  # by then everything that is made on first use is there
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
        if step % 1000 == 0:
            layer.check()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before
