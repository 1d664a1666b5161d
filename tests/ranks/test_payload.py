"""Rows that travel in the scheme's own format: quantized once, before the wire, to the bits of `formats`.

Shape letters: T tokens of one rank · H hidden · E experts · W ranks.
"""

from __future__ import annotations

import pytest
import torch

import moe_core
from moe_core import Duty, MoEConfig, MoEParallelConfig, RouterSpec, Routing, formats
from moe_core.plugins import registry
from moe_core.testing import run_on_ranks
from moe_core.types import MODEL_DTYPE_PAYLOAD

E, H, I, K, MOST = 5, 256, 128, 2, 6
SIZES = (4, 0, 6)
ROW_WISE = ["fp8_block", "fp8_block_ue8m0", "fp8_channel"]
FORMS = ["all_gather", "batched", "batched, fixed"]


@pytest.fixture(autouse=True)
def _needs_fp8():
    if "fp8_block" not in registry().quant_methods:
        pytest.skip("moe-quant-fp8 is not installed")


def layer(scheme, form, group=None, **spread):
    config = MoEConfig(
        num_experts=E, top_k=K, hidden_size=H, intermediate_size=I, dtype=torch.float32,
        router=RouterSpec.of("softmax", renormalize=True), max_tokens_per_rank=MOST, debug=True,
    )  # fmt: skip
    if group is not None and not spread:
        spread = {"parallel": MoEParallelConfig.fold(dp_size=group.size, dp_rank=group.rank, expert_parallel=True)}
    dispatch, _, fixed = form.partition(", ")
    runner = moe_core.build_runner(config, scheme=scheme, dispatch=dispatch, device="cpu", group=group, **spread)
    if fixed:
        runner.kernel.prepare_finalize.exact = False
    generator = torch.Generator().manual_seed(0)
    for expert in range(E):
        for name, shape in {"gate": (I, H), "up": (I, H), "down": (H, I)}.items():
            runner.routed_experts.load_expert(expert, name, torch.randn(shape, generator=generator) * 0.1)
    runner.routed_experts.pack_weights()
    return runner


def batch(rank):
    generator = torch.Generator().manual_seed(20 + rank)
    return torch.randn(SIZES[rank], H, generator=generator), torch.randn(SIZES[rank], E, generator=generator)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", ROW_WISE)
def test_several_ranks_give_what_one_gives(scheme, form):
    single = layer(scheme, "local")
    assert single.plan.payload == MODEL_DTYPE_PAYLOAD

    def work(group):
        runner = layer(scheme, form, group)
        assert runner.plan.payload == scheme
        assert runner.plan.owners[Duty.INPUT_QUANTIZATION] == f"prepare of {runner.plan.dispatch.name}"
        return runner(*batch(group.rank))

    for rank, out in enumerate(run_on_ranks(3, work)):
        torch.testing.assert_close(out, single(*batch(rank)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", ROW_WISE)
def test_each_row_is_quantized_once_at_home_and_arrives_bit_by_bit(scheme, form, monkeypatch):
    quantized = []
    original = formats.quantize

    def quantize(x, spec, **options):
        quantized.append(x.shape[0])
        return original(x, spec, **options)

    monkeypatch.setattr(formats, "quantize", quantize)

    def work(group):
        runner = layer(scheme, form, group)
        group.barrier()
        quantized.clear()
        group.barrier()
        x, _ = batch(group.rank)
        everybody = torch.arange(len(x) * K).view(-1, K) % E
        arrived = runner.kernel.dispatch(x, Routing(everybody, torch.ones(len(x), K))).dispatched
        group.barrier()
        assert sorted(quantized) == sorted(SIZES), "by whom they belong to, and never padding"
        group.barrier()
        own = runner.routed_experts.expert_map.local_experts
        for expert in range(len(own)):
            sent = [rows for rows, _ in map(batch, range(3))]
            chosen = [(torch.arange(len(rows) * K).view(-1, K) % E == own[expert]).any(1) for rows in sent]
            spec = runner.plan.scheme.activation
            q, scale = original(torch.cat([r[c] for r, c in zip(sent, chosen, strict=True)]), spec)
            if arrived.tokens_per_expert is None:
                here = (arrived.topk_ids == expert).any(1)
                rows, scales = arrived.x[here], arrived.x_scale[here]
            else:
                count = int(arrived.tokens_per_expert[expert])
                rows, scales = arrived.x[expert, :count], arrived.x_scale[expert, :count]
            assert rows.dtype is formats.storage_dtype(spec)
            assert torch.equal(rows.view(torch.uint8), q.view(torch.uint8))
            assert torch.equal(scales, scale)

    run_on_ranks(3, work)


@pytest.mark.parametrize("scheme", ["fp8_tensor_dynamic", "fp8_weight_only"])
def test_what_is_not_quantized_row_by_row_travels_as_it_is(scheme):
    def work(group):
        return layer(scheme, "all_gather", group).plan.payload

    assert run_on_ranks(2, work) == [MODEL_DTYPE_PAYLOAD] * 2


def test_where_nothing_has_to_move_experts_get_quantized_rows_all_the_same():
    """`all_gather` on ranks that have the same tokens, and on one rank, stays at home."""
    x, logits = batch(2)
    expected = layer("fp8_block", "local")(x, logits)
    alone = layer("fp8_block", "all_gather")
    assert alone.plan.payload == "fp8_block"
    torch.testing.assert_close(alone(x, logits), expected, atol=1e-5, rtol=1e-5)

    def work(group):
        parallel = MoEParallelConfig.fold(tp_size=2, tp_rank=group.rank, expert_parallel=True)
        return layer("fp8_block", "all_gather", group, parallel=parallel)(x, logits)

    for out in run_on_ranks(2, work):
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
