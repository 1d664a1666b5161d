"""Built layers route by one kernel on a GPU: the same experts and weights as the routers in torch operators."""

import pytest
import torch

import moe_core
from moe_core import MoEConfig, RouterSpec
from moe_core.route.kernel_router import KernelRouter

CASES = [
    ("softmax", {"renormalize": True}, 128, 8),
    ("topk_softmax", {}, 32, 4),
    ("sigmoid", {"renormalize": True, "epsilon": 1e-6}, 256, 8),
    ("grouped_sigmoid", {"num_groups": 8, "topk_groups": 4, "renormalize": True}, 256, 8),
    ("llama4", {}, 16, 1),
]


def runner(name, params, experts, top_k, **changes):
    config = MoEConfig(
        num_experts=experts, top_k=top_k, hidden_size=64, intermediate_size=32, dtype=torch.bfloat16,
        router=RouterSpec.of(name, **params), **changes,
    )  # fmt: skip
    built = moe_core.build_runner(config, device="cuda")
    for parameter in built.routed_experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return built


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "params", "experts", "top_k"), CASES, ids=str)
def test_a_built_layer_routes_by_the_kernel(name, params, experts, top_k, dtype):
    router = runner(name, params, experts, top_k)._router
    assert isinstance(router, KernelRouter)
    generator = torch.Generator("cuda").manual_seed(experts)
    bias = torch.randn(experts, generator=generator, device="cuda")
    for tokens in (0, 1, 700):
        logits = torch.randn(tokens, experts, generator=generator, device="cuda").to(dtype)
        # llama4 and topk_softmax choose among logits: rounded ones are equal too often for a bias-free comparison
        for correction in (bias,) if dtype is torch.bfloat16 else (None, bias):
            ours, twin = router.select_experts(logits, correction), router.twin.select_experts(logits, correction)
            ids, order = ours.topk_ids.sort(dim=1)
            expected_ids, expected_order = twin.topk_ids.sort(dim=1)
            same = (ids == expected_ids).all(dim=1)  # a score may round otherwise than torch's and turn a near tie
            assert tokens == 0 or same.float().mean() >= 0.99
            weights, expected = ours.topk_weights.gather(1, order), twin.topk_weights.gather(1, expected_order)
            torch.testing.assert_close(weights[same], expected[same], rtol=2e-6, atol=1e-6)


def test_routing_and_experts_replay_in_one_graph():
    built = runner("grouped_sigmoid", {"num_groups": 8, "topk_groups": 4, "renormalize": True}, 64, 8, cuda_graph=True)
    x = torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(3, 64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        built(x, logits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = built(x, logits)
    for seed in range(5):
        generator = torch.Generator("cuda").manual_seed(seed)
        logits.copy_(torch.randn(3, 64, generator=generator, device="cuda"))
        x.copy_(torch.randn(3, 64, generator=generator, device="cuda"))
        graph.replay()
        torch.testing.assert_close(out, built(x, logits), rtol=0, atol=0)
