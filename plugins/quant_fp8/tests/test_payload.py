"""Behind a dispatch that carries quantized rows, it quantizes them once, and the scheme says how scales lie.

Shape letters: T tokens · H hidden · E experts · C row capacity per expert.
"""

from __future__ import annotations

import pytest
import torch

import moe_core
from moe_core import Duty, MoEConfig, MoEParallelConfig, RouterSpec, Routing, formats
from moe_core.testing import run_on_ranks
from moe_core.types import MODEL_DTYPE_PAYLOAD

E, H, I, T = 4, 256, 128, 7
ROW_WISE = ["fp8_block", "fp8_block_ue8m0", "fp8_channel"]


def layer(scheme, dispatch, **spread):
    config = MoEConfig(
        num_experts=E,
        top_k=2,
        hidden_size=H,
        intermediate_size=I,
        dtype=torch.float32,
        router=RouterSpec.of("softmax", renormalize=True),
        max_tokens_per_rank=T,
    )
    runner = moe_core.build_runner(config, scheme=scheme, dispatch=dispatch, device="cpu", **spread)
    generator = torch.Generator().manual_seed(0)
    for expert in range(E):
        for name, shape in {"gate": (I, H), "up": (I, H), "down": (H, I)}.items():
            runner.routed_experts.load_expert(expert, name, torch.randn(shape, generator=generator) * 0.1)
    runner.routed_experts.pack_weights()
    return runner


@pytest.fixture(autouse=True)
def needs_batched():
    from moe_core.plugins import registry

    if "batched" not in registry().dispatch:
        pytest.skip("moe-batched is not installed")


@pytest.mark.parametrize("scheme", ROW_WISE)
def test_rows_are_quantized_by_the_dispatch_and_only_by_it(scheme):
    packed, plain = layer(scheme, "batched"), layer(scheme, "local")
    assert (packed.plan.payload, plain.plan.payload) == (scheme, MODEL_DTYPE_PAYLOAD)
    assert packed.plan.owners[Duty.INPUT_QUANTIZATION] == "prepare of batched"
    assert plain.plan.owners[Duty.INPUT_QUANTIZATION].startswith("experts fp8_torch")
    x, logits = torch.randn(T, H), torch.randn(T, E)
    torch.testing.assert_close(packed(x, logits), plain(x, logits), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", ROW_WISE)
def test_scales_are_allocated_as_the_scheme_says_and_hold_the_quantizers_bits(scheme):
    runner = layer(scheme, "batched")
    x = torch.randn(T, H)
    x[5] = torch.nan  # nobody's token
    ids = torch.tensor([[0, 1], [1, 1], [3, -1], [1, 2], [0, 3], [-1, -1], [2, 1]])
    dispatched = runner.kernel.dispatch(x, Routing(ids, torch.rand(T, 2))).dispatched
    spec = runner.plan.scheme.activation
    q, scale = formats.quantize(x, spec)
    assert dispatched.x.dtype is formats.storage_dtype(spec)
    assert tuple(dispatched.x_scale.shape) == (E, T, scale.shape[1])
    for expert, count in enumerate(dispatched.tokens_per_expert.tolist()):
        rows = [token for token in range(T) if expert in ids[token].tolist()]
        assert count == len(rows)
        assert dispatched.x[expert, :count].view(torch.uint8).equal(q[rows].view(torch.uint8))
        assert dispatched.x_scale[expert, :count].equal(scale[rows])


@pytest.mark.parametrize("scheme", ["fp8_tensor_dynamic", "fp8_weight_only"])
def test_what_is_not_quantized_row_by_row_travels_as_it_is(scheme):
    assert layer(scheme, "batched").plan.payload == MODEL_DTYPE_PAYLOAD


def test_no_tokens_is_a_step():
    assert tuple(layer("fp8_block", "batched")(torch.randn(0, H), torch.randn(0, E)).shape) == (0, H)


def test_two_ranks_with_tokens_of_their_own_give_what_one_rank_gives():
    single = layer("fp8_block", "batched")
    batches = [(torch.randn(count, H), torch.randn(count, E)) for count in (T, 2)]

    def work(group):
        parallel = MoEParallelConfig.fold(dp_size=2, dp_rank=group.rank, expert_parallel=True)
        return layer("fp8_block", "batched", parallel=parallel, group=group)(*batches[group.rank])

    for got, (x, logits) in zip(run_on_ranks(2, work), batches, strict=True):
        torch.testing.assert_close(got, single(x, logits), atol=1e-5, rtol=1e-5)
