"""The whole experts step in Triton's interpreter, with the library's GEMMs from the labelled stand-in.

bf16 weights; FP8's rounding is a GPU test, because the interpreter's conversion to e4m3 has no carry.
"""

from __future__ import annotations

import os

import attrs
import pytest
import stand_in
import torch

from moe_core.config import ActivationSpec, MoEConfig, MoEParallelConfig
from moe_core.quant import UNQUANTIZED
from moe_core.reference import moe_reference
from moe_core.types import ActivationFormat, Dispatched, ExpertWeights, GateUpLayout

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 in a process of its own"
)

CONFIG = MoEConfig(num_experts=3, top_k=2, hidden_size=128, intermediate_size=128, dtype=torch.bfloat16)
ACTIVATIONS = {
    "silu": ActivationSpec("silu"),
    "gpt-oss": ActivationSpec("swiglu_oai", GateUpLayout.INTERLEAVED, limit=1.0),
    "ungated": ActivationSpec("relu2", None),
}


@pytest.fixture
def make(monkeypatch):
    stand_in.install(monkeypatch)
    from experts_deepgemm.experts import DeepGemmExperts

    return lambda config: DeepGemmExperts(config, MoEParallelConfig(), UNQUANTIZED)


def weights_of(config: MoEConfig) -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    rows = inner * (2 if config.activation.gated else 1)
    w13 = torch.randn(experts, rows, hidden, generator=generator) * hidden**-0.5
    w2 = torch.randn(experts, hidden, inner, generator=generator) * inner**-0.5
    return ExpertWeights(w13.bfloat16(), w2.bfloat16(), config.activation.gate_up_layout)


def run(experts, dispatched: Dispatched, weights: ExpertWeights, out: torch.Tensor) -> torch.Tensor:
    """One step on workspaces full of NaN and of indices that no kernel may follow."""
    batched = dispatched.tokens_per_expert is not None
    shapes = experts.workspace_shapes(out.shape[-2], ActivationFormat.BATCHED if batched else ActivationFormat.STANDARD)
    spaces = {
        name: torch.full(shape, torch.nan if dtype.is_floating_point else -(2**30), dtype=dtype)
        for name, (shape, dtype) in shapes.items()
    }
    experts.apply(dispatched, weights, spaces, out)
    return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_standard(make, tokens, name, transposed) -> None:
    config = attrs.evolve(CONFIG, activation=ACTIVATIONS[name])
    weights = weights_of(config)
    if transposed:
        stored = {key: getattr(weights, key).transpose(1, 2).contiguous().transpose(1, 2) for key in ("w13", "w2")}
        weights = attrs.evolve(weights, **stored)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 128, generator=generator).bfloat16()
    ids = torch.randint(-1, 3, (tokens, 2), generator=generator, dtype=torch.int32)
    router = torch.rand(tokens, 2, generator=generator).masked_fill(ids < 0, torch.nan)
    dispatched = Dispatched(x, None, topk_ids=ids, topk_weights=router)
    out = run(make(config), dispatched, weights, torch.full_like(x, torch.nan))
    expected = moe_reference(x, ids, router.nan_to_num(), weights, config.activation)
    torch.testing.assert_close(out.float(), expected.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("capacity", [5, 128])
def test_batched(make, capacity) -> None:
    weights, counts = weights_of(CONFIG), torch.tensor([5, 0, 2], dtype=torch.int32)
    x = torch.full((3, capacity, 128), torch.nan, dtype=torch.bfloat16)
    for expert, count in enumerate(counts.tolist()):
        x[expert, :count] = torch.randn(count, 128, generator=torch.Generator().manual_seed(expert)).bfloat16()
    out = run(make(CONFIG), Dispatched(x, None, tokens_per_expert=counts), weights, torch.empty_like(x))
    for expert, count in enumerate(counts.tolist()):
        ids = torch.full((count, 1), expert)
        expected = moe_reference(x[expert, :count], ids, torch.ones(count, 1), weights, CONFIG.activation)
        torch.testing.assert_close(out[expert, :count].float(), expected.float(), atol=2e-2, rtol=2e-2)


def test_weights_in_an_order_that_the_library_does_not_read_are_read_anew_in_every_step(make) -> None:
    weights, x = weights_of(CONFIG), torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    apart = {name: torch.cat([getattr(weights, name)] * 2, dim=2)[..., :128] for name in ("w13", "w2")}
    strided = attrs.evolve(weights, **apart)
    ids, router = torch.tensor([[0, 1], [2, -1], [1, 0]], dtype=torch.int32), torch.ones(3, 2)
    experts, dispatched = make(CONFIG), Dispatched(x, None, topk_ids=ids, topk_weights=router)
    for _ in range(2):
        expected = moe_reference(x, ids, router, strided, CONFIG.activation)
        out = run(experts, dispatched, strided, torch.full_like(x, torch.nan))
        torch.testing.assert_close(out.float(), expected.float(), atol=2e-2, rtol=2e-2)
        strided.w13.mul_(0.5)
    counts, rows = torch.tensor([2, 0, 1], dtype=torch.int32), x.expand(3, 3, 128).contiguous()
    out = run(experts, Dispatched(rows, None, tokens_per_expert=counts), attrs.evolve(strided), torch.empty_like(rows))
    ids = torch.zeros(2, 1, dtype=torch.int32)
    expected = moe_reference(x[:2], ids, torch.ones(2, 1), strided, CONFIG.activation)
    torch.testing.assert_close(out[0, :2].float(), expected.float(), atol=2e-2, rtol=2e-2)
