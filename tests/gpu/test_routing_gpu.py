"""The routing kernel on a GPU against its twin."""

import pytest
import torch

from moe_core.ops import RouteSpec, topk_route, topk_route_torch

SPECS = [
    (RouteSpec(2), 8),
    (RouteSpec(8, renormalize=True), 128),
    (RouteSpec(4, "softmax_of_topk"), 128),
    (RouteSpec(1, "sigmoid_of_topk"), 16),
    (RouteSpec(16, "sigmoid"), 512),
    (RouteSpec(8, "sigmoid", True, 1e-20, 8, 4), 256),
    (RouteSpec(6, "softmax"), 1000),
    (RouteSpec(3, "sigmoid", True, 1e-20, 3, 2), 24),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("spec", "experts"), SPECS, ids=str)
def test_ids_and_weights(spec, experts, with_bias, dtype):
    generator = torch.Generator("cuda").manual_seed(experts)
    for tokens in (1, 7, 700):
        logits = torch.randn(tokens, experts, generator=generator, device="cuda").to(dtype)
        bias = torch.randn(experts, generator=generator, device="cuda") if with_bias else None
        ids, weights = topk_route(logits, spec, bias)
        expected_ids, expected = topk_route_torch(logits, spec, bias)
        # A softmax or sigmoid may round otherwise than torch's: where ids differ, their choices must be nearly equal.
        same = (ids == expected_ids).all(dim=1)
        assert same.float().mean() >= 0.99
        torch.testing.assert_close(weights.sort().values, expected.sort().values, rtol=2e-6, atol=1e-6)
