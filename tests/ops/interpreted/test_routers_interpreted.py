"""Routers as one kernel against the same routers in torch operators, in the interpreter."""

import pytest
import torch

from moe_core.config import MoEConfig, RouterSpec
from moe_core.route import ROUTERS
from moe_core.route.kernel_router import KernelRouter

CASES = [
    ("softmax", {}, 8, 2),
    ("softmax", {"renormalize": True}, 60, 8),
    ("topk_softmax", {}, 32, 4),
    ("sigmoid", {"renormalize": True, "epsilon": 1e-6}, 24, 5),
    ("sigmoid", {}, 9, 9),
    ("grouped_sigmoid", {"num_groups": 8, "topk_groups": 4, "renormalize": True}, 64, 8),
    ("grouped_sigmoid", {}, 16, 3),
    ("llama4", {}, 16, 1),
]


def routers(name, params, experts, top_k):
    spec = RouterSpec.of(name, **params)
    config = MoEConfig(num_experts=experts, top_k=top_k, hidden_size=8, intermediate_size=8, router=spec)
    router = ROUTERS[name](config)
    kernel = router.for_device(torch.device("cuda"), experts)
    assert isinstance(kernel, KernelRouter)
    assert kernel.twin is router
    return kernel, router


def in_order(routing):
    """Choices by rising id: with a bias, the torch routers leave the order within a row open."""
    ids, order = routing.topk_ids.sort(dim=1)
    return ids, routing.topk_weights.gather(1, order)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("name", "params", "experts", "top_k"), CASES, ids=str)
def test_the_same_ids_and_weights(name, params, experts, top_k, with_bias):
    kernel, router = routers(name, params, experts, top_k)
    generator = torch.Generator().manual_seed(experts)
    for tokens in (0, 1, 6):
        logits = torch.randn(experts, tokens, generator=generator).T  # strides that the kernel does not take
        bias = torch.randn(experts, generator=generator) if with_bias else None
        ids, weights = in_order(kernel.select_experts(logits, bias))
        expected_ids, expected = in_order(router.select_experts(logits, bias))
        assert torch.equal(ids, expected_ids)
        assert ids.dtype is torch.int64
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "params", "experts", "top_k"), CASES, ids=str)
def test_ties_give_the_same_weights_and_the_lowest_ids(name, params, experts, top_k):
    kernel, router = routers(name, params, experts, top_k)
    level = torch.zeros(2, experts)
    ours = kernel.select_experts(level)
    assert torch.equal(ours.topk_ids, torch.arange(top_k).expand(2, top_k))
    torch.testing.assert_close(ours.topk_weights, router.select_experts(level).topk_weights, rtol=1e-6, atol=0)
