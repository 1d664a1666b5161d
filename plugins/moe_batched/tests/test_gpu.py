"""Batched dispatch on a CUDA device: captured once, replayed on other routings, and never waiting for the device.

Shape letters: T tokens · H hidden · E_l local experts · K top-k · C row capacity per local expert.
"""

from __future__ import annotations

import pytest
import torch

from moe_batched import rows
from moe_batched.owners import Owners
from moe_batched.prepare_finalize import BatchedPrepareAndFinalize
from moe_core import formats
from moe_core.errors import CapacityError
from moe_core.quant import QuantScheme, QuantSpec
from moe_core.types import MODEL_DTYPE_PAYLOAD, ExpertPlacement, Routing
from moe_core.wire import WireRow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def step(backend: BatchedPrepareAndFinalize, x: torch.Tensor, routing: Routing, out: torch.Tensor) -> torch.Tensor:
    """Dispatch and combine with experts that do nothing: `out[t]` = `x[t]` times the sum of its weights."""
    d = backend.prepare(x, routing, num_experts=4, expert_map=None, payload=MODEL_DTYPE_PAYLOAD)
    backend.finalize(d.x, d.handle, routing, out)
    assert d.tokens_per_expert is not None
    return d.tokens_per_expert


def test_a_captured_step_follows_the_routing() -> None:
    backend, x, out = BatchedPrepareAndFinalize(4), torch.randn(9, 8, device="cuda"), torch.empty(9, 8, device="cuda")
    routing = Routing(torch.randint(-1, 4, (9, 2), device="cuda"), torch.rand(9, 2, device="cuda"))
    step(backend, x, routing, out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(backend, x, routing, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts = step(backend, x, routing, out)
    for _ in range(3):
        x.normal_()
        routing.topk_ids.copy_(torch.randint(-1, 4, (9, 2)))
        out.fill_(float("nan"))
        graph.replay()
        weight = routing.topk_weights.masked_fill(routing.topk_ids < 0, 0).sum(dim=1, keepdim=True)
        torch.testing.assert_close(out, x * weight)
        chosen = [sum(e in row for row in routing.topk_ids.tolist()) for e in range(4)]
        assert counts.tolist() == chosen


def test_overflow_is_counted_and_raised_by_check() -> None:
    backend, x = BatchedPrepareAndFinalize(4, capacity=3), torch.randn(5, 8, device="cuda")
    routing = Routing(torch.zeros(5, 1, dtype=torch.int64, device="cuda"), torch.ones(5, 1, device="cuda"))
    out = torch.empty_like(x)
    step(backend, x, routing, out)
    torch.testing.assert_close(out, torch.cat([x[:3], torch.zeros(2, 8, device="cuda")]))
    with pytest.raises(CapacityError, match="2 rows did not fit into capacity = 3"):
        backend.check()
    backend.check()


@pytest.mark.parametrize("group", [(1, 128), (1, -1)])
def test_rows_are_quantized_to_the_bits_of_formats(group: tuple[int, int]) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    scheme = QuantScheme("rows", activation=QuantSpec("float8_e4m3fn", group, dynamic=True))
    assert scheme.activation is not None
    backend = BatchedPrepareAndFinalize(4, scheme=scheme)
    x = torch.randn(9, 384, device="cuda").bfloat16()
    routing = Routing(torch.randint(0, 4, (9, 2), device="cuda"), torch.rand(9, 2, device="cuda"))
    q, scale = formats.quantize(x.cpu(), scheme.activation)
    d = backend.prepare(x, routing, num_experts=4, expert_map=None, payload="rows")
    assert d.x_scale is not None
    assert d.tokens_per_expert is not None
    for expert, count in enumerate(d.tokens_per_expert.tolist()):
        rows = [token for token, ids in enumerate(routing.topk_ids.tolist()) if expert in ids]
        assert torch.equal(d.x[expert, :count].cpu().view(torch.uint8), q[rows].view(torch.uint8))
        assert torch.equal(d.x_scale[expert, :count].cpu(), scale[rows])


@pytest.mark.parametrize("placement", ExpertPlacement)
def test_the_kernels_of_an_exchange_give_the_bits_of_their_twins(placement: ExpertPlacement) -> None:
    """Blocks for three ranks, as if this rank had got them all: no collective, all the rest of a step."""
    owners, most_tokens, capacity = Owners(7, 3, placement), 9, 27
    row = WireRow(1032, torch.bfloat16, 3, None, weighted=False)
    x, ids = torch.randn(8, 1032).bfloat16(), torch.randint(-1, 7, (8, 3))
    routing = Routing(ids, 0.5 ** torch.randint(4, (8, 3)))  # exact products: one rounding on both sides
    results = []
    for device in ("cpu", "cuda"):
        here = Routing(ids.to(device), routing.topk_weights.to(device))
        blocks, home = rows.spread(row, x.to(device), here, owners, most_tokens, 3)
        arrived = row.unpack(blocks)
        place, counts = rows.find_slots(arrived.topk_ids, None, 7, capacity)
        packed, _ = rows.to_slots(arrived.x, None, place, 7 * capacity)
        back = rows.from_slots(packed * 2, place, 3)
        out = torch.empty(8, 1032, dtype=torch.bfloat16, device=device)
        rows.weigh_and_sum(back, home, here.topk_weights, out)
        results.append([each.cpu() for each in (arrived.topk_ids, home, place, counts, out)])
    for (name, found), wanted in zip(enumerate(results[1]), results[0], strict=True):
        assert torch.equal(found, wanted), name
