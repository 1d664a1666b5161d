"""The NVFP4 experts' whole step on this GPU, beside the bfloat16 experts of the same sizes.

    python -m benchmarks.nvfp4 [--shapes qwen3-30b,…] [--tokens 1,4,…] [--batched 4,…] [--only-ours] [--json out.json]

Correctness first: against float64 on the weights that `moe_core.formats` reads from the checkpoint's bytes; a wrong
result prints no time. Floor: the larger of bytes (4-bit weights of the touched experts with their scales, x, out, ids)
over the copy rate and FLOPs over the bfloat16 matmul rate, both measured in this run. Inputs rotate over 8 sets; T <=
1024 is timed as a CUDA graph of all sets, larger T eagerly. BATCHED `[E, 1024, H]`: so many rows an expert beside the
same rows in STANDARD format. Kernels are compiled first, in processes beside one another. T tokens · H hidden ·
I intermediate · E experts · K top-k.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks import cases
from benchmarks.experts import compile_steps, host_us
from moe_core.emulated import dequantize_expert
from moe_core.ops import (
    ExpertsLauncher,
    Nvfp4BatchedLauncher,
    Nvfp4ExpertsLauncher,
    Nvfp4Weights,
    compile_only,
    pack_nvfp4_matrix,
)
from moe_core.quant import QuantSpec, ScaleFormat
from moe_core.types import ExpertWeights, GateUpLayout

TOLERANCE = 0.006
SPEC = QuantSpec("float4_e2m1", (1, 16), ScaleFormat.E4M3, second_level=True)
CAPACITY = 1024
"""C of the BATCHED steps."""
SHAPES = [name for name, shape in cases.SHAPES.items() if not shape.transposed]
Prepare = Callable[[cases.Inputs], Callable[[], torch.Tensor]]


def checkpoint(shape: cases.Shape) -> ExpertWeights:
    """Random codes and scales between 1/8 and 2, in a checkpoint's order; rows have about unit norm."""
    e, h, i = shape.experts, shape.hidden, shape.intermediate
    codes = [torch.randint(0, 256, s, dtype=torch.uint8, device="cuda") for s in ((e, 2 * i, h // 2), (e, h, i // 2))]
    scales = [torch.randint(32, 64, (*q.shape[:2], q.shape[2] // 8), dtype=torch.uint8, device="cuda") for q in codes]
    spread = 1 + torch.arange(e, device="cuda", dtype=torch.float64)[:, None] / e
    w13_scale, w2_scale = (scale.view(torch.float8_e4m3fn) for scale in scales)
    return ExpertWeights(
        w13=codes[0], w2=codes[1], gate_up_layout=GateUpLayout.GATE_UP, w13_scale=w13_scale, w2_scale=w2_scale,
        w13_global_scale=spread.repeat(1, 2) / (2.5 * h**0.5), w2_global_scale=spread / (2.5 * i**0.5),
    )  # fmt: skip


def packed(shape: cases.Shape, weights: ExpertWeights) -> tuple[Nvfp4Weights, float]:
    """(the weights in the kernels' order, in new storage; seconds that this took)."""
    names = ("w13", "w13_scale", "w13_global_scale", "w2", "w2_scale", "w2_global_scale")
    tensors = {name: getattr(weights, name).clone() for name in names}
    torch.cuda.synchronize()
    start = time.perf_counter()
    for expert in range(shape.experts):
        pack_nvfp4_matrix(tensors["w13"][expert], tensors["w13_scale"][expert], "gate_up")
        pack_nvfp4_matrix(tensors["w2"][expert], tensors["w2_scale"][expert], None)
    torch.cuda.synchronize()
    return Nvfp4Weights(*tensors.values(), shape.activation), time.perf_counter() - start


def empty_weights(shape: cases.Shape) -> Nvfp4Weights:
    """Shapes and dtypes alone, for the compiler."""
    e, h, i = shape.experts, shape.hidden, shape.intermediate
    sizes = {
        "w13": (2 * i, h // 2, torch.uint8), "w13_scale": (2 * i, h // 16, torch.float8_e4m3fn),
        "w2": (h, i // 2, torch.uint8), "w2_scale": (h, i // 16, torch.float8_e4m3fn),
    }  # fmt: skip
    tensors = {n: torch.empty(e, r, c, dtype=d, device="meta") for n, (r, c, d) in sizes.items()}
    for name, halves in {"w13_global": 2, "w2_global": 1}.items():
        tensors[name] = torch.empty(e, halves, dtype=torch.float64, device="meta")
    return Nvfp4Weights(activation=shape.activation, **tensors)


def plain_launcher(shape: cases.Shape) -> ExpertsLauncher:
    """Our bfloat16 experts of the same sizes."""
    weights = cases.make_weights(shape, "cuda")
    return ExpertsLauncher(weights.w13, weights.w2, top_k=shape.top_k, activation=shape.activation)


def compile_step(job: tuple[cases.Shape, str, int, int]) -> None:
    """Compiles a step of (shape, "nvfp4" or "batched", T or C, compute capability as 90)."""
    shape, what, size, arch = job
    with compile_only(arch):
        if what == "batched":
            launcher = Nvfp4BatchedLauncher(empty_weights(shape))
            x = torch.empty(shape.experts, size, shape.hidden, dtype=torch.bfloat16, device="meta")
            counts = torch.empty(shape.experts, dtype=torch.int32, device="meta")
            launcher(x, counts, space_of(launcher, size, "meta"), torch.empty_like(x))
            return
        launcher = Nvfp4ExpertsLauncher(empty_weights(shape), top_k=shape.top_k)
        prepared(launcher)(cases.make_inputs(shape, size, 0, "meta"))()


def compile_all(shapes: list[cases.Shape], tokens: list[int], rows: list[int], plain: bool) -> None:
    """In processes beside one another; the GEMMs of many tokens, which take longest, first."""
    major, minor = torch.cuda.get_device_capability()
    jobs: list[tuple[cases.Shape, str, int]] = []
    for shape in shapes:
        jobs += [(shape, "batched", CAPACITY)] if rows else []
        jobs += [(replace(shape, top_k=1), "nvfp4", shape.experts * r) for r in rows]
        jobs += [(shape, "nvfp4", t) for t in tokens]
    jobs.sort(key=lambda job: job[1] != "batched" and -job[2])
    cases.compile_ahead(compile_step, [(*job, 10 * major + minor) for job in jobs])
    if plain:
        compile_steps([(shape, t) for shape in shapes for t in tokens])


def reference(weights: ExpertWeights, inputs: cases.Inputs, tokens: list[int]) -> torch.Tensor:
    """The step for some tokens in float64."""
    rows = []
    for t in tokens:
        row = torch.zeros(inputs.x.shape[1], dtype=torch.float64, device="cuda")
        for expert, weight in zip(inputs.ids[t].tolist(), inputs.weights[t].double(), strict=True):
            w13, w2 = dequantize_expert(weights, expert, SPEC)
            gate, up = (w13.double() @ inputs.x[t].double()).chunk(2)
            row += weight * (w2.double() @ (torch.nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def floor_us(shape: cases.Shape, tokens: int, distinct: float, copy: float, matmul: float) -> float:
    """As `cases.floor_us`, with half a byte and a sixteenth a weight."""
    n = 3 * shape.hidden * shape.intermediate
    moved = distinct * (n / 2 + n / 16 + 8) + 4 * tokens * shape.hidden + 8 * tokens * shape.top_k
    return max(moved / copy, 2 * n * tokens * shape.top_k / matmul) * 1e6


def prepared(launcher: Any) -> Prepare:
    """A factory of calls, one per input set: workspaces and outputs of their own, poisoned."""

    def prepare(inputs: cases.Inputs) -> Callable[[], torch.Tensor]:
        space = space_of(launcher, inputs.ids.shape[0], inputs.x.device)
        for tensor in space.values():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        out = torch.full_like(inputs.x, float("nan"))
        return lambda: launcher(inputs.x, inputs.ids, inputs.weights, space, out)

    return prepare


def measure(
    shape: cases.Shape, weights: ExpertWeights, launcher: Nvfp4ExpertsLauncher, plain: ExpertsLauncher | None,
    tokens: int, copy: float, matmul: float,
) -> dict[str, Any]:  # fmt: skip
    """One row of the table."""
    sets = [cases.make_inputs(shape, tokens, 100 * tokens + i, "cuda") for i in range(cases.NUM_INPUT_SETS)]
    distinct = cases.distinct_experts(sets)
    floor = floor_us(shape, tokens, distinct, copy, matmul)
    row: dict[str, Any] = {"shape": shape.name, "tokens": tokens, "distinct": distinct, "floor_us": floor}
    calls = [prepared(launcher)(s) for s in sets]
    outs = [call() for call in calls]
    rows = sorted({0, tokens // 2, tokens - 1})
    row["error"] = cases.relative_error(outs[-1][rows], reference(weights, sets[-1], rows))
    row["plan"] = launcher.explain(tokens)
    if row["error"] <= TOLERANCE and all(bool(torch.isfinite(out).all()) for out in outs):
        row["us"] = cases.step_us(calls, tokens)
        row["fraction"] = floor / row["us"]
        if tokens == 1:
            row["eager_host_us"] = host_us(calls[0])
        if plain is not None:
            del calls, outs
            row["bf16_us"] = cases.step_us([prepared(plain)(s) for s in sets], tokens)
    return row


def space_of(launcher: Any, size: int, device: torch.device | str = "cuda") -> dict[str, torch.Tensor]:
    return {n: torch.empty(s, dtype=d, device=device) for n, (s, d) in launcher.workspace(size).items()}


def batched(shape: cases.Shape, weights: Nvfp4Weights, rows: int, capacity: int = CAPACITY) -> dict[str, Any]:
    """`[E, C, H]` with `rows` valid rows per expert, the others NaN, against the same rows in the STANDARD format."""
    experts = shape.experts
    x = torch.full((experts, capacity, shape.hidden), float("nan"), dtype=torch.bfloat16, device="cuda")
    x[:, :rows] = torch.randn(experts, rows, shape.hidden, device="cuda")
    out = torch.full_like(x, float("nan"))
    counts = torch.full((experts,), rows, dtype=torch.int32, device="cuda")
    launcher, standard = Nvfp4BatchedLauncher(weights), Nvfp4ExpertsLauncher(weights, top_k=1)
    flat = x[:, :rows].reshape(-1, shape.hidden)
    ids = torch.arange(experts, device="cuda", dtype=torch.int32).repeat_interleave(rows)[:, None].contiguous()
    ones, flat_out = torch.ones(len(flat), 1, device="cuda"), torch.empty_like(flat)
    space, flat_space = space_of(launcher, capacity), space_of(standard, len(flat))
    steps = {
        "batched_us": lambda: launcher(x, counts, space, out),
        "standard_us": lambda: standard(flat, ids, ones, flat_space, flat_out),
    }
    for step in steps.values():
        step()
    error = cases.relative_error(out[:, :rows].reshape(flat.shape), flat_out)
    result: dict[str, Any] = {"shape": shape.name, "capacity": capacity, "rows": rows, "error": error}
    if error <= TOLERANCE:
        # The weights of all experts are larger than L2, so one set of inputs does.
        result |= {name: cases.step_us([step] * 4, 1) for name, step in steps.items()}
    return result


def batched_line(row: dict[str, Any]) -> str:
    head = f"{row['shape']:>18} BATCHED [E, {row['capacity']}, H], {row['rows']} rows each"
    if "batched_us" not in row:
        return f"{head} WRONG: error {row['error']}"
    ratio = row["batched_us"] / row["standard_us"]
    return f"{head} {row['batched_us']:.1f} us, STANDARD {row['standard_us']:.1f} us, ratio {ratio:.2f}"


def line(row: dict[str, Any]) -> str:
    head = f"{row['shape']:>18} T={row['tokens']:<6}"
    if "us" not in row:
        return f"{head} WRONG: error {row['error']}"
    text = f"{head} {row['us']:9.1f} us  fraction {row['fraction']:.3f}  error {row['error']:.4f}"
    if "bf16_us" in row:
        text += f"  bf16 {row['bf16_us']:9.1f} us, {row['bf16_us'] / row['us']:.2f} x"
    return text + (f"  host {row['eager_host_us']:.0f} us" if "eager_host_us" in row else "")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, cases.TOKENS)))
    parser.add_argument("--batched", default="4,16,64,256", help="rows an expert; empty: none")
    parser.add_argument("--only-ours", action="store_true", help="leave the bfloat16 experts out")
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shapes = [cases.SHAPES[name] for name in arguments.shapes.split(",")]
    tokens, rows = _numbers(arguments.tokens), _numbers(arguments.batched)
    compile_all(shapes, tokens, rows, not arguments.only_ours)
    copy, matmul = cases.ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {copy / 1e12:.2f} TB/s, "
          f"bf16 matmul {matmul / 1e12:.0f} TFLOP/s", flush=True)  # fmt: skip
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy": copy,
                              "matmul": matmul, "packing_s": {}, "steps": [], "batched": []}  # fmt: skip
    for shape in shapes:
        name = shape.name
        weights = checkpoint(shape)
        ours, report["packing_s"][name] = packed(shape, weights)
        print(f"{name:>18} packed in {report['packing_s'][name]:.2f} s", flush=True)
        launcher = Nvfp4ExpertsLauncher(ours, top_k=shape.top_k)
        plain = None if arguments.only_ours else plain_launcher(shape)
        for t in tokens:
            report["steps"].append(measure(shape, weights, launcher, plain, t, copy, matmul))
            print(line(report["steps"][-1]), flush=True)
        for count in rows:
            report["batched"].append(batched(shape, ours, count))
            print(batched_line(report["batched"][-1]), flush=True)
        del weights, ours, launcher, plain
        torch.cuda.empty_cache()
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
