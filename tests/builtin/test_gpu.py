"""The torch experts on a CUDA device: numbers, no wait for the device, and a captured step.

Shape letters: T tokens · H hidden · I intermediate · E experts · K top-k · C row capacity per expert.
"""

from __future__ import annotations

import itertools

import attrs
import pytest
import torch

from moe_core.builtin import device_experts
from moe_core.reference import expert_rows_reference, moe_reference
from moe_core.types import Dispatched, ExpertWeights
from tests.builtin.conftest import ACTIVATIONS, NAN, ROUTINGS, Layer, assert_near, make_layer, make_routing, make_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(layer: Layer) -> ExpertWeights:
    tensors = {
        name: value.cuda()
        for name in ("w13", "w2", "w13_bias", "w2_bias")
        if (value := getattr(layer.weights, name)) is not None
    }
    return attrs.evolve(layer.weights, **tensors)


def make_step(layer: Layer, kind: str, tokens: int) -> tuple[Dispatched, torch.Tensor]:
    """A step on the GPU, and its truth on the CPU."""
    ids, weights = make_routing(kind, tokens, layer.weights.w13.shape[0], 2)
    x = make_tokens(ids, layer.hidden, layer.dtype)
    expected = moe_reference(x, ids, weights, layer.weights, layer.activation)
    return Dispatched(x.cuda(), None, topk_ids=ids.cuda(), topk_weights=weights.cuda()), expected


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(
    ("dtype", "hidden"), [(torch.bfloat16, 24), (torch.bfloat16, 13), (torch.float16, 24)], ids=str
)
def test_standard(name: str, dtype: torch.dtype, hidden: int) -> None:
    for bias, transposed in itertools.product((False, True), repeat=2):
        layer = make_layer(name, dtype, hidden=hidden, intermediate=16, bias=bias, transposed=transposed)
        weights = on_gpu(layer)
        for kind, tokens in itertools.product(ROUTINGS, (1, 17)):
            d, expected = make_step(layer, kind, tokens)
            out = torch.full_like(d.x, NAN)
            device_experts.apply_standard(layer.activation, False, d, weights, out)
            assert_near(out.cpu(), expected, dtype, (bias, transposed, kind, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_batched(dtype: torch.dtype) -> None:
    for bias, transposed in itertools.product((False, True), repeat=2):
        layer = make_layer("gpt-oss", dtype, bias=bias, transposed=transposed)
        counts = torch.tensor([17, 0, 1, 9], dtype=torch.int32)
        x = torch.full((4, 17, layer.hidden), NAN, dtype=dtype)
        for expert, count in enumerate(counts.tolist()):
            x[expert, :count] = torch.randn(count, layer.hidden)
        expected = expert_rows_reference(x, counts, layer.weights, layer.activation)
        out = torch.full_like(x.cuda(), NAN)
        d = Dispatched(x.cuda(), None, tokens_per_expert=counts.cuda())
        device_experts.apply_batched(layer.activation, False, d, on_gpu(layer), out)
        for expert, count in enumerate(counts.tolist()):
            assert_near(out[expert, :count].cpu(), expected[expert, :count], dtype, (bias, transposed, expert))


def test_a_captured_step_follows_the_routing() -> None:
    """Captured on one routing, replayed on others: no value of the first may be baked in."""
    layer = make_layer("silu", torch.bfloat16, hidden=64, intermediate=32)
    weights = on_gpu(layer)
    d, _ = make_step(layer, "random", 17)
    assert d.topk_ids is not None
    assert d.topk_weights is not None
    d.num_rows = torch.tensor([17], dtype=torch.int32, device="cuda")
    out = torch.full_like(d.x, NAN)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        device_experts.apply_standard(layer.activation, False, d, weights, out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        device_experts.apply_standard(layer.activation, False, d, weights, out)
    for kind in ROUTINGS:
        other, expected = make_step(layer, kind, 17)
        d.x.copy_(other.x)
        d.topk_ids.copy_(other.topk_ids)
        d.topk_weights.copy_(other.topk_weights)
        out.fill_(NAN)
        graph.replay()
        assert_near(out.cpu(), expected, layer.dtype, kind)


def test_nothing_waits_for_the_device() -> None:
    layer = make_layer("silu", torch.bfloat16, hidden=64, intermediate=32)
    weights = on_gpu(layer)
    d, _ = make_step(layer, "dropped", 17)
    out = torch.empty_like(d.x)
    device_experts.apply_standard(layer.activation, False, d, weights, out)
    expected = out.clone()
    torch.cuda.set_sync_debug_mode("error")  # a wait raises
    try:
        device_experts.apply_standard(layer.activation, False, d, weights, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.equal(expected)
