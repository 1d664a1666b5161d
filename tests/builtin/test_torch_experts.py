"""The torch experts against the reference in fp64: the product of everything that they declare.

Shape letters: T tokens · H hidden · I intermediate · E experts · K top-k · C row capacity per expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import attrs
import pytest
import torch

from moe_core.builtin import device_experts, torch_experts
from moe_core.builtin.torch_experts import TorchExperts
from moe_core.config import MODEL_DTYPES, MoEConfig, MoEParallelConfig
from moe_core.reference import expert_rows_reference, moe_reference
from moe_core.types import ActivationFormat, Dispatched, ExpertWeights
from tests.builtin.conftest import (
    ACTIVATIONS,
    NAN,
    ROUTINGS,
    Layer,
    assert_near,
    make_layer,
    make_routing,
    make_tokens,
    poisoned,
    run_experts,
)

STANDARD, BATCHED = ActivationFormat.STANDARD, ActivationFormat.BATCHED


def make_experts(layer: Layer, topk: int, **config: object) -> TorchExperts:
    return TorchExperts(
        MoEConfig(
            num_experts=layer.weights.w13.shape[0],
            top_k=topk,
            hidden_size=layer.hidden,
            intermediate_size=layer.intermediate,
            dtype=layer.dtype,
            activation=layer.activation,
            **config,  # type: ignore[arg-type]
        ),
        MoEParallelConfig(),
    )


def truth(layer: Layer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, **options: bool) -> torch.Tensor:
    return moe_reference(x, ids, weights, layer.weights, layer.activation, compute_dtype=torch.float64, **options)


def standard(layer: Layer, kind: str, tokens: int, topk: int) -> Dispatched:
    ids, weights = make_routing(kind, tokens, layer.weights.w13.shape[0], topk)
    return Dispatched(make_tokens(ids, layer.hidden, layer.dtype), None, topk_ids=ids, topk_weights=weights)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", MODEL_DTYPES, ids=str)
def test_standard_format(dtype: torch.dtype, name: str) -> None:
    for bias, transposed in itertools.product((False, True), repeat=2):
        layer = make_layer(name, dtype, bias=bias, transposed=transposed)
        experts = make_experts(layer, topk=2)
        for kind, tokens in itertools.product(ROUTINGS, (0, 1, 3, 17)):
            d = standard(layer, kind, tokens, topk=2)
            out = run_experts(experts, d, layer.weights, STANDARD)
            expected = truth(layer, d.x, d.topk_ids, d.topk_weights)
            assert_near(out, expected, dtype, (bias, transposed, kind, tokens))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", MODEL_DTYPES, ids=str)
def test_batched_format(dtype: torch.dtype, name: str) -> None:
    for bias, transposed in itertools.product((False, True), repeat=2):
        layer = make_layer(name, dtype, bias=bias, transposed=transposed)
        experts = make_experts(layer, topk=2)
        for counts in ([0, 0, 0, 0], [1, 0, 3, 2], [17, 17, 17, 17], [0, 17, 0, 0]):
            x = batched_rows(counts, layer)
            d = Dispatched(x, None, tokens_per_expert=torch.tensor(counts, dtype=torch.int32))
            assert d.tokens_per_expert is not None
            out = run_experts(experts, d, layer.weights, BATCHED)
            expected = expert_rows_reference(
                x, d.tokens_per_expert, layer.weights, layer.activation, compute_dtype=torch.float64
            )
            for expert, count in enumerate(counts):
                assert_near(out[expert, :count], expected[expert, :count], dtype, (bias, transposed, counts, expert))


def batched_rows(counts: list[int], layer: Layer, capacity: int = 17) -> torch.Tensor:
    x = torch.full((len(counts), capacity, layer.hidden + 1), NAN, dtype=layer.dtype)
    for expert, count in enumerate(counts):
        x[expert, :count] = torch.randn(count, layer.hidden + 1).to(layer.dtype)
    return x[..., : layer.hidden]  # as a dispatch that pads H delivers it


@pytest.mark.parametrize(("experts", "topk"), [(1, 1), (5, 5), (3, 1)])
def test_one_expert_and_all_experts(experts: int, topk: int) -> None:
    for dtype, kind in itertools.product(MODEL_DTYPES, ROUTINGS):
        layer = make_layer("silu", dtype, experts=experts)
        d = standard(layer, kind, 7, topk)
        out = run_experts(make_experts(layer, topk), d, layer.weights, STANDARD)
        assert_near(out, truth(layer, d.x, d.topk_ids, d.topk_weights), dtype, kind)


@pytest.mark.parametrize("dtype", MODEL_DTYPES, ids=str)
def test_router_weight_on_the_input(dtype: torch.dtype) -> None:
    for kind, bias in itertools.product(ROUTINGS, (False, True)):
        layer = make_layer("silu", dtype, bias=bias)
        d = standard(layer, kind, 9, topk=3)
        experts = make_experts(layer, topk=3, router_weight_on_input=True)
        expected = truth(layer, d.x, d.topk_ids, d.topk_weights, router_weight_on_input=True)
        assert_near(run_experts(experts, d, layer.weights, STANDARD), expected, dtype, (kind, bias))
        actual = torch.full_like(d.x, NAN)
        device_experts.apply_standard(layer.activation, True, d, layer.weights, actual)
        assert_near(actual, expected, dtype, (kind, bias, "device"))


def test_rows_past_num_rows_hold_anything() -> None:
    for dtype, valid in itertools.product(MODEL_DTYPES, (0, 1, 6, 11)):
        layer = make_layer("silu", dtype)
        d = standard(layer, "random", 11, topk=2)
        expected = truth(layer, d.x, d.topk_ids, d.topk_weights)
        expected[valid:] = 0
        d.x[valid:], d.topk_ids[valid:], d.topk_weights[valid:] = NAN, 2, NAN
        d = attrs.evolve(d, num_rows=torch.tensor([valid], dtype=torch.int32))
        assert_near(run_experts(make_experts(layer, 2), d, layer.weights, STANDARD), expected, dtype, valid)
        actual = torch.full_like(d.x, NAN)
        device_experts.apply_standard(layer.activation, False, d, layer.weights, actual)
        assert_near(actual, expected, dtype, (valid, "device"))


@pytest.mark.parametrize("block", [1, 3, 8])
def test_blocks_of_rows(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More choices than a block holds: experts are cut at its border, in both formats."""
    monkeypatch.setattr(torch_experts, "MAX_BLOCK_ROWS", block)
    layer = make_layer("gpt-oss", torch.bfloat16, bias=True)
    experts = make_experts(layer, topk=2)
    for kind in ROUTINGS:
        d = standard(layer, kind, 17, topk=2)
        out = run_experts(experts, d, layer.weights, STANDARD)
        assert_near(out, truth(layer, d.x, d.topk_ids, d.topk_weights), layer.dtype, kind)
    x, counts = batched_rows([17, 0, 1, 9], layer), torch.tensor([17, 0, 1, 9], dtype=torch.int32)
    out = run_experts(experts, Dispatched(x, None, tokens_per_expert=counts), layer.weights, BATCHED)
    expected = expert_rows_reference(x, counts, layer.weights, layer.activation)
    for expert, count in enumerate(counts.tolist()):
        assert_near(out[expert, :count], expected[expert, :count], layer.dtype, expert)


def test_many_rows_and_realistic_sizes() -> None:
    """Enough rows of an expert for every way of multiplying, and for index_add_ with a long index."""
    for dtype, transposed in itertools.product(MODEL_DTYPES, (False, True)):
        layer = make_layer("silu", dtype, experts=6, hidden=64, intermediate=32, transposed=transposed)
        for tokens in (2, 5, 40, 300):
            d = standard(layer, "dropped", tokens, topk=3)
            out = run_experts(make_experts(layer, 3), d, layer.weights, STANDARD)
            assert_near(out, truth(layer, d.x, d.topk_ids, d.topk_weights), dtype, (transposed, tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("native", [False, True])
def test_16_bit_with_and_without_instructions_for_it(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_experts, "native_dtypes", lambda: frozenset({torch.float32, dtype} if native else ()))
    for transposed, bias in itertools.product((False, True), repeat=2):
        layer = make_layer("silu", dtype, transposed=transposed, bias=bias)
        d = standard(layer, "dropped", 9, topk=2)
        out = run_experts(make_experts(layer, 2), d, layer.weights, STANDARD)
        assert_near(out, truth(layer, d.x, d.topk_ids, d.topk_weights), dtype, (transposed, bias))


def test_inputs_are_not_written(unchanged: Callable[..., Callable[[], None]]) -> None:
    for dtype, on_input in itertools.product(MODEL_DTYPES, (False, True)):
        layer = make_layer("gpt-oss", dtype, bias=True)
        d = standard(layer, "dropped", 9, topk=2)
        w = layer.weights
        check = unchanged(d.x, d.topk_ids, d.topk_weights, w.w13, w.w2, w.w13_bias, w.w2_bias)
        run_experts(make_experts(layer, 2, router_weight_on_input=on_input), d, w, STANDARD)
        counts = torch.tensor([3, 0, 1, 17], dtype=torch.int32)
        d = Dispatched(batched_rows([17] * 4, layer), None, tokens_per_expert=counts)
        check_batched = unchanged(d.x, counts)
        run_experts(make_experts(layer, 2), d, w, BATCHED)
        check()
        check_batched()


def test_weights_of_a_foreign_module_may_require_a_gradient() -> None:
    layer = make_layer("silu", torch.float32)
    w13, w2 = layer.weights.w13.requires_grad_(), layer.weights.w2.requires_grad_()
    weights = ExpertWeights(w13, w2, layer.weights.gate_up_layout)
    d = standard(layer, "random", 3, topk=2)
    assert not run_experts(make_experts(layer, 2), d, weights, STANDARD).requires_grad


def test_the_layout_that_is_read_is_that_of_the_weights() -> None:
    """Packing may have changed it: the activation's own is what the model came with."""
    layer = make_layer("silu, up first, clamped", torch.float32)
    half = layer.intermediate
    swapped = torch.cat([layer.weights.w13[:, half:], layer.weights.w13[:, :half]], dim=1)
    weights = attrs.evolve(layer.weights, w13=swapped, gate_up_layout=ACTIVATIONS["silu"].gate_up_layout)
    d = standard(layer, "random", 5, topk=2)
    out = run_experts(make_experts(layer, 2), d, weights, STANDARD)
    assert_near(out, truth(layer, d.x, d.topk_ids, d.topk_weights), layer.dtype, "swapped")


def test_out_may_be_a_view_with_other_strides() -> None:
    for dtype in MODEL_DTYPES:
        layer = make_layer("silu", dtype)
        d = standard(layer, "dropped", 9, topk=2)
        experts = make_experts(layer, 2)
        padded = torch.full((9, layer.hidden + 5), NAN, dtype=dtype)
        out = padded[:, : layer.hidden]
        experts.apply(d, layer.weights, poisoned(experts.workspace_shapes(9, STANDARD)), out)
        assert_near(out, truth(layer, d.x, d.topk_ids, d.topk_weights), dtype, "padded")
        assert padded[:, layer.hidden :].isnan().all()


def test_workspaces_are_bounded_by_the_block() -> None:
    layer = make_layer("silu", torch.bfloat16)
    experts = make_experts(layer, topk=2)
    small, large = (experts.workspace_shapes(rows, STANDARD) for rows in (10**4, 10**6))
    assert {n: s for n, s in small.items() if n != "sum"} == {n: s for n, s in large.items() if n != "sum"}
    assert large["sum"] == ((10**6, layer.hidden), torch.float32)
    assert all(0 in shape for shape, _ in experts.workspace_shapes(0, STANDARD).values())
    assert "sum" not in experts.workspace_shapes(8, BATCHED)


@pytest.mark.parametrize("grouped", [False, True])
def test_device_path_standard(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, run here: the loop, and grouped_mm, which torch has for the CPU too."""
    monkeypatch.setattr(device_experts, "grouped_mm_takes", lambda x, w: grouped)
    for name, transposed, bias in itertools.product(ACTIVATIONS, (False, True), (False, True)):
        layer = make_layer(name, torch.bfloat16, hidden=24, intermediate=16, transposed=transposed, bias=bias)
        for kind, tokens in itertools.product(ROUTINGS, (1, 9)):
            d = standard(layer, kind, tokens, topk=2)
            actual = torch.full_like(d.x, NAN)
            device_experts.apply_standard(layer.activation, False, d, layer.weights, actual)
            expected = truth(layer, d.x, d.topk_ids, d.topk_weights)
            assert_near(actual, expected, layer.dtype, (name, transposed, bias, kind, tokens))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_device_path_batched(name: str) -> None:
    for dtype, transposed, bias in itertools.product((torch.float32, torch.bfloat16), (False, True), (False, True)):
        layer = make_layer(name, dtype, transposed=transposed, bias=bias)
        x, counts = batched_rows([17, 0, 1, 9], layer), torch.tensor([17, 0, 1, 9], dtype=torch.int32)
        actual = torch.full(x.shape, NAN, dtype=dtype)
        d = Dispatched(x, None, tokens_per_expert=counts)
        device_experts.apply_batched(layer.activation, False, d, layer.weights, actual)
        expected = expert_rows_reference(x, counts, layer.weights, layer.activation)
        for expert, count in enumerate(counts.tolist()):
            assert_near(actual[expert, :count], expected[expert, :count], dtype, (transposed, bias, expert))
