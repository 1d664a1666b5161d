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
from moe_core.errors import MoEError
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


def test_weights_in_an_order_that_the_library_does_not_read(make) -> None:
    weights = weights_of(CONFIG)
    strided = attrs.evolve(weights, w13=torch.empty(3, 256, 256, dtype=torch.bfloat16)[..., ::2])
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    ids = torch.zeros(1, 2, dtype=torch.int32)
    dispatched = Dispatched(x, None, topk_ids=ids, topk_weights=torch.ones(1, 2))
    with pytest.raises(MoEError, match=r"contiguous ones.*experts='triton'"):
        run(make(CONFIG), dispatched, strided, torch.empty_like(x))
