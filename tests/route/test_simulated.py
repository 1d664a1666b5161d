"""The simulated router draws what it says, the same each time, without looking at the logits.

Shape letters: T tokens · E experts · K top-k.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_core.route import SimulatedRouter
from moe_core.types import Routing

DISTRIBUTIONS = ["uniform", "skewed", "one_expert"]


def draw(router: SimulatedRouter, num_tokens: int, num_experts: int) -> Routing:
    return router.select_experts(torch.full((num_tokens, num_experts), float("nan")))


def shares(router: SimulatedRouter, num_experts: int, num_tokens: int = 20_000) -> torch.Tensor:
    """The share of each expert among all choices, `[E]`."""
    ids = draw(router, num_tokens, num_experts).topk_ids
    return torch.bincount(ids.flatten(), minlength=num_experts) / ids.numel()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (7, 7), (8, 2), (256, 8)])
class TestEveryDistribution:
    def test_ids_distinct_and_weights_sum_to_one(self, distribution: str, num_experts: int, top_k: int) -> None:
        routing = draw(SimulatedRouter(top_k, distribution, seed=3), 300, num_experts)
        assert (routing.topk_ids.sort(-1).values.diff(dim=-1) > 0).all()
        assert ((routing.topk_ids >= 0) & (routing.topk_ids < num_experts)).all()
        assert (routing.topk_weights >= 0).all()
        torch.testing.assert_close(routing.topk_weights.sum(-1), torch.ones(300))

    def test_deterministic_and_independent_of_the_number_of_tokens(
        self, distribution: str, num_experts: int, top_k: int
    ) -> None:
        router = SimulatedRouter(top_k, distribution, seed=3)
        torch.manual_seed(0)
        many = draw(router, 300, num_experts)
        torch.manual_seed(1)
        few = draw(SimulatedRouter(top_k, distribution, seed=3), 20, num_experts)
        assert torch.equal(many.topk_ids[:20], few.topk_ids)
        assert torch.equal(many.topk_weights[:20], few.topk_weights)

    def test_leaves_the_global_generator_alone(self, distribution: str, num_experts: int, top_k: int) -> None:
        before = torch.get_rng_state()
        draw(SimulatedRouter(top_k, distribution), 10, num_experts)
        assert torch.equal(torch.get_rng_state(), before)


def test_uniform_is_uniform() -> None:
    # 80,000 choices over 64 experts: one standard deviation is about 2.7% of a share.
    assert (shares(SimulatedRouter(4, "uniform"), 64) * 64 - 1).abs().max() < 0.15


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_skewed_follows_the_power_law(exponent: float) -> None:
    expected = torch.arange(1.0, 17.0) ** -exponent
    torch.testing.assert_close(
        shares(SimulatedRouter(1, "skewed", exponent=exponent), 16), expected / expected.sum(), rtol=0, atol=0.015
    )


@pytest.mark.parametrize(("seed", "expected"), [(0, [0, 1, 2]), (6, [6, 7, 0]), (8, [0, 1, 2])])
def test_one_expert_is_the_first_choice_of_every_row(seed: int, expected: list[int]) -> None:
    ids = draw(SimulatedRouter(3, "one_expert", seed=seed), 5, 8).topk_ids
    assert ids.tolist() == [expected] * 5


@pytest.mark.parametrize("distribution", ["uniform", "skewed"])
def test_seeds_and_rows_differ(distribution: str) -> None:
    one, other = (draw(SimulatedRouter(2, distribution, seed=seed), 200, 64).topk_ids for seed in (0, 1))
    assert (one == other).float().mean() < 0.2
    assert (one[1:] == one[:-1]).float().mean() < 0.2


def test_a_seed_beyond_32_bits_is_taken() -> None:
    assert draw(SimulatedRouter(2, "uniform", seed=2**40 + 5), 4, 8).topk_ids.shape == (4, 2)


def opaque_op(router: SimulatedRouter, name: str) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    @torch.library.custom_op(f"moe_core_test::{name}", mutates_args=())
    def op(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routing = router.select_experts(logits)
        return routing.topk_ids, routing.topk_weights

    @op.register_fake
    def _(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (logits.shape[0], router.top_k)
        return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)

    return op


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_inside_an_opaque_op_under_compile(distribution: str) -> None:
    router = SimulatedRouter(2, distribution, seed=1)
    op = opaque_op(router, f"simulated_{distribution}")
    compiled = torch.compile(lambda logits: op(logits * 2), fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (3, 8):
        ids, weights = compiled(torch.randn(num_tokens, 16))
        expected = draw(router, num_tokens, 16)
        assert torch.equal(ids, expected.topk_ids)
        assert torch.equal(weights, expected.topk_weights)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_no_host_sync_and_graph_capture(distribution: str) -> None:
    router = SimulatedRouter(2, distribution, seed=1)
    logits = torch.randn(33, 16, device="cuda")
    expected = router.select_experts(logits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a host sync during the capture is an error
        captured = router.select_experts(logits)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured.topk_ids, expected.topk_ids)
    assert torch.equal(captured.topk_weights, expected.topk_weights)
