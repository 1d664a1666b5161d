"""The FP8 experts' whole step on this GPU, quantization of activations included, beside our own bf16 experts.

    python -m benchmarks.fp8 [--shapes qwen3-30b,…] [--schemes block,tensor,…] [--tokens 1,4,…] [--json out.json]

Correctness first: a wrong result prints no time. Floor: the larger of bytes over the copy rate and FLOPs over the rate
of the matrix instruction that the scheme uses (fp8, or bf16 for weight-only), both measured in the same run. Bytes of
one expert: n = 3·H·I, and 4 per block, or 8. Inputs, graphs and pauses as in `cases.py`.
T tokens · H hidden · I intermediate · E experts · K top-k.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import cases, experts
from moe_core.ops import Fp8ExpertsLauncher, Fp8Format, Fp8Weights, compile_only, experts_step_torch

E4M3 = torch.float8_e4m3fn
SCHEMES = {
    "block": Fp8Format("block", "group"),
    "tensor": Fp8Format("tensor", "static"),
    "tensor_dynamic": Fp8Format("tensor", "tensor"),
    "channel": Fp8Format("channel", "row"),
    "weight_only": Fp8Format("channel", None),
}
TOLERANCE = {"weight_only": 0.006}  # all others quantize activations too: 0.05
STATIC_SCALE = (6.0 / 448, 16.0 / 448)  # of x and of act, whose largest values are about that
CHECKED_ROWS = 24  # of all input sets' tokens, evenly spread: the reference dequantizes K experts for each
SHAPES = "qwen3-30b,deepseek-v3-tp8,mixtral-8x7b,gpt-oss-120b-dims"


def quantize(w: torch.Tensor, weights: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`[N, K]` → e4m3 and scales; written apart from `moe_core.formats`, in whose words the kernels are tested."""
    if weights == "block":
        blocks = w.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        scale = blocks.abs().amax((1, 3)) / 448
        return (blocks / scale[:, None, :, None]).to(E4M3).view(w.shape), scale
    scale = w.abs().amax(1, keepdim=True) / 448
    if weights == "tensor":
        scale = scale.amax(0, keepdim=True)
    return (w / scale).to(E4M3), scale


def empty_weights(shape: cases.Shape, form: Fp8Format, device: str) -> Fp8Weights:
    """One layer's tensors, not filled but for static scales."""
    experts, hidden, inner = shape.experts, shape.hidden, shape.intermediate
    scales = {
        "block": ((experts, 2, -(-inner // 128), -(-hidden // 128)), (experts, -(-hidden // 128), -(-inner // 128))),
        "tensor": ((experts, 2, 1, 1), (experts, 1, 1)),
        "channel": ((experts, 2 * inner, 1), (experts, hidden, 1)),
    }[form.weights]
    static = form.activations == "static"
    return Fp8Weights(
        torch.empty(experts, 2 * inner, hidden, dtype=E4M3, device=device),
        torch.empty(experts, hidden, inner, dtype=E4M3, device=device),
        torch.empty(scales[0], device=device), torch.empty(scales[1], device=device), form, shape.activation,
        input13=torch.full((experts, 2), STATIC_SCALE[0], device=device) if static else None,
        input2=torch.full((experts, 1), STATIC_SCALE[1], device=device) if static else None,
    )  # fmt: skip


def make_weights(shape: cases.Shape, form: Fp8Format) -> Fp8Weights:
    """Random experts, made one at a time."""
    weights = empty_weights(shape, form, "cuda")
    hidden, inner = shape.hidden, shape.intermediate
    w13, scale13 = weights.w13.unflatten(1, (2, inner)), weights.scale13
    if form.weights == "channel":
        scale13 = scale13.unflatten(1, (2, inner))
    for expert in range(shape.experts):
        for half in range(2):
            w13[expert, half], scale13[expert, half] = quantize(
                torch.randn(inner, hidden, device="cuda") * hidden**-0.5, form.weights
            )
        weights.w2[expert], weights.scale2[expert] = quantize(
            torch.randn(hidden, inner, device="cuda") * inner**-0.5, form.weights
        )
    return weights


def dequantized(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`[…, N, K]` in float32."""
    if scale.shape[-1] > 1:
        scale = scale.repeat_interleave(128, -1)[..., : q.shape[-1]]
    if scale.shape[-2] not in (1, q.shape[-2]):
        scale = scale.repeat_interleave(128, -2)[..., : q.shape[-2], :]
    return q.float() * scale


def reference(shape: cases.Shape, weights: Fp8Weights, inputs: cases.Inputs, tokens: list[int]) -> torch.Tensor:
    """Some tokens in float32 on the dequantized weights, activations as they are."""
    rows, halves = [], 1 if weights.format.weights == "channel" else 2
    for t in tokens:
        e = inputs.ids[t].long()
        w13, s13 = weights.w13[e], weights.scale13[e]
        if halves == 2:
            w13 = dequantized(w13.unflatten(1, (2, -1)), s13).flatten(1, 2)
        else:
            w13 = dequantized(w13, s13)
        rows.append(
            experts_step_torch(
                inputs.x[t : t + 1].float(), torch.arange(shape.top_k, device="cuda")[None], inputs.weights[t : t + 1],
                w13, dequantized(weights.w2[e], weights.scale2[e]), activation=shape.activation,
            )
        )  # fmt: skip
    return torch.cat(rows)


def floor_us(shape: cases.Shape, scheme: str, tokens: int, distinct: float, copy: float, matmul: float) -> float:
    """max(bytes / copy rate, FLOPs / matmul rate)."""
    values = 3 * shape.hidden * shape.intermediate
    expert = values + 4 * values / 128**2 if scheme == "block" else values + 8
    moved = distinct * expert + 4 * tokens * shape.hidden + 8 * tokens * shape.top_k
    return max(moved / copy, 6 * tokens * shape.top_k * shape.hidden * shape.intermediate / matmul) * 1e6


def fp8_matmul_rate() -> float:
    """FLOP per second of an e4m3 matmul with one scale for each operand."""
    a, b = (torch.randn(8192, 8192, device="cuda").to(E4M3) for _ in range(2))
    one = torch.ones((), device="cuda")
    us = cases.event_us(lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16), 12, 4)
    return 2 * 8192**3 / us * 1e6


def checked(
    shape: cases.Shape, weights: Fp8Weights, sets: list[cases.Inputs], outs: list[torch.Tensor]
) -> tuple[float, bool]:
    """(relative error of `CHECKED_ROWS` rows of all sets, every output finite)."""
    rows = min(len(outs[0]), CHECKED_ROWS // len(sets))
    tokens = torch.linspace(0, len(outs[0]) - 1, rows).long().tolist()
    expected = torch.cat([reference(shape, weights, s, tokens) for s in sets])
    finite = all(bool(torch.isfinite(out).all()) for out in outs)
    return cases.relative_error(torch.cat([out[tokens] for out in outs]), expected), finite


def pause(tokens: int) -> float:
    """Seconds before a measurement: only large steps heat the chip up."""
    return 0.5 if tokens > cases.GRAPH_UP_TO else 0.1


def prepared(launcher: Fp8ExpertsLauncher, sets: list[cases.Inputs]) -> list[Callable[[], torch.Tensor]]:
    """One call per input set; workspaces are shared, as they are between the layers of a model."""
    device = sets[0].x.device
    space = {n: torch.empty(s, dtype=d, device=device) for n, (s, d) in launcher.workspace(len(sets[0].x)).items()}
    out = [torch.full_like(s.x, float("nan")) for s in sets]
    return [lambda s=s, o=o: launcher(s.x, s.ids, s.weights, space, o) for s, o in zip(sets, out, strict=True)]


def compile_step(job: tuple[cases.Shape, str, int, int]) -> None:
    """Compiles what one step launches: (shape, scheme, T, compute capability as 90). For a process of its own."""
    shape, scheme, tokens, arch = job
    with compile_only(arch):
        launcher = Fp8ExpertsLauncher(
            empty_weights(shape, SCHEMES[scheme], "meta"), top_k=shape.top_k, dtype=torch.bfloat16
        )
        prepared(launcher, [cases.make_inputs(shape, tokens, 0, "meta")])[0]()


def measure(
    shape: cases.Shape, scheme: str, weights: Fp8Weights, sets: list[cases.Inputs], copy: float, matmul: float
) -> dict[str, Any]:
    """One row of the table."""
    tokens = len(sets[0].x)
    launcher = Fp8ExpertsLauncher(weights, top_k=shape.top_k, dtype=torch.bfloat16)
    calls = prepared(launcher, sets)
    error, finite = checked(shape, weights, sets, [call() for call in calls])
    floor = floor_us(shape, scheme, tokens, cases.distinct_experts(sets), copy, matmul)
    row: dict[str, Any] = {"shape": shape.name, "scheme": scheme, "tokens": tokens, "error": error, "floor_us": floor,
                           "config": str(launcher.config(tokens))}  # fmt: skip
    if finite and error <= TOLERANCE.get(scheme, 0.05):
        row["us"] = cases.step_us(calls, tokens, pause=pause(tokens))
        row["fraction"] = floor / row["us"]
        if tokens == 1:
            row["eager_host_us"] = experts.host_us(calls[0])
    return row


def bf16_us(shape: cases.Shape, weights: cases.Weights, sets: list[cases.Inputs]) -> float:
    """Time of our own experts with 16-bit weights."""
    tokens = len(sets[0].x)
    prepare, _ = experts.our_step(shape, weights)
    return cases.step_us([prepare(s) for s in sets], tokens, pause=pause(tokens))


def compile_all(names: list[str], schemes: list[str], tokens: list[int], bf16: bool) -> None:
    """Compiles in processes beside one another, then nothing waits for a compiler."""
    major, minor = torch.cuda.get_device_capability()
    steps = [(cases.SHAPES[name], t) for name in names for t in tokens]
    cases.compile_ahead(
        compile_step,
        [(shape, scheme, t, 10 * major + minor) for shape, t in steps for scheme in schemes if takes(shape, scheme)],
    )
    if bf16:
        experts.compile_steps(steps)


def takes(shape: cases.Shape, scheme: str) -> bool:
    """This benchmark makes whole blocks only."""
    return scheme != "block" or (shape.hidden % 128 == 0 and shape.intermediate % 128 == 0)


def line(row: dict[str, Any]) -> str:
    head = f"{row['shape']:>18} {row['scheme']:<15} T={row['tokens']:<6}"
    if "us" not in row:
        return f"{head} WRONG: error {row['error']:.4f}"
    host = f", host {row['eager_host_us']:.0f} us" if "eager_host_us" in row else ""
    bf16 = f", {row['bf16_us'] / row['us']:.2f} x bf16" if "bf16_us" in row else ""
    return f"{head} {row['us']:9.1f} us  fraction {row['fraction']:.3f}  error {row['error']:.4f}{bf16}{host}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--tokens", default=",".join(map(str, cases.TOKENS)))
    parser.add_argument("--without-bf16", action="store_true", help="leave our 16-bit experts out")
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    names, schemes = arguments.shapes.split(","), arguments.schemes.split(",")
    tokens = [int(t) for t in arguments.tokens.split(",")]
    compile_all(names, schemes, tokens, not arguments.without_bf16)
    copy, bf16 = cases.ceilings()
    fp8 = fp8_matmul_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {copy / 1e12:.2f} TB/s, "
          f"bf16 matmul {bf16 / 1e12:.0f} TFLOP/s, fp8 matmul {fp8 / 1e12:.0f} TFLOP/s", flush=True)  # fmt: skip
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy": copy,
                              "bf16_matmul": bf16, "fp8_matmul": fp8, "steps": []}  # fmt: skip
    for name in names:
        shape, beside = cases.SHAPES[name], {}
        sets = {t: [cases.make_inputs(shape, t, 100 * t + i, "cuda") for i in range(cases.NUM_INPUT_SETS)]
                for t in tokens}  # fmt: skip
        if not arguments.without_bf16:
            plain = cases.make_weights(shape, "cuda")
            beside = {t: bf16_us(shape, plain, sets[t]) for t in tokens}
            del plain
        for scheme in schemes:
            if not takes(shape, scheme):
                continue
            weights = make_weights(shape, SCHEMES[scheme])
            for t in tokens:
                row = measure(shape, scheme, weights, sets[t], copy, bf16 if scheme == "weight_only" else fp8)
                if t in beside:
                    row["bf16_us"] = beside[t]
                report["steps"].append(row)
                print(line(row), flush=True)
            del weights
            torch.cuda.empty_cache()
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
