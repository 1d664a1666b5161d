"""Random shapes, to see cliffs: a case whose fraction is below half of its neighbours' in T is marked.

    python -m benchmarks.sweep [--count 12] [--seed 0]

T tokens · H hidden · I intermediate · E experts · K top-k.
"""

from __future__ import annotations

import argparse
import random

import torch

from benchmarks import cases
from benchmarks.experts import TOLERANCE, checked, compile_steps, our_step

TOKENS = (1, 3, 9, 27, 81, 243, 729, 2187, 6561)
MAX_WEIGHTS = 24 << 30  # bytes


def random_shape(generator: random.Random) -> cases.Shape:
    """E 1 to 512, K 1 to 16, H and I multiples of 8 that no tile divides; half of them transposed."""
    while True:
        experts = 2 ** generator.randint(0, 9)
        hidden = 8 * generator.randint(32, 900)
        intermediate = 8 * generator.randint(16, 700)
        top_k = min(experts, generator.choice((1, 2, 4, 6, 8, 16)))
        if 6 * experts * hidden * intermediate <= MAX_WEIGHTS:
            name = f"E{experts} K{top_k} H{hidden} I{intermediate}"
            return cases.Shape(name, hidden, intermediate, experts, top_k, generator.random() < 0.3)


def fraction(shape: cases.Shape, weights: cases.Weights, tokens: int, copy: float, matmul: float) -> float:
    """Fraction of the roofline, or NaN where the result is wrong."""
    sets = [cases.make_inputs(shape, tokens, i, "cuda") for i in range(4)]
    prepare, _ = our_step(shape, weights)
    calls = [prepare(inputs) for inputs in sets]
    rows = cases.rows_to_check(tokens)
    error, finite = checked(calls, cases.reference(shape, weights, sets[-1], rows), rows)
    if not (finite and error <= TOLERANCE):
        return float("nan")
    floor = cases.floor_us(shape, tokens, cases.distinct_experts(sets), copy, matmul)
    return floor / cases.step_us(calls, tokens, 5, pause=0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    shapes = [random_shape(generator) for _ in range(arguments.count)]
    compile_steps((shape, tokens) for shape in shapes for tokens in TOKENS)
    copy, matmul = cases.ceilings()
    print(f"fraction at T = {', '.join(map(str, TOKENS))}", flush=True)
    for shape in shapes:
        weights = cases.make_weights(shape, "cuda")
        found = [fraction(shape, weights, tokens, copy, matmul) for tokens in TOKENS]
        marks = []
        for i, value in enumerate(found):
            neighbours = found[max(0, i - 1) : i] + found[i + 1 : i + 2]
            # `not >=`: a NaN is marked too.
            marks.append("!" if not value >= min(neighbours) / 2 else "")
        cells = " ".join(f"{value:.2f}{mark}" for value, mark in zip(found, marks, strict=True))
        print(f"{shape.name:<28}{' transposed' if shape.transposed else ' rows':<12}{cells}", flush=True)
        del weights
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
