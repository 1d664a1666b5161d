"""The twins against arithmetic written out by hand, and the checks of the public arguments. No GPU, no Triton."""

import math
import subprocess
import sys

import pytest
import torch

from moe_core.ops import (
    Activation,
    ExpertsLauncher,
    RouteSpec,
    activate_torch,
    experts_batched_torch,
    experts_step_torch,
    topk_route_torch,
)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("activation", "h", "expected"),
    [
        (Activation(), [1.0, -2.0, 3.0, 4.0], [sigmoid(1) * 3, -2 * sigmoid(-2) * 4]),
        (Activation(gate_up_layout="up_gate"), [3.0, 4.0, 1.0, -2.0], [sigmoid(1) * 3, -2 * sigmoid(-2) * 4]),
        (Activation(gate_up_layout="interleaved"), [1.0, 3.0, -2.0, 4.0], [sigmoid(1) * 3, -2 * sigmoid(-2) * 4]),
        (Activation(limit=2.0), [5.0, -5.0, 3.0, -3.0], [2 * sigmoid(2) * 2, -5 * sigmoid(-5) * -2]),
        (Activation("swiglu_oai", limit=7.0), [9.0, 1.0], [7 * sigmoid(1.702 * 7) * 2]),
        (Activation("relu2", None), [3.0, -3.0], [9.0, 0.0]),
        (Activation("gelu"), [1.0, 2.0], [0.8413447460685429 * 2]),
    ],
    ids=str,
)
def test_activation(activation, h, expected):
    torch.testing.assert_close(activate_torch(torch.tensor(h), activation), torch.tensor(expected))


def test_experts_step_adds_duplicates_and_skips_minus_one():
    w13, w2 = torch.randn(3, 8, 6), torch.randn(3, 6, 4)
    x, weights = torch.randn(2, 6), torch.tensor([[0.5, 0.25], [float("nan"), 2.0]])
    out = experts_step_torch(x, torch.tensor([[1, 1], [-1, 2]]), weights, w13, w2, activation=Activation())

    def expert(t, e):
        return w2[e] @ activate_torch(w13[e] @ x[t], Activation())

    torch.testing.assert_close(out, torch.stack([0.75 * expert(0, 1), 2 * expert(1, 2)]))


def test_batched_twin_leaves_rows_past_the_count_zero():
    w13, w2 = torch.randn(2, 8, 6), torch.randn(2, 6, 4)
    x = torch.randn(2, 3, 6)
    out = experts_batched_torch(x, torch.tensor([2, 0]), w13, w2, activation=Activation())
    torch.testing.assert_close(out[0, 1], w2[0] @ activate_torch(w13[0] @ x[0, 1], Activation()))
    assert not out[0, 2].any()
    assert not out[1].any()


def test_grouped_route_keeps_to_the_best_groups():
    logits = torch.tensor([[9.0, -9.0, 1.0, 1.0]])  # group 0 is worth less: σ(9) + σ(-9) < 2 σ(1)
    ids, weights = topk_route_torch(logits, RouteSpec(2, "sigmoid", True, 1e-20, 2, 1))
    assert ids.tolist() == [[2, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Activation("relu2"), "function = 'relu2'"),
        (lambda: Activation(gate_up_layout="down"), "gate_up_layout = 'down'"),
        (lambda: Activation("silu", None, limit=1.0), "limit = 1.0"),
        (lambda: RouteSpec(1, "relu"), "scoring = 'relu'"),
        (lambda: RouteSpec(1, num_groups=2, topk_groups=3), "topk_groups = 3"),
        (lambda: RouteSpec(9).check(8), "top_k = 9"),
        (lambda: RouteSpec(1, num_groups=3).check(8), "num_groups = 3"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def launcher(w13, w2):
    return ExpertsLauncher(w13, w2, top_k=1, activation=Activation())


@pytest.mark.parametrize(
    ("w13", "w2", "message"),
    [
        (torch.empty(2, 8, 6), torch.empty(2, 6, 5), r"w13 \(2, 8, 6\) and w2 \(2, 6, 5\)"),
        (torch.empty(2, 8, 6, dtype=torch.float64), torch.empty(2, 6, 4, dtype=torch.float64), "float64"),
        (torch.empty(2, 16, 12)[:, ::2, ::2], torch.empty(2, 6, 4), "must have stride 1"),
        (torch.empty(8, 6), torch.empty(2, 6, 4), "3 dims are expected"),
    ],
)
def test_weights_that_do_not_fit_are_refused(w13, w2, message):
    with pytest.raises(ValueError, match=message):
        launcher(w13, w2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.empty(3, 7)}, "x is"),
        ({"ids": torch.zeros(3, 2, dtype=torch.int32)}, "topk_ids is"),
        ({"ids": torch.zeros(3, 1)}, "topk_ids is"),
        ({"weights": torch.zeros(3, 1, dtype=torch.float64)}, "topk_weights is"),
        ({"out": torch.empty(3, 6, dtype=torch.float16)}, "out is"),
    ],
)
def test_step_arguments_that_do_not_fit_are_refused(change, message):
    step = launcher(torch.randn(2, 8, 6), torch.randn(2, 6, 4))
    given = {
        "x": torch.empty(3, 6), "ids": torch.zeros(3, 1, dtype=torch.int32), "weights": torch.zeros(3, 1),
        "out": torch.empty(3, 6),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        step(given["x"], given["ids"], given["weights"], {}, given["out"])


def test_import_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import moe_core.ops\n"
        "assert not any(name.startswith('moe_core.ops._kernels') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
