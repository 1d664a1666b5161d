"""The routing kernel against its twin, in the interpreter; rounded logits give ties."""

import pytest
import torch

from moe_core.ops import RouteSpec, topk_route, topk_route_torch

SPECS = [
    (RouteSpec(2), 8),
    (RouteSpec(8, renormalize=True), 60),
    (RouteSpec(4, "softmax_of_topk"), 32),
    (RouteSpec(1, "sigmoid_of_topk"), 16),
    (RouteSpec(16, "sigmoid"), 16),
    (RouteSpec(8, "sigmoid", True, 1e-20, 8, 4), 64),
    (RouteSpec(3, "sigmoid", True, 1e-20, 3, 2), 24),
]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("spec", "experts"), SPECS, ids=str)
def test_ids_and_weights(spec, experts, with_bias):
    generator = torch.Generator().manual_seed(experts)
    logits = torch.randn(5, experts + 3, generator=generator).round(decimals=1)[:, :experts]
    bias = torch.randn(experts, generator=generator) if with_bias else None
    ids, weights = topk_route(logits, spec, bias, ids_dtype=torch.int32)
    expected_ids, expected = topk_route_torch(logits, spec, bias)
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_logits_still_give_ids_of_experts():
    ids, _ = topk_route(torch.full((2, 6), float("nan")), RouteSpec(3))
    assert ids.min() >= 0
    assert ids.max() < 6


def test_no_tokens():
    ids, weights = topk_route(torch.empty(0, 8), RouteSpec(2))
    assert ids.shape == weights.shape == (0, 2)


@pytest.mark.parametrize("bias", [torch.zeros(7), torch.zeros(16)[::2], torch.zeros(1, 8)])
def test_a_bias_of_another_shape_is_refused(bias):
    with pytest.raises(ValueError, match=r"a contiguous \[8\] is needed"):
        topk_route(torch.zeros(2, 8), RouteSpec(2), bias)
