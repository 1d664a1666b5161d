"""Experts of plugins at prefill sizes, in bf16 and in block FP8: DeepGEMM's beside whatever else runs the same layer.

    python -m benchmarks.deepgemm [--shapes mixtral-8x7b,…] [--schemes bf16,fp8] [--tokens 1024,…] [--json FILE]

Correctness first: a wrong result prints no time. A fraction is the floor of `floor_us` over the time, with the
matmul rate of the format, measured in the same run. T tokens · H hidden · I intermediate · E experts · K top-k.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

import moe_core
from benchmarks import cases
from moe_core import formats
from moe_core.config import ActivationSpec, MoEConfig
from moe_core.emulated import dequantize_expert
from moe_core.interfaces import Experts
from moe_core.plugins import registry
from moe_core.quant import UNQUANTIZED, QuantScheme, QuantSpec
from moe_core.reference import moe_reference
from moe_core.types import ActivationFormat, Dispatched, ExpertWeights, GateUpLayout

FP8 = QuantScheme(
    "fp8_block", QuantSpec("float8_e4m3fn", (128, 128)), QuantSpec("float8_e4m3fn", (1, 128), dynamic=True)
)
SCHEMES = {"bf16": UNQUANTIZED, "fp8": FP8}
TOLERANCE = {"bf16": 0.006, "fp8": 0.05}
_TORCH_EXPERTS = ("torch", "fp8_torch", "fp8_torch_cached")  # right, not fast, and they wait for the device
_CHECKED = 24


def weights_of(shape: cases.Shape, scheme: QuantScheme) -> ExpertWeights:
    """Random weights of unit norm, quantized expert by expert."""
    plain = cases.make_weights(shape, "cuda")
    if scheme.weight is None:
        return ExpertWeights(plain.w13, plain.w2, GateUpLayout.GATE_UP)
    parts: dict[str, list[torch.Tensor]] = {"w13": [], "w13_scale": [], "w2": [], "w2_scale": []}
    for w13, w2 in zip(plain.w13, plain.w2, strict=True):
        q13, s13 = formats.quantize(w13.unflatten(0, (2, shape.intermediate)), scheme.weight)
        q2, s2 = formats.quantize(w2, scheme.weight)
        for name, value in zip(parts, (q13.flatten(0, 1), s13, q2, s2), strict=True):
            parts[name].append(value)
    return ExpertWeights(
        gate_up_layout=GateUpLayout.GATE_UP, **{name: torch.stack(values) for name, values in parts.items()}
    )


def reference(
    shape: cases.Shape, scheme: QuantScheme, weights: ExpertWeights, inputs: cases.Inputs, tokens: list[int]
) -> torch.Tensor:
    """The step for some tokens in float32, on the dequantized weights, one token at a time."""
    rows = []
    for t in tokens:
        chosen = inputs.ids[t].tolist()
        if scheme.weight is None:
            pairs = [(weights.w13[e].float(), weights.w2[e].float()) for e in chosen]
        else:
            pairs = [dequantize_expert(weights, e, scheme.weight) for e in chosen]
        own = ExpertWeights(
            torch.stack([w13 for w13, _ in pairs]), torch.stack([w2 for _, w2 in pairs]), GateUpLayout.GATE_UP
        )
        ids = torch.arange(len(chosen), device="cuda")[None]
        x = inputs.x[t : t + 1].float()
        rows.append(moe_reference(x, ids, inputs.weights[t : t + 1], own, ActivationSpec("silu")))
    return torch.cat(rows)


def candidates(config: MoEConfig, scheme: QuantScheme) -> dict[str, Experts]:
    """Every GPU backend that takes the layer with weights in the canonical layout."""
    found = {}
    for name, candidate in registry().experts.items():
        if name in _TORCH_EXPERTS:
            continue
        try:
            plan = moe_core.plan(config, scheme=scheme, dispatch="local", experts=name, device="cuda")
        except moe_core.UnsupportedError:
            continue
        if plan.weight_layout == "canonical":
            found[name] = candidate.factory(config, plan.parallel, scheme, None, config.placement)
    return found


def prepared(experts: Experts, weights: ExpertWeights, inputs: cases.Inputs) -> Callable[[], torch.Tensor]:
    """One step on workspaces of its own, as a call."""
    shapes = experts.workspace_shapes(inputs.x.shape[0], ActivationFormat.STANDARD)
    space = {name: torch.empty(shape, dtype=dtype, device="cuda") for name, (shape, dtype) in shapes.items()}
    out = torch.full_like(inputs.x, float("nan"))
    dispatched = Dispatched(inputs.x, None, topk_ids=inputs.ids, topk_weights=inputs.weights)

    def call() -> torch.Tensor:
        experts.apply(dispatched, weights, space, out)
        return out

    return call


def fp8_rate() -> float:
    """fp8 matmul rate in FLOP per second, one scale per tensor, 8192³."""
    a = torch.randn(8192, 8192, device="cuda").to(torch.float8_e4m3fn)
    b = torch.randn(8192, 8192, device="cuda").to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    multiply = lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
    return 2 * 8192**3 / cases.event_us(multiply, 12, 4) * 1e6


def floor_us(shape: cases.Shape, scheme: QuantScheme, tokens: int, distinct: float, copy: float, rate: float) -> float:
    """max(bytes / copy rate, FLOPs / matmul rate): weights and scales of the touched experts, x and out, ids."""
    elements = 3 * shape.hidden * shape.intermediate
    expert = 2 * elements if scheme.weight is None else elements + elements // 128**2 * 4
    moved = distinct * expert + 4 * tokens * shape.hidden + 8 * tokens * shape.top_k
    return max(moved / copy, 2 * elements * tokens * shape.top_k / rate) * 1e6


def measure(
    shape: cases.Shape, name: str, tokens: int, weights: ExpertWeights, copy: float, rate: float, input_sets: int
) -> list[dict[str, Any]]:
    """One row per backend."""
    scheme = SCHEMES[name]
    config = MoEConfig(
        num_experts=shape.experts, top_k=shape.top_k, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        dtype=torch.bfloat16,
    )  # fmt: skip
    sets = [cases.make_inputs(shape, tokens, seed, "cuda") for seed in range(input_sets)]
    floor = floor_us(shape, scheme, tokens, cases.distinct_experts(sets), copy, rate)
    checked = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:_CHECKED].tolist()
    expected = reference(shape, scheme, weights, sets[0], checked)
    rows = []
    for backend, experts in candidates(config, scheme).items():
        row: dict[str, Any] = {"shape": shape.name, "scheme": name, "tokens": tokens, "who": backend}
        calls = [prepared(experts, weights, one) for one in sets]
        row["error"] = cases.relative_error(calls[0]()[checked], expected)
        if row["error"] <= TOLERANCE[name]:
            row["us"] = cases.step_us(calls, tokens)
            row["fraction"] = floor / row["us"]
        rows.append(row)
        shown = f"{row['us']:9.1f} us  {row['fraction']:5.0%}" if "us" in row else "WRONG"
        print(f"{shape.name:18} {name:5} T={tokens:<6} {backend:14} error {row['error']:.4f}  {shown}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="mixtral-8x7b,qwen3-30b,deepseek-v3-tp8")
    parser.add_argument("--schemes", default="bf16,fp8")
    parser.add_argument("--tokens", default="1024,4096,16384")
    parser.add_argument("--input-sets", type=int, default=4, help="inputs rotate, so that nothing is in L2 by accident")
    parser.add_argument("--json", help="write the rows here")
    asked = parser.parse_args()
    copy, bf16 = cases.ceilings()
    rates = {"bf16": bf16, "fp8": fp8_rate()}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {copy / 1e12:.2f} TB/s, "
          + ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in rates.items()), flush=True)  # fmt: skip
    rows = []
    for name in asked.schemes.split(","):
        for shape in (cases.SHAPES[key] for key in asked.shapes.split(",")):
            weights = weights_of(shape, SCHEMES[name])
            for tokens in map(int, asked.tokens.split(",")):
                rows += measure(shape, name, tokens, weights, copy, rates[name], asked.input_sets)
            del weights
            torch.cuda.empty_cache()
    if asked.json:
        with open(asked.json, "w", encoding="utf-8") as file:
            json.dump({"copy": copy, "rates": rates, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
