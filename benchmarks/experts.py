"""The experts' whole step on this GPU, beside what a PyTorch user has without an engine.

    python -m benchmarks.experts [--shapes qwen3-30b,…] [--tokens 1,4,…] [--json out.json] [--plot out.png]

Correctness first: a wrong result prints no time. Floor and fraction as in `cases.floor_us`: the larger of bytes over
the measured copy rate and FLOPs over the measured bf16 matmul rate. Inputs rotate over 8 sets; T <= 1024 is timed as a
CUDA graph of all sets, larger T eagerly. T tokens · H hidden · I intermediate · E experts · K top-k · C capacity.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks import cases
from moe_core.ops import (
    BatchedExpertsLauncher,
    ExpertsLauncher,
    ExpertsPlan,
    RouteSpec,
    choose_plan,
    compile_only,
    topk_route,
    topk_route_torch,
)

TOLERANCE = 0.005
Step = Callable[[cases.Inputs], torch.Tensor]


def our_step(
    shape: cases.Shape, weights: cases.Weights, plan: ExpertsPlan | None = None
) -> tuple[Callable[[cases.Inputs], Callable[[], torch.Tensor]], ExpertsLauncher]:
    """A factory of prepared calls, one per input set: workspaces and outputs of their own, poisoned."""
    launcher = ExpertsLauncher(
        weights.w13, weights.w2, top_k=shape.top_k, activation=shape.activation, bias13=weights.bias13,
        bias2=weights.bias2, plan=plan,
    )  # fmt: skip

    def prepare(inputs: cases.Inputs) -> Callable[[], torch.Tensor]:
        space = {}
        for name, (size, dtype) in launcher.workspace(inputs.ids.shape[0]).items():
            space[name] = torch.empty(size, dtype=dtype, device=inputs.x.device)
            if dtype.is_floating_point:
                space[name].fill_(float("nan"))
        out = torch.full_like(inputs.x, float("nan"))
        return lambda: launcher(inputs.x, inputs.ids, inputs.weights, space, out)

    return prepare, launcher


def compile_step(job: tuple[cases.Shape, int, str, int]) -> None:
    """Compiles what one step launches: (shape, T, name of the device, its compute capability as 90). For a process of
    its own; what this cannot foresee is compiled when it is launched."""
    shape, tokens, device, arch = job
    weights = cases.make_weights(shape, "meta")
    _, launcher = our_step(shape, weights)
    prepare, _ = our_step(shape, weights, choose_plan(launcher.problem, device)[0])
    with compile_only(arch):
        prepare(cases.make_inputs(shape, tokens, 0, "meta"))()


def compile_steps(steps: Iterable[tuple[cases.Shape, int]]) -> None:
    """Compiles steps (shape, T) in processes beside one another, then nothing waits for a compiler."""
    major, minor = torch.cuda.get_device_capability()
    device = torch.cuda.get_device_name()
    cases.compile_ahead(compile_step, [(*step, device, 10 * major + minor) for step in steps])


def grouped_mm_step(shape: cases.Shape, weights: cases.Weights) -> Step | None:
    """Sort, two `torch.nn.functional.grouped_mm`, index_add: what plain PyTorch offers."""
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped_mm is None or shape.transposed:
        return None
    w13, w2 = weights.w13.transpose(1, 2), weights.w2.transpose(1, 2)
    experts = torch.arange(shape.experts, device="cuda", dtype=torch.int32)

    def step(inputs: cases.Inputs) -> torch.Tensor:
        ids = inputs.ids.flatten()
        order = ids.argsort(stable=True)
        ends = torch.searchsorted(ids[order], experts, right=True).to(torch.int32)
        token = order // shape.top_k
        gate, up = grouped_mm(inputs.x[token], w13, offs=ends).chunk(2, dim=-1)
        rows = grouped_mm(torch.nn.functional.silu(gate) * up, w2, offs=ends)
        rows = rows * inputs.weights.flatten()[order].to(rows.dtype)[:, None]
        return torch.zeros_like(inputs.x).index_add_(0, token, rows)

    return step


def transformers_step(shape: cases.Shape, weights: cases.Weights, kind: str) -> Step | None:
    """transformers' own experts module over the same weights; `kind`: its experts implementation."""
    if shape.transposed:
        return None
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError:
        return None
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate, num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )  # fmt: skip
    config._experts_implementation = kind
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(weights.w13, requires_grad=False)
    module.down_proj = torch.nn.Parameter(weights.w2, requires_grad=False)
    return lambda inputs: module(inputs.x, inputs.ids.long(), inputs.weights.to(inputs.x.dtype))


def baselines(shape: cases.Shape, weights: cases.Weights) -> dict[str, Step]:
    """Name -> step; what this installation lacks is left out."""
    found = {
        "torch grouped_mm": grouped_mm_step(shape, weights),
        "transformers grouped_mm": transformers_step(shape, weights, "grouped_mm"),
        "transformers eager": transformers_step(shape, weights, "eager"),
    }
    return {name: step for name, step in found.items() if step is not None}


def checked(calls: list[Callable[[], torch.Tensor]], expected: torch.Tensor, rows: list[int]) -> tuple[float, bool]:
    """(relative error of the last set's `rows`, every output finite)."""
    outs = [call() for call in calls]
    torch.cuda.synchronize()
    return cases.relative_error(outs[-1][rows], expected), all(bool(torch.isfinite(out).all()) for out in outs)


def host_us(call: Callable[[], object], repeats: int = 300) -> float:
    """Host time of one call while the device is busy elsewhere in the queue: the cost of launching alone."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    times.sort()
    return times[len(times) // 2] * 1e6


def measure(
    shape: cases.Shape, weights: cases.Weights, tokens: int, copy: float, matmul: float, with_baselines: bool
) -> list[dict[str, Any]]:
    """One row per implementation."""
    sets = [cases.make_inputs(shape, tokens, 100 * tokens + i, "cuda") for i in range(cases.NUM_INPUT_SETS)]
    rows = cases.rows_to_check(tokens)
    expected = cases.reference(shape, weights, sets[-1], rows)
    floor = cases.floor_us(shape, tokens, cases.distinct_experts(sets), copy, matmul)
    prepare, launcher = our_step(shape, weights)
    candidates: dict[str, list[Callable[[], torch.Tensor]]] = {"moe-core": [prepare(s) for s in sets]}
    if with_baselines:
        for name, step in baselines(shape, weights).items():
            if name != "transformers eager" or tokens == 1:
                candidates[name] = [lambda s=s, step=step: step(s) for s in sets]
    results = []
    for name, calls in candidates.items():
        row: dict[str, Any] = {"shape": shape.name, "tokens": tokens, "who": name, "floor_us": floor}
        try:
            row["error"], finite = checked(calls, expected, rows)
            # The baselines round more often (bf16 between the steps): they are held to twice the tolerance.
            right = finite and row["error"] <= TOLERANCE * (1 if name == "moe-core" else 2)
            if right:
                graph = name == "moe-core" or "eager" not in name
                row["us"] = cases.step_us(calls, tokens if graph else 1 << 20)
                row["fraction"] = floor / row["us"]
                if tokens == 1:
                    row["eager_host_us"] = host_us(calls[0])
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
            if "CUDA error" in str(error):
                raise
        if name == "moe-core":
            row["plan"] = launcher.explain(tokens)
        results.append(row)
        print(line(row), flush=True)
    return results


def line(row: dict[str, Any]) -> str:
    head = f"{row['shape']:>20} T={row['tokens']:<6} {row['who']:<24}"
    if "us" not in row:
        return f"{head} WRONG or failed: error {row.get('error')}, {row.get('failed', '')}"
    host = f", host {row['eager_host_us']:.0f} us" if "eager_host_us" in row else ""
    return f"{head} {row['us']:9.1f} us  fraction {row['fraction']:.3f}  error {row['error']:.4f}{host}"


def batched(
    shape: cases.Shape, weights: cases.Weights, experts: int = 32, capacity: int = 4096, valid: int = 64
) -> dict[str, Any]:
    """`[32, 4096, H]` with 64 valid rows per expert against the same rows in the STANDARD format."""
    w13, w2 = weights.w13[:experts], weights.w2[:experts]
    experts = w13.shape[0]
    x = torch.full((experts, capacity, shape.hidden), float("nan"), dtype=w13.dtype, device="cuda")
    x[:, :valid] = torch.randn(experts, valid, shape.hidden, device="cuda")
    counts = torch.full((experts,), valid, dtype=torch.int32, device="cuda")
    bias = {"bias13": weights.bias13, "bias2": weights.bias2}
    bias = {name: None if b is None else b[:experts].contiguous() for name, b in bias.items()}
    launcher = BatchedExpertsLauncher(w13, w2, activation=shape.activation, **bias)
    space = {n: torch.empty(s, dtype=d, device="cuda") for n, (s, d) in launcher.workspace(capacity).items()}
    out = torch.full_like(x, float("nan"))
    standard = ExpertsLauncher(w13, w2, top_k=1, activation=shape.activation, **bias)
    rows = x[:, :valid].reshape(-1, shape.hidden).contiguous()
    ids = torch.arange(experts, device="cuda", dtype=torch.int32).repeat_interleave(valid)[:, None].contiguous()
    ones = torch.ones(rows.shape[0], 1, device="cuda")
    standard_space = {
        n: torch.empty(s, dtype=d, device="cuda") for n, (s, d) in standard.workspace(rows.shape[0]).items()
    }
    standard_out = torch.empty_like(rows)
    launcher(x, counts, space, out)
    standard(rows, ids, ones, standard_space, standard_out)
    error = cases.relative_error(out[:, :valid].reshape(rows.shape), standard_out)
    result: dict[str, Any] = {"shape": shape.name, "capacity": capacity, "valid": valid, "error": error}
    if error <= TOLERANCE:
        # Four steps a graph: the weights of 32 experts are larger than L2 on every shape here.
        result["batched_us"] = cases.step_us([lambda: launcher(x, counts, space, out)] * 4, 1)
        result["standard_us"] = cases.step_us([lambda: standard(rows, ids, ones, standard_space, standard_out)] * 4, 1)
        print(f"{shape.name:>20} batched [{experts}, {capacity}, H] with {valid} rows each: "
              f"{result['batched_us']:.1f} us, the same rows STANDARD {result['standard_us']:.1f} us, "
              f"ratio {result['batched_us'] / result['standard_us']:.2f}", flush=True)  # fmt: skip
    else:
        print(f"{shape.name:>20} batched WRONG: error {error}", flush=True)
    return result


def routing() -> list[dict[str, Any]]:
    """The routing kernels, graph time per call."""
    specs = {"softmax E=128 K=8": (128, RouteSpec(8, renormalize=True)),
             "grouped sigmoid E=256 K=8": (256, RouteSpec(8, "sigmoid", True, 1e-20, 8, 4))}  # fmt: skip
    results = []
    for name, (experts, spec) in specs.items():
        for tokens in (1, 256, 4096):
            logits = torch.randn(tokens, experts, device="cuda")
            bias = torch.randn(experts, device="cuda") if spec.num_groups > 1 else None
            same = torch.equal(topk_route(logits, spec, bias)[0], topk_route_torch(logits, spec, bias)[0])
            row: dict[str, Any] = {"routing": name, "tokens": tokens, "right": same}
            if same:
                row["us"] = cases.step_us([lambda l=logits, b=bias, s=spec: topk_route(l, s, b)] * 8, 1)
            print(f"routing {name} T={tokens}: " + (f"{row['us']:.1f} us" if same else "WRONG"), flush=True)
            results.append(row)
    return results


def plot(results: list[dict[str, Any]], path: str) -> None:
    """Fraction of the roofline over T, one panel per shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["shape"] for row in results))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.5), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for who in dict.fromkeys(row["who"] for row in results):
            points = [
                (r["tokens"], r["fraction"]) for r in results if r["shape"] == name and r["who"] == who and "us" in r
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=who)
        axis.set(title=name, xlabel="tokens", xscale="log")
        axis.axhline(1, color="grey", linewidth=0.8)
    axes[0][0].set_ylabel("fraction of the roofline")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(cases.SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, cases.TOKENS)))
    parser.add_argument("--only-ours", action="store_true", help="leave the baselines out")
    parser.add_argument("--json", default="")
    parser.add_argument("--plot", default="")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    names, sizes = arguments.shapes.split(","), [int(tokens) for tokens in arguments.tokens.split(",")]
    compile_steps((cases.SHAPES[name], tokens) for name in names for tokens in sizes)
    copy, matmul = cases.ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {copy / 1e12:.2f} TB/s, "
          f"bf16 matmul {matmul / 1e12:.0f} TFLOP/s", flush=True)  # fmt: skip
    shapes = {name: vars(cases.SHAPES[name]) for name in names}
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy": copy,
                              "matmul": matmul, "shapes": shapes, "steps": [], "batched": []}  # fmt: skip
    for name in names:
        shape = cases.SHAPES[name]
        weights = cases.make_weights(shape, "cuda")
        for tokens in sizes:
            report["steps"] += measure(shape, weights, tokens, copy, matmul, not arguments.only_ours)
        report["batched"].append(batched(shape, weights))
        del weights
        torch.cuda.empty_cache()
    report["routing"] = routing()
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)
    if arguments.plot:
        plot(report["steps"], arguments.plot)


if __name__ == "__main__":
    main()
