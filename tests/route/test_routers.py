"""What every registered router promises, and how it refuses bad parameters.

Shape letters: T tokens · E experts · K top-k.
"""

from __future__ import annotations

from typing import Any

import pluggy
import pytest
import torch

from moe_core import hookspecs, route
from moe_core.config import MoEConfig, RouterSpec
from moe_core.interfaces import Router

EXPERTS, TOP_K = 12, 3


def first_experts(router_logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(top_k, device=router_logits.device).expand(router_logits.shape[0], top_k)
    return ids.clone(), torch.full(ids.shape, 0.5, dtype=torch.bfloat16)


EXAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("softmax", {}),
    ("softmax", {"renormalize": True}),
    ("topk_softmax", {}),
    ("sigmoid", {}),
    ("sigmoid", {"renormalize": True, "epsilon": 1e-6}),
    ("grouped_sigmoid", {}),
    ("grouped_sigmoid", {"num_groups": 4, "topk_groups": 2, "renormalize": True}),
    ("llama4", {}),
    ("custom", {"function": first_experts}),
    ("simulated", {}),
    ("simulated", {"distribution": "skewed", "exponent": 1.5, "seed": 7}),
    ("simulated", {"distribution": "one_expert", "seed": 4}),
]
every_router = pytest.mark.parametrize(("name", "params"), EXAMPLES, ids=[f"{n}-{'-'.join(p)}" for n, p in EXAMPLES])


def config(name: str, params: dict[str, Any], num_experts: int = EXPERTS, top_k: int = TOP_K) -> MoEConfig:
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=8,
        intermediate_size=8,
        router=RouterSpec.of(name, **params),
    )


def build(name: str, params: dict[str, Any]) -> Router:
    return route.ROUTERS[name](config(name, params))


def test_examples_cover_every_router() -> None:
    assert {name for name, _ in EXAMPLES} == set(route.ROUTERS)


def test_registers_through_the_hook() -> None:
    manager = pluggy.PluginManager("moe_core")
    manager.add_hookspecs(hookspecs)
    manager.register(route)
    manager.check_pending()
    registered: dict[str, Any] = {}
    manager.hook.moe_core_register_routers(register=registered.__setitem__)
    assert registered == dict(route.ROUTERS)
    assert route.moe_core_api == hookspecs.PLUGIN_API


@every_router
class TestEveryRouter:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("num_tokens", [0, 1, 50])
    def test_shapes_dtypes_and_ids(
        self, name: str, params: dict[str, Any], num_tokens: int, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        routing = build(name, params).select_experts(torch.randn(num_tokens, EXPERTS).to(dtype))
        assert routing.topk_ids.shape == routing.topk_weights.shape == (num_tokens, TOP_K)
        assert routing.topk_ids.dtype == torch.int64
        assert routing.topk_weights.dtype == torch.float32
        in_order = routing.topk_ids.sort(-1).values
        assert ((in_order >= 0) & (in_order < EXPERTS)).all()
        assert (in_order.diff(dim=-1) > 0).all(), "an expert was chosen twice in a row"
        assert torch.isfinite(routing.topk_weights).all()

    def test_inputs_are_read_only_and_outputs_new(self, name: str, params: dict[str, Any]) -> None:
        torch.manual_seed(0)
        logits, bias = torch.randn(9, EXPERTS), None if name in ("custom", "simulated") else torch.randn(EXPERTS)
        before = logits.clone(), None if bias is None else bias.clone()
        routing = build(name, params).select_experts(logits, bias)
        assert torch.equal(logits, before[0])
        if bias is not None:
            assert torch.equal(bias, before[1])
        storages = {tensor.untyped_storage().data_ptr() for tensor in (logits, routing.topk_ids, routing.topk_weights)}
        assert len(storages) == 3

    def test_strides_do_not_matter(self, name: str, params: dict[str, Any]) -> None:
        torch.manual_seed(0)
        wide = torch.randn(EXPERTS, 20).T[::2]
        strided, packed = (build(name, params).select_experts(x) for x in (wide, wide.contiguous()))
        assert torch.equal(strided.topk_ids, packed.topk_ids)
        assert torch.equal(strided.topk_weights, packed.topk_weights)

    def test_computes_in_float32(self, name: str, params: dict[str, Any]) -> None:
        torch.manual_seed(0)
        logits = torch.randn(40, EXPERTS).bfloat16()
        low, exact = (build(name, params).select_experts(x) for x in (logits, logits.float()))
        assert torch.equal(low.topk_ids, exact.topk_ids)
        assert torch.equal(low.topk_weights, exact.topk_weights)

    def test_traces_as_one_graph_with_any_number_of_tokens(self, name: str, params: dict[str, Any]) -> None:
        router = build(name, params)

        def run(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            routing = router.select_experts(logits)
            return routing.topk_ids, routing.topk_weights

        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
        for num_tokens in (5, 11):
            logits = torch.randn(num_tokens, EXPERTS)
            for ours, expected in zip(compiled(logits), run(logits), strict=True):
                assert torch.equal(ours, expected)


@every_router
class TestBadParameters:
    def test_unknown(self, name: str, params: dict[str, Any]) -> None:
        with pytest.raises(
            ValueError, match=f"router '{name}' has no parameter 'renormalise'; legal parameters: "
        ) as e:
            build(name, {**params, "renormalise": True})
        for legal in params:
            assert legal in str(e.value)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("softmax", {"renormalize": 1}, "router 'softmax': renormalize = 1; legal values: True or False"),
        ("topk_softmax", {"renormalize": True}, "no parameter 'renormalize'; legal parameters: none"),
        ("llama4", {"renormalize": True}, "no parameter 'renormalize'; legal parameters: none"),
        ("sigmoid", {"renormalize": "yes"}, "router 'sigmoid': renormalize = 'yes'"),
        ("sigmoid", {"epsilon": -1e-6}, "router 'sigmoid': epsilon = -1e-06; legal values: float >= 0"),
        ("sigmoid", {"epsilon": True}, "router 'sigmoid': epsilon = True"),
        ("grouped_sigmoid", {"num_groups": 0}, "num_groups = 0; legal values: int >= 1"),
        ("grouped_sigmoid", {"num_groups": 2.0}, "num_groups = 2.0; legal values: int >= 1"),
        ("grouped_sigmoid", {"num_groups": 5}, "num_groups = 5; legal values: divisors of num_experts = 12"),
        ("grouped_sigmoid", {"num_groups": 4, "topk_groups": 5}, "topk_groups = 5; legal values: 1 to num_groups = 4"),
        ("grouped_sigmoid", {"num_groups": 4, "topk_groups": 0}, "topk_groups = 0; legal values: int from 1"),
        ("grouped_sigmoid", {"num_groups": 12, "topk_groups": 6}, "num_groups = 12 leaves 1 expert per group"),
        ("grouped_sigmoid", {"num_groups": 6, "topk_groups": 1}, "top_k = 3 is more than the 2 experts of topk_groups"),
        ("custom", {}, "router 'custom' needs the parameter 'function'"),
        ("custom", {"function": "softmax"}, "router 'custom': function = 'softmax'; legal values: a callable"),
        (
            "simulated",
            {"distribution": "zipf"},
            "distribution = 'zipf'; legal values: 'uniform', 'skewed', 'one_expert'",
        ),
        ("simulated", {"seed": -1}, "seed = -1; legal values: int >= 0"),
        ("simulated", {"distribution": "skewed", "exponent": 0}, "exponent = 0; legal values: a number > 0"),
        ("simulated", {"exponent": 2.0}, "exponent = 2.0 with distribution 'uniform'"),
    ],
)
def test_bad_values(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as e:
        build(name, params)
    assert message in str(e.value)
    assert f"router {name!r}" in str(e.value)


def test_forgotten_topk_groups_keep_every_group() -> None:
    logits, bias = torch.randn(30, EXPERTS), torch.randn(EXPERTS)
    limited, free = (build("grouped_sigmoid", p).select_experts(logits, bias) for p in ({"num_groups": 4}, {}))
    assert torch.equal(limited.topk_ids, free.topk_ids)
    assert torch.equal(limited.topk_weights, free.topk_weights)


def test_grouped_sigmoid_without_bias_is_that_with_a_zero_bias() -> None:
    router = build("grouped_sigmoid", {"num_groups": 4, "topk_groups": 2, "renormalize": True})
    logits = torch.randn(30, EXPERTS)
    without, zero = router.select_experts(logits), router.select_experts(logits, torch.zeros(EXPERTS))
    assert torch.equal(without.topk_ids, zero.topk_ids)
    assert torch.equal(without.topk_weights, zero.topk_weights)


def test_all_scores_zero_gives_weights_of_zero_and_not_nan() -> None:
    router = build("grouped_sigmoid", {"renormalize": True})
    weights = router.select_experts(torch.full((2, EXPERTS), -1e4)).topk_weights
    assert torch.equal(weights, torch.zeros(2, TOP_K))


def test_llama4_chooses_by_logits_where_sigmoids_are_all_one() -> None:
    logits = torch.arange(EXPERTS, dtype=torch.float32).add(100.0).unsqueeze(0)
    assert build("llama4", {}).select_experts(logits).topk_ids.tolist() == [[11, 10, 9]]


class TestCustom:
    def run(self, function: Any, bias: torch.Tensor | None = None) -> Any:
        return build("custom", {"function": function}).select_experts(torch.randn(4, EXPERTS), bias)

    def test_takes_int32_ids_and_converts_weights(self) -> None:
        routing = self.run(lambda logits, k: (first_experts(logits, k)[0].int(), first_experts(logits, k)[1]))
        assert routing.topk_ids.dtype == torch.int32
        assert routing.topk_weights.dtype == torch.float32
        assert routing.topk_weights.eq(0.5).all()

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda logits, k: logits.topk(k).indices, "returned Tensor; it must return a pair"),
            (lambda logits, k: None, "returned NoneType; it must return a pair"),
            (
                lambda logits, k: logits.topk(k + 1)[::-1],
                r"returned ids of shape \(4, 4\); it must be \[T, K\] = \[4, 3\]",
            ),
            (lambda logits, k: logits.topk(k), "returned ids in torch.float32; legal: torch.int32, torch.int64"),
            (lambda logits, k: logits.topk(k).indices.expand(2, 4, k), "returned weights in torch.int64"),
        ],
    )
    def test_wrong_answers(self, function: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.run(function)

    def test_refuses_a_bias_that_it_would_lose(self) -> None:
        with pytest.raises(ValueError, match=r"correction bias of shape \(12,\).* let the function hold the bias"):
            self.run(first_experts, torch.zeros(EXPERTS))


@every_router
def test_where_there_is_no_gpu_a_router_stands_for_itself(name: str, params: dict[str, Any]) -> None:
    router = build(name, params)
    assert router.for_device(torch.device("cpu"), EXPERTS) is router
    assert router.for_device(torch.device("cuda"), 1 << 20) is router, "more experts than the kernel takes"
