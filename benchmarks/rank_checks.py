"""Layers over ranks held to one rank's numbers: the product of what is installed, random steps, and a soak.

Shape letters: T tokens on this rank · M the largest T of any rank · W ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn import functional

import moe_core
from benchmarks.cases import relative_error
from moe_core.plugins import registry
from moe_core.quant import QuantSpec, ScaleFormat
from moe_core.types import MODEL_DTYPE_PAYLOAD, ActivationFormat
from moe_core.watchdog import limited

if TYPE_CHECKING:
    from benchmarks.ranks import Ranks

SMALL = {"num_experts": 16, "top_k": 4, "hidden_size": 2048, "intermediate_size": 256, "max_tokens_per_rank": 32}
TOKENS = {"equal": (16, 16, 16, 16), "unequal": (3, 32, 1, 7), "none on a rank": (5, 0, 9, 0)}
ERROR = 0.006
"""Relative Frobenius, against one rank: partial sums are rounded to bf16."""
LIMIT_S = 120
"""Of a phase; then the process says where it stands, and ends."""


def check(ranks: Ranks, dispatches: list[str], schemes: list[str], steps: int, soak: int) -> list[str]:
    """All of it, on all ranks and on smaller groups of them; returns the dispatches that are right."""
    wrong: set[str] = set()
    for part in ranks.parts():
        found = product(part, dispatches, schemes[part.number :: part.of])
        for dispatch in dispatches[part.number :: part.of] if steps or soak else ():
            if long_run(part, dispatch, steps, soak) > ERROR:
                found.add(dispatch)
        told: list[set[str]] = [set()] * dist.get_world_size()
        dist.all_gather_object(told, found)
        wrong.update(*told)
    for dispatch in sorted(wrong):
        ranks.say(f"{dispatch:12} WRONG: not timed")
    return [dispatch for dispatch in dispatches if dispatch not in wrong]


def product(part: Ranks, dispatches: list[str], schemes: list[str]) -> set[str]:
    """Dispatch × scheme × experts × token counts, whatever fits; returns wrong dispatches."""
    wrong: set[str] = set()
    wanted: dict[tuple[Any, ...], dict[str, torch.Tensor]] = {}
    counts = {name: [tokens[rank % 4] for rank in range(part.size)] for name, tokens in TOKENS.items()}
    ran = refused = 0
    for dispatch, scheme, experts in itertools.product(dispatches, schemes, registry().experts):
        try:
            layer = part.layer(SMALL, dispatch, scheme, experts=experts)
        except moe_core.UnsupportedError:
            refused += 1
            continue
        with limited(f"rank {part.rank} of {part.size} in {dispatch} with {experts}", LIMIT_S):
            same = (layer.plan.activation_format, scheme, experts, quantizes_by_itself(layer))
            if same not in wanted:
                single = same_kernels(part, layer, scheme, experts)
                wanted[same] = {name: of_one_rank(part, single, tokens, 1) for name, tokens in counts.items()}
            errors = {
                name: part.worst(error_of(part, layer, wanted[same][name], tokens, 1))
                for name, tokens in counts.items()
            }
        ran += 1
        if max(errors.values()) > ERROR:
            wrong.add(dispatch)
        shown = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
        part.say(f"{part.size} ranks, {dispatch:12} {scheme:14} {experts:18} {shown}")
    part.say(f"{part.size} ranks, {', '.join(schemes)}: {ran} products ran, {refused} were refused")
    return wrong


Step = Callable[..., torch.Tensor]


def same_kernels(part: Ranks, layer: Any, scheme: str, experts: str | None) -> Step:
    """One rank with as many rows per expert in the same kernels, quantized as the dispatch does it.

    Another format or row bound has other kernels, and where one code or the last bit of a sum is another, many codes of
    the second GEMM's 8-bit input may be.
    """
    rows, dispatch = SMALL["max_tokens_per_rank"] * part.size, "batched"
    if layer.plan.activation_format is ActivationFormat.STANDARD:
        dispatch = "local"
        if scheme.startswith("fp8"):  # rows per expert of this rank choose these kernels, and here all experts are
            rows *= part.size
    by_itself = quantizes_by_itself(layer)  # the layer is not kept
    sizes = SMALL | {"max_tokens_per_rank": rows}
    single = part.layer(sizes, dispatch, scheme, experts=experts, alone=True)

    def step(x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        padded = (functional.pad(each, (0, 0, 0, rows - each.shape[0])) for each in (x, router_logits))
        with nixl_eps_quantizer() if by_itself else contextlib.nullcontext():
            out: torch.Tensor = single(*padded)
        return out[: x.shape[0]]

    return step


def quantizes_by_itself(layer: Any) -> bool:
    """The dispatch is the one that has another formula than `formats`, and rows travel quantized."""
    return layer.plan.dispatch.name == "nixl_ep" and layer.plan.payload != MODEL_DTYPE_PAYLOAD


@contextlib.contextmanager
def nixl_eps_quantizer() -> Iterator[None]:
    """moe-batched on one rank quantizes rows as NIXL EP does."""
    from moe_batched import prepare_finalize
    from moe_nixl_ep.emulation import quantize

    def quantize_rows(x: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize(x, spec.scale_format is ScaleFormat.UE8M0)

    ours, prepare_finalize.quantize_rows = prepare_finalize.quantize_rows, quantize_rows
    try:
        yield
    finally:
        prepare_finalize.quantize_rows = ours


def of_one_rank(part: Ranks, single: Step, counts: Sequence[int], seed: int) -> torch.Tensor:
    """`[T, H]`, this rank's rows of what one rank makes of the tokens of all: scales that rows share are then the
    same ones.
    """
    everybody = [part.inputs(SMALL, tokens, seed, rank=rank) for rank, tokens in enumerate(counts)]
    x, logits = (torch.cat(each) for each in zip(*everybody, strict=True))
    return single(x, router_logits=logits).split(list(counts))[part.rank]


def error_of(part: Ranks, layer: Step, wanted: torch.Tensor, counts: Sequence[int], seed: int) -> float:
    x, logits = part.inputs(SMALL, counts[part.rank], seed)
    out = layer(x, router_logits=logits)
    return relative_error(out, wanted) if x.shape[0] else 0.0


def long_run(ranks: Ranks, dispatch: str, steps: int, soak: int) -> float:
    """The largest error of `steps` random steps; infinity if `soak` more leave memory behind."""
    layer = ranks.layer(SMALL, dispatch, "unquantized")
    single = same_kernels(ranks, layer, "unquantized", None)
    choose, most = random.Random(ranks.size), 0.0
    where = f"{ranks.size} ranks, {dispatch:12}"
    with limited(f"rank {ranks.rank} of {ranks.size} in random steps of {dispatch}", LIMIT_S):
        for step in range(steps):
            counts = [choose.randint(0, SMALL["max_tokens_per_rank"]) for _ in range(ranks.size)]
            wanted = of_one_rank(ranks, single, counts, step)
            most = max(most, error_of(ranks, layer, wanted, counts, step))
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
