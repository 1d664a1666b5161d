"""Each router chooses and weights exactly as the transformers model that uses it, from the same logits.

Shape letters: T tokens · H hidden · E experts · K top-k.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from moe_core.config import MoEConfig, RouterSpec
from moe_core.interfaces import Router
from moe_core.route import ROUTERS
from moe_core.types import Routing

pytest.importorskip("transformers", reason="the comparison is with transformers' own routers")

HIDDEN = 24
SHAPES = [(0, 8, 2), (1, 7, 3), (33, 7, 1), (64, 9, 9), (257, 64, 8)]  # T, E, K
SEEDS = [0, 1, 2]


def build(name: str, num_experts: int, top_k: int, **params: Any) -> Router:
    config = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=HIDDEN,
        intermediate_size=8,
        router=RouterSpec.of(name, **params),
    )
    return ROUTERS[name](config)


def theirs(architecture: str, router_class: str, config_class: str, **settings: Any) -> torch.nn.Module:
    """A router of transformers with random parameters, and buffers (correction biases) too."""
    package = f"transformers.models.{architecture}"
    modeling = pytest.importorskip(f"{package}.modeling_{architecture}", reason="newer than this transformers")
    config = getattr(importlib.import_module(f"{package}.configuration_{architecture}"), config_class)
    router: torch.nn.Module = getattr(modeling, router_class)(config(hidden_size=HIDDEN, **settings))
    for tensor in [*router.parameters(), *router.buffers()]:
        tensor.data.normal_(std=0.5)
    return router


def tokens(num_tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(num_tokens, HIDDEN).to(dtype)


def assert_equal(ours: Routing, ids: torch.Tensor, weights: torch.Tensor) -> None:
    assert torch.equal(ours.topk_ids, ids)
    assert torch.equal(ours.topk_weights, weights)


def assert_equal_up_to_order(ours: Routing, ids: torch.Tensor, weights: torch.Tensor) -> None:
    """The model sorts its choices and we do not, so the sum of K that both divide by is added up in another order.

    Two orders of adding K positive numbers differ by at most 2 (K - 1) rounding errors of 2^-24 each.
    """
    mine, other = ours.topk_ids.sort(-1), ids.sort(-1)
    assert torch.equal(mine.values, other.values)
    torch.testing.assert_close(
        ours.topk_weights.gather(-1, mine.indices),
        weights.gather(-1, other.indices),
        rtol=ids.shape[-1] * 2**-23,
        atol=0,
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), SHAPES)
class TestSoftmax:
    def test_mixtral_renormalizes(self, num_tokens: int, num_experts: int, top_k: int, seed: int) -> None:
        torch.manual_seed(seed)
        model = theirs(
            "mixtral", "MixtralTopKRouter", "MixtralConfig", num_local_experts=num_experts, num_experts_per_tok=top_k
        )
        logits, weights, ids = model(tokens(num_tokens))
        assert_equal(build("softmax", num_experts, top_k, renormalize=True).select_experts(logits), ids, weights)

    @pytest.mark.parametrize("renormalize", [False, True])
    def test_qwen3_moe(self, num_tokens: int, num_experts: int, top_k: int, seed: int, renormalize: bool) -> None:
        torch.manual_seed(seed)
        model = theirs(
            "qwen3_moe",
            "Qwen3MoeTopKRouter",
            "Qwen3MoeConfig",
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            norm_topk_prob=renormalize,
        )
        logits, weights, ids = model(tokens(num_tokens))
        router = build("softmax", num_experts, top_k, renormalize=renormalize)
        assert_equal(router.select_experts(logits), ids, weights)

    def test_longcat_chooses_with_a_bias(self, num_tokens: int, num_experts: int, top_k: int, seed: int) -> None:
        torch.manual_seed(seed)
        model = theirs(
            "longcat_flash",
            "LongcatFlashTopkRouter",
            "LongcatFlashConfig",
            n_routed_experts=num_experts,
            moe_topk=top_k,
            zero_expert_num=0,
            routed_scaling_factor=1.0,
        )
        answer = model(tokens(num_tokens))
        if len(answer) != 3:
            pytest.skip("the router of this transformers returns no logits")
        logits, weights, ids = answer
        ours = build("softmax", num_experts, top_k).select_experts(logits, model.e_score_correction_bias)
        assert_equal(ours, ids, weights)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), SHAPES)
class TestTopKFirst:
    def test_gpt_oss(self, num_tokens: int, num_experts: int, top_k: int, seed: int) -> None:
        torch.manual_seed(seed)
        model = theirs(
            "gpt_oss", "GptOssTopKRouter", "GptOssConfig", num_local_experts=num_experts, num_experts_per_tok=top_k
        )
        logits, weights, ids = model(tokens(num_tokens))
        assert_equal(build("topk_softmax", num_experts, top_k).select_experts(logits), ids, weights)

    def test_llama4(self, num_tokens: int, num_experts: int, top_k: int, seed: int) -> None:
        torch.manual_seed(seed)
        model = theirs(
            "llama4", "Llama4Router", "Llama4TextConfig", num_local_experts=num_experts, num_experts_per_tok=top_k
        )
        scores, logits = model(tokens(num_tokens))  # scores [T, E], 0 where not chosen
        ours = build("llama4", num_experts, top_k).select_experts(logits)
        assert torch.equal(torch.zeros_like(scores).scatter(1, ours.topk_ids, ours.topk_weights), scores)

    def test_kolibri_chooses_logits_with_a_bias(self, num_tokens: int, num_experts: int, top_k: int, seed: int) -> None:
        torch.manual_seed(seed)
        model = theirs(
            "kolibri1",
            "Kolibri1TopKRouter",
            "Kolibri1Config",
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            norm_topk_prob=False,
        )
        logits, weights, ids = model(tokens(num_tokens))
        ours = build("llama4", num_experts, top_k).select_experts(logits, model.e_score_correction_bias)
        assert_equal_up_to_order(ours, ids, weights)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), SHAPES)
class TestSigmoid:
    @pytest.mark.parametrize("renormalize", [False, True])
    def test_flint(self, num_tokens: int, num_experts: int, top_k: int, seed: int, renormalize: bool) -> None:
        torch.manual_seed(seed)
        model = theirs(
            "flint",
            "FlintTopKRouter",
            "FlintConfig",
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            norm_topk_prob=renormalize,
        )
        logits, weights, ids = model(tokens(num_tokens))
        router = build("sigmoid", num_experts, top_k, renormalize=renormalize)
        assert_equal(router.select_experts(logits), ids, weights)

    def test_minimax_m2_chooses_with_a_bias(self, num_tokens: int, num_experts: int, top_k: int, seed: int) -> None:
        torch.manual_seed(seed)
        model = theirs(
            "minimax_m2",
            "MiniMaxM2TopKRouter",
            "MiniMaxM2Config",
            num_local_experts=num_experts,
            num_experts_per_tok=top_k,
        )
        bias = torch.randn(num_experts)
        logits, weights, ids = model(tokens(num_tokens), bias)
        ours = build("sigmoid", num_experts, top_k, renormalize=True).select_experts(logits, bias)
        assert_equal(ours, ids, weights)

    @pytest.mark.parametrize("biased", [False, True])
    def test_lfm2_has_an_epsilon(self, num_tokens: int, num_experts: int, top_k: int, seed: int, biased: bool) -> None:
        torch.manual_seed(seed)
        model = theirs(
            "lfm2_moe",
            "Lfm2MoeTopKRouter",
            "Lfm2MoeConfig",
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            norm_topk_prob=True,
            use_expert_bias=biased,
            routed_scaling_factor=1.0,
        )
        bias = torch.randn(num_experts) if biased else None
        logits, weights, ids = model(tokens(num_tokens), bias)
        ours = build("sigmoid", num_experts, top_k, renormalize=True, epsilon=1e-6).select_experts(logits, bias)
        assert_equal_up_to_order(ours, ids, weights)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "num_groups", "topk_groups", "top_k"),
    [(16, 4, 2, 4), (15, 3, 2, 5), (7, 1, 1, 3), (64, 8, 4, 8), (16, 8, 1, 2), (12, 3, 3, 7)],
)
class TestGroupedSigmoid:
    """The routed scaling factor is multiplied into these models' weights; ours are without it (design rule 14)."""

    FACTOR = 2.5

    def settings(self, num_groups: int, topk_groups: int, top_k: int, renormalize: bool) -> dict[str, Any]:
        return {
            "n_group": num_groups,
            "topk_group": topk_groups,
            "num_experts_per_tok": top_k,
            "norm_topk_prob": renormalize,
            "routed_scaling_factor": self.FACTOR,
        }

    @pytest.mark.parametrize("num_tokens", [0, 1, 130])
    @pytest.mark.parametrize(
        ("architecture", "stem"), [("deepseek_v3", "DeepseekV3"), ("glm4_moe", "Glm4Moe"), ("nemotron_h", "NemotronH")]
    )
    def test_equals_the_model(
        self,
        architecture: str,
        stem: str,
        num_tokens: int,
        num_experts: int,
        num_groups: int,
        topk_groups: int,
        top_k: int,
        renormalize: bool,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        settings = self.settings(num_groups, topk_groups, top_k, renormalize)
        model = theirs(architecture, f"{stem}TopkRouter", f"{stem}Config", n_routed_experts=num_experts, **settings)
        logits, weights, ids = model(tokens(num_tokens))
        router = build(
            "grouped_sigmoid",
            num_experts,
            top_k,
            num_groups=num_groups,
            topk_groups=topk_groups,
            renormalize=renormalize,
        )
        ours = router.select_experts(logits, model.e_score_correction_bias)
        assert_equal(Routing(ours.topk_ids, ours.topk_weights * self.FACTOR), ids, weights)


class TestBfloat16:
    """A bfloat16 model rounds its weights to bfloat16; ours stay float32, and are those before the rounding."""

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize(
        ("architecture", "router_class", "config_class", "experts_key", "name", "params"),
        [
            ("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig", "num_experts", "softmax", {"renormalize": True}),
            ("gpt_oss", "GptOssTopKRouter", "GptOssConfig", "num_local_experts", "topk_softmax", {}),
        ],
    )
    def test_equal_after_rounding(
        self,
        architecture: str,
        router_class: str,
        config_class: str,
        experts_key: str,
        name: str,
        params: dict[str, Any],
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        settings: dict[str, Any] = {experts_key: 33, "num_experts_per_tok": 4}
        if architecture == "qwen3_moe":
            settings["norm_topk_prob"] = True
        model = theirs(architecture, router_class, config_class, **settings).to(torch.bfloat16)
        logits, weights, ids = model(tokens(200, torch.bfloat16))
        ours = build(name, 33, 4, **params).select_experts(logits)
        assert logits.dtype == weights.dtype == torch.bfloat16
        assert_equal(Routing(ours.topk_ids, ours.topk_weights.to(torch.bfloat16)), ids, weights)
