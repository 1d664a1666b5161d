"""Times launch parameters of each experts path, GEMM by GEMM, and prints the best per shape and T.

    python -m benchmarks.tune_experts --shapes qwen3-30b --tokens 1,4 --out tuned.json

Kernels are compiled first by several processes without a GPU context; the sweep then finds them in Triton's cache.
T tokens · H hidden · I intermediate · E experts · K top-k.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import traceback
from collections.abc import Iterator
from dataclasses import astuple, replace
from itertools import product
from typing import Any

import torch

from benchmarks import cases
from moe_core.ops import (
    AlternatingConfig,
    ExpertsLauncher,
    GroupedConfig,
    ScanConfig,
    SlotsConfig,
    TileConfig,
)


def slots_candidates(shape: cases.Shape, tokens: int) -> Iterator[tuple[str, SlotsConfig]]:
    """(which kernel varies, configuration)."""
    base = SlotsConfig(2, 1024, 4, 4, 256, 4, 1)
    if shape.transposed:
        base = SlotsConfig(32, 32, 4, 32, 32, 8, 1)
        for n, k, warps in ((32, 32, 4), (32, 64, 4), (32, 64, 8), (64, 32, 8), (64, 16, 4), (16, 64, 4), (16, 128, 8)):
            yield "up", replace(base, up_n=n, up_k=k, up_warps=warps)
        for n, k, warps, pre in product((16, 32, 64), (16, 32, 64), (4, 8, 16), (1,)):
            if n * k * 4 <= 64 * warps * 32:
                yield "down", replace(base, down_n=n, down_k=k, down_warps=warps, preload=pre)
        return
    for n, k, warps in ((1, 1024, 2), (1, 2048, 4), (2, 512, 2), (2, 1024, 2), (2, 1024, 4), (2, 2048, 4), (4, 512, 2),
                        (4, 512, 4), (4, 256, 4), (4, 1024, 4), (8, 512, 8)):  # fmt: skip
        yield "up", replace(base, up_n=n, up_k=k, up_warps=warps)
    for n, k, warps, pre in product((1, 2, 4, 8), (128, 256, 512), (2, 4, 8), (0, 1, 3)):
        rows = n * shape.top_k
        if rows * k * max(1, pre) >= 2048 and rows * k * max(1, pre) <= 96 * warps * 32 and rows * k >= 8 * warps * 32:
            yield "down", replace(base, down_n=n, down_k=k, down_warps=warps, preload=pre)


def scan_candidates(shape: cases.Shape, tokens: int) -> Iterator[tuple[str, ScanConfig]]:
    rows = tokens * shape.top_k / shape.experts
    if shape.transposed and tokens <= 4:
        slot = ScanConfig(TileConfig(16, 32, 128, 4, 4), TileConfig(16, 64, 128, 4, 3), by_slot=True)
        for n, k, warps, stages in ((32, 64, 4, 5), (32, 128, 4, 4), (16, 128, 4, 5), (32, 128, 8, 4), (16, 256, 4, 3)):
            yield "up", replace(slot, up=TileConfig(16, n, k, warps, stages))
        for n, k, warps, stages in (
            (64, 128, 4, 4),
            (32, 128, 4, 5),
            (64, 128, 4, 5),
            (32, 256, 4, 4),
            (64, 64, 4, 6),
            (128, 64, 4, 5),
        ):
            yield "down", replace(slot, down=TileConfig(16, n, k, warps, stages))
        return
    heights = (16,) if rows < 6 else (16, 32) if rows < 14 else (32,)
    base = ScanConfig(TileConfig(16, 32, 128, 4, 4), TileConfig(16, 64, 128, 4, 3))
    for m in heights:
        for n, k, warps, stages in (
            (32, 256, 4, 3),
            (32, 128, 4, 4),
            (64, 128, 4, 4),
            (32, 128, 4, 5),
            (64, 64, 4, 5),
            (16, 256, 4, 4),
        ):
            yield "up", replace(base, up=TileConfig(m, n, k, warps, stages))
        for n, k, warps, stages in ((32, 256, 4, 3), (64, 128, 4, 4), (64, 256, 4, 2), (64, 256, 4, 3),
                                    (128, 128, 4, 3), (128, 64, 4, 4), (64, 64, 4, 5), (32, 128, 4, 5)):  # fmt: skip
            yield "down", replace(base, down=TileConfig(m, n, k, warps, stages))


def grouped_candidates(shape: cases.Shape, tokens: int) -> Iterator[tuple[str, GroupedConfig]]:
    rows = tokens * shape.top_k / shape.experts
    ups: list[TileConfig] = []
    downs: list[TileConfig] = []
    if rows <= 80:
        for m, small in ((32, 0), (32, 16), (64, 0), (64, 32)):
            if (rows > 40 and m == 32) or (rows < 12 and m == 64):
                continue
            narrow = ((64, 64, 4, 4), (64, 64, 4, 3), (128, 64, 8, 4), (32, 128, 4, 4), (64, 128, 4, 3))
            wide = (
                (128, 64, 4, 4),
                (128, 64, 4, 3),
                (256, 64, 8, 4),
                (64, 128, 4, 4),
                (128, 128, 4, 3),
                (64, 64, 4, 4),
            )
            ups += [TileConfig(m, n, k, w, s, small) for n, k, w, s in narrow]
            downs += [TileConfig(m, n, k, w, s, small) for n, k, w, s in wide]
    if rows >= 24:
        ups += [TileConfig(128, 128, 64, 8, 4, 64, g) for g in (2, 4, 8, 16)]
        ups += [TileConfig(128, 128, 64, 8, 3, 64, 8), TileConfig(128, 64, 64, 4, 3, 64, 8)]
        ups += [TileConfig(128, 128, 128, 8, 2, 64, 8), TileConfig(128, 128, 32, 8, 8, 64, 8)]
        downs += [TileConfig(128, 256, 64, 8, 4, 64, g) for g in (4, 8, 16)]
        downs += [TileConfig(128, 128, 64, 4, 2, 64, 8), TileConfig(128, 64, 64, 4, 3, 64, 8)]
        halves = ((128, 64, 4, 3), (128, 64, 4, 2), (256, 64, 8, 3), (256, 64, 4, 3), (128, 128, 4, 2))
        downs += [TileConfig(64, n, k, warps, stages) for n, k, warps, stages in halves]
        downs += [TileConfig(128, 128, 64, 4, 3, 64, g) for g in (8,)] + [TileConfig(128, 128, 64, 8, 4, 64, 8)]
    if rows >= 24 and shape.intermediate <= 256 and not shape.transposed:
        for sizes in ((128, 2, 2), (256, 1, 2), (64, 2, 4)):
            yield "down", GroupedConfig(TileConfig(128, 64, 64, 8, 3, tma=False), AlternatingConfig(*sizes))
    for up in ups:
        yield "up", GroupedConfig(up, TileConfig(up.block_m, 128, 64, 8, 3, tma=False))
    for down in downs:
        yield (
            "down",
            GroupedConfig(
                TileConfig(max(128, down.block_m) if rows >= 80 else down.block_m, 64, 64, 8, 3, tma=False), down
            ),
        )


CANDIDATES = {"slots": slots_candidates, "scan": scan_candidates, "grouped": grouped_candidates}


def paths_for(shape: cases.Shape, tokens: int) -> tuple[str, ...]:
    slots = tokens * shape.top_k
    paths = []
    if tokens <= 8:
        paths.append("slots")
    if slots <= 512 and (tokens > 1 or shape.transposed):
        paths.append("scan")
    if tokens >= 16:
        paths.append("grouped")
    return tuple(paths)


class OnlyStage:
    """Keeps one of a runner's launches and drops the others, to time it alone."""

    def __init__(self, runner: Any, stage: str):
        gemms = getattr(runner, "_gemms", None)
        self.launches: dict[str, Any] = {}
        if gemms is None:
            self.owner = runner
        else:
            self.owner = gemms
        self.runner, self.stage = runner, stage

    def __enter__(self) -> None:
        owner, other = self.owner, {"up": "_down", "down": "_up"}[self.stage]
        drop = lambda *args: None  # noqa: E731
        self.saved = []
        resident = "_alternating" if self.stage == "up" else ""
        for target, name in ((owner, other), (owner, resident), (self.runner, "_align"), (self.runner, "_reduce")):
            if getattr(target, name, None) is not None:
                self.saved.append((target, name, getattr(target, name)))
                nothing = dict.fromkeys(getattr(target, name), drop) if name == "_align" else drop
                setattr(target, name, nothing)
        if hasattr(owner, "_launches"):  # scan: pairs of launches per size
            keep = 0 if self.stage == "up" else 1
            self.saved.append((owner, "_launches", owner._launches))
            owner._launches = {
                size: tuple(launch if i == keep else drop for i, launch in enumerate(pair))
                for size, pair in owner._launches.items()
            }

    def __exit__(self, *exc: object) -> None:
        for target, name, value in self.saved:
            setattr(target, name, value)


def make_calls(
    launcher: ExpertsLauncher, sets: list[cases.Inputs], outs: list[torch.Tensor]
) -> tuple[list[Any], list[Any]]:
    spaces = []
    for inputs in sets:
        shapes = launcher.workspace(inputs.ids.shape[0])
        space = {}
        for name, (shape, dtype) in shapes.items():
            space[name] = torch.empty(shape, dtype=dtype, device=inputs.x.device)
            if dtype.is_floating_point and inputs.x.device.type != "meta":
                space[name].fill_(float("nan"))
        spaces.append(space)
    calls = [
        lambda i=i, o=o, w=w: launcher(i.x, i.ids, i.weights, w, o)
        for i, o, w in zip(sets, outs, spaces, strict=True)
    ]  # fmt: skip
    return calls, spaces


def launcher_for(shape: cases.Shape, weights: cases.Weights, config: Any) -> ExpertsLauncher:
    return ExpertsLauncher(
        weights.w13, weights.w2, top_k=shape.top_k, activation=shape.activation, bias13=weights.bias13,
        bias2=weights.bias2, plan=((None, config),),
    )  # fmt: skip


def compile_one(job: tuple[str, int, Any]) -> str:
    """Compiles one configuration's kernels for sm_90 without a device; returns an error or nothing."""
    from moe_core.ops._compile import compile_only

    name, tokens, config = job
    shape = cases.SHAPES[name]
    try:
        with compile_only():
            launcher = launcher_for(shape, cases.make_weights(shape, "meta"), config)
            sets = [cases.make_inputs(shape, tokens, 0, "meta")]
            calls, _ = make_calls(launcher, sets, [torch.empty_like(sets[0].x)])
            calls[0]()
    except Exception as error:  # noqa: BLE001  (a configuration that does not compile is a result)
        return f"{name} T={tokens} {config}: {type(error).__name__} {str(error)[:150]}"
    return ""


def precompile(jobs: list[tuple[str, int, Any]], processes: int) -> None:
    start = time.time()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for problem in pool.imap_unordered(compile_one, jobs, chunksize=2):
            if problem:
                print("compile:", problem, flush=True)
    print(f"compiled {len(jobs)} configurations in {time.time() - start:.0f} s", flush=True)


def sweep(
    shape: cases.Shape, weights: cases.Weights, tokens: int, floor: float, results: list[Any], deadline: float
) -> None:
    sets = [
        cases.make_inputs(shape, tokens, 100 * tokens + i, "cuda")
        for i in range(cases.NUM_INPUT_SETS if tokens <= 1024 else 1)
    ]
    outs = [torch.full_like(s.x, float("nan")) for s in sets]
    probe = [0, tokens - 1] if tokens > 1 else [0]
    expected = cases.reference(shape, weights, sets[-1], probe)
    full: list[tuple[float, Any]] = []
    for path in paths_for(shape, tokens):
        best: dict[str, list[tuple[float, Any]]] = {"up": [], "down": []}
        for stage, config in CANDIDATES[path](shape, tokens):
            if time.time() > deadline:
                break
            try:
                launcher = launcher_for(shape, weights, config)
                calls, _ = make_calls(launcher, sets, outs)
                for call in calls:
                    call()
                torch.cuda.synchronize()
                error = cases.relative_error(outs[-1][probe], expected)
                if not error < 0.01:
                    print(f"WRONG {shape.name} T={tokens} {stage} {config} error {error}", flush=True)
                    continue
                with OnlyStage(launcher._runner(config), stage):
                    best[stage].append(
                        (cases.step_us(calls, tokens, 8, pause=0.02), getattr(config, stage, None) or config)
                    )
            except Exception as problem:
                if "CUDA error" in str(problem):
                    raise
                print(
                    f"FAIL {shape.name} T={tokens} {stage} {config}: {type(problem).__name__} {str(problem)[:120]}",
                    flush=True,
                )
        for stage in best:
            best[stage].sort(key=lambda item: item[0])
            for us, config in best[stage][:5]:
                print(f"   {path} {stage} {us:8.1f} us {short(config, stage)}", flush=True)
        if best["up"] and best["down"]:
            full += combine(shape, weights, tokens, path, best, sets, outs, probe, expected)
    full.sort(key=lambda item: item[0])
    for us, config in full[:4]:
        print(f"== {shape.name} T={tokens} {us:8.1f} us fraction {floor / us:.3f} {config}", flush=True)
    if full:
        results.append({"shape": shape.name, "tokens": tokens, "us": full[0][0], "fraction": floor / full[0][0],
                        "config": repr(full[0][1])})  # fmt: skip


def short(config: Any, stage: str) -> str:
    values = [v for v in astuple(config) if not isinstance(v, str)]
    if isinstance(config, SlotsConfig):
        values = values[:3] if stage == "up" else values[3:7]
    return str(values)


def combine(
    shape: cases.Shape,
    weights: cases.Weights,
    tokens: int,
    path: str,
    best: dict[str, list[tuple[float, Any]]],
    sets: Any,
    outs: Any,
    probe: Any,
    expected: Any,
) -> list[tuple[float, Any]]:
    """Whole steps of the best two of each GEMM, with and without programmatic launch."""
    configs = []
    # At few tokens the second kernel starts inside the first: their times alone do not tell the best pair.
    ups, downs = (5, 14) if tokens <= 4 else (2, 3)
    for (_, up), (_, down) in product(best["up"][:ups], best["down"][:downs]):
        if path == "slots":
            merged = replace(
                up, down_n=down.down_n, down_k=down.down_k, down_warps=down.down_warps, preload=down.preload
            )
            configs += [merged]
        elif path == "scan":
            configs += [ScanConfig(up, down, by_slot=shape.transposed and tokens <= 4)]
        elif not hasattr(down, "block_m") or isinstance(down, AlternatingConfig) or up.block_m % down.block_m == 0:
            configs += [GroupedConfig(up, down)]
    if path == "grouped" and not configs:
        for _, up in best["up"][:2]:
            downs = [d for _, d in best["down"] if isinstance(d, TileConfig) and up.block_m % d.block_m == 0][:2]
            configs += [GroupedConfig(up, d) for d in downs]
    configs += [replace(configs[0], pdl=False)] if configs else []
    found = []
    for config in configs:
        launcher = launcher_for(shape, weights, config)
        calls, _ = make_calls(launcher, sets, outs)
        for out in outs:
            out.fill_(float("nan"))
        for call in calls:
            call()
        torch.cuda.synchronize()
        error = cases.relative_error(outs[-1][probe], expected)
        if error < 0.005 and all(bool(torch.isfinite(o).all()) for o in outs):
            found.append((cases.step_us(calls, tokens, 12, pause=0.05), config))
        else:
            print(f"WRONG {shape.name} T={tokens} {config} error {error}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3-30b,deepseek-v3-tp8,gpt-oss-120b-dims,mixtral-8x7b")
    parser.add_argument("--tokens", default=",".join(map(str, cases.TOKENS)))
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--budget", type=float, default=240, help="seconds for the timing")
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    names = arguments.shapes.split(",")
    tokens = [int(t) for t in arguments.tokens.split(",")]
    jobs = [
        (name, t, config)
        for name in names
        for t in tokens
        for path in paths_for(cases.SHAPES[name], t)
        for _, config in CANDIDATES[path](cases.SHAPES[name], t)
    ]
    precompile(list({repr((n, c)): (n, t, c) for n, t, c in jobs}.values()), arguments.processes)
    copy, matmul = cases.ceilings()
    print(f"copy {copy / 1e12:.2f} TB/s, bf16 {matmul / 1e12:.0f} TFLOP/s", flush=True)
    deadline = time.time() + arguments.budget
    results: list[Any] = []
    for name in names:
        shape = cases.SHAPES[name]
        weights = cases.make_weights(shape, "cuda")
        for t in tokens:
            if time.time() > deadline:
                break
            sets = [
                cases.make_inputs(shape, t, 100 * t + i, "cpu") for i in range(cases.NUM_INPUT_SETS if t <= 1024 else 1)
            ]
            floor = cases.floor_us(shape, t, cases.distinct_experts(sets), copy, matmul)
            try:
                sweep(shape, weights, t, floor, results, deadline)
            except Exception:  # noqa: BLE001  (what was measured so far is kept)
                traceback.print_exc()
                return
            print(f"[{time.time() - deadline + arguments.budget:.0f} s] {name} T={t} floor {floor:.1f} us", flush=True)
            if arguments.out:
                with open(arguments.out, "w") as file:
                    json.dump(results, file, indent=1)
        del weights
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
