"""Batched dispatch against the reference. Padding rows, outputs and rows of nobody are NaN.

Shape letters: T tokens · H hidden · E experts, global · E_l local experts · K top-k · C row capacity per expert.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from moe_batched import rows as moves
from moe_batched.prepare_finalize import BatchedPrepareAndFinalize
from moe_core.config import ActivationSpec
from moe_core.errors import CapacityError, MoEError
from moe_core.expert_map import ExpertMapManager
from moe_core.reference import expert_rows_reference, moe_reference
from moe_core.types import MODEL_DTYPE_PAYLOAD, Dispatched, ExpertPlacement, ExpertWeights, GateUpLayout, Routing

NAN = float("nan")
E, K, H, I = 4, 2, 13, 7
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
KINDS = ("random", "duplicates", "dropped", "one expert", "nobody")


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory of the plugin is NaN."""
    torch.manual_seed(0)
    allocate = moves.allocate
    monkeypatch.setattr(moves, "allocate", lambda count, like: allocate(count, like).fill_(NAN))


def make_step(kind: str, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Routing]:
    ids = torch.rand(tokens, E).argsort(dim=1)[:, :K]
    if kind == "duplicates":
        ids = torch.randint(E, (tokens, 1)).expand(tokens, K).clone()
    elif kind == "dropped":
        ids = torch.where(torch.rand(tokens, K) < 0.4, -1, ids)
        ids[::3] = -1
    elif kind == "one expert":
        ids = torch.tensor([E - 1, -1]).repeat(tokens, 1)
    elif kind == "nobody":
        ids = torch.full((tokens, K), -1)
    weights = (torch.rand(tokens, K) + 0.1).masked_fill(ids < 0, NAN)
    x = torch.randn(tokens, H + 3).to(dtype)[:, :H]
    x[(ids < 0).all(dim=1)] = NAN
    return x, Routing(ids, weights)


def make_weights(dtype: torch.dtype = torch.float32) -> ExpertWeights:
    return ExpertWeights(torch.randn(E, 2 * I, H).to(dtype), torch.randn(E, H, I).to(dtype), GateUpLayout.GATE_UP)


def prepare(backend: BatchedPrepareAndFinalize, x: torch.Tensor, routing: Routing, **options: Any) -> Dispatched:
    arguments: dict[str, Any] = {"num_experts": E, "expert_map": None, "payload": MODEL_DTYPE_PAYLOAD}
    return backend.prepare(x, routing, **(arguments | options))


def run(d: Dispatched, weights: ExpertWeights) -> torch.Tensor:
    """The experts, by the reference, in the dtype of `x`; rows past the count NaN."""
    assert d.tokens_per_expert is not None
    rows = expert_rows_reference(d.x, d.tokens_per_expert, weights, ActivationSpec()).to(d.x.dtype)
    for expert, count in enumerate(d.tokens_per_expert.tolist()):
        rows[expert, count:] = NAN
    return rows


def finalize(backend: BatchedPrepareAndFinalize, y: torch.Tensor, d: Dispatched, x: torch.Tensor, r: Routing) -> Any:
    out = torch.full(x.shape, NAN, dtype=x.dtype)
    backend.finalize(y, d.handle, r, out)
    return out


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    if actual.numel():
        error = (actual.double() - expected.double()).abs().max()
        assert error <= TOLERANCE[dtype] * expected.double().abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
def test_there_and_back(dtype: torch.dtype, id_dtype: torch.dtype) -> None:
    weights, backend = make_weights(dtype), BatchedPrepareAndFinalize(E)
    for kind, tokens in itertools.product(KINDS, (0, 1, 3, 17)):
        x, routing = make_step(kind, tokens, dtype)
        routing = Routing(routing.topk_ids.to(id_dtype), routing.topk_weights)
        d = prepare(backend, x, routing)
        assert d.x.shape == (E, tokens, H)
        out = finalize(backend, run(d, weights), d, x, routing)
        expected = moe_reference(
            x, routing.topk_ids, routing.topk_weights, weights, ActivationSpec(), compute_dtype=torch.float64
        )
        assert_near(out, expected, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_packed_in_ascending_order_of_tokens(kind: str) -> None:
    x, routing = make_step(kind, 17)
    d = prepare(BatchedPrepareAndFinalize(E), x, routing)
    assert d.tokens_per_expert is not None
    assert d.tokens_per_expert.dtype == torch.int32
    assert d.tokens_per_expert.shape == (E,)
    for expert, count in enumerate(d.tokens_per_expert.tolist()):
        tokens = [t for t, row in enumerate(routing.topk_ids.tolist()) if expert in row]
        assert count == len(tokens)
        assert torch.equal(d.x[expert, :count], x[tokens])
        assert d.x[expert, count:].isnan().all(), "rows past the count are not worth a write"


@pytest.mark.parametrize("placement", ExpertPlacement)
def test_ranks_with_replicated_tokens_add_up(placement: ExpertPlacement) -> None:
    weights = make_weights()
    for kind, size in itertools.product(KINDS, (2, 3)):
        x, routing = make_step(kind, 9)
        total = torch.zeros(9, H)
        for rank in range(size):
            manager = ExpertMapManager(E, size, rank, placement)
            own = list(manager.local_experts)
            backend = BatchedPrepareAndFinalize(len(own))
            d = prepare(backend, x, routing, expert_map=manager.expert_map("cpu"))
            share = ExpertWeights(weights.w13[own], weights.w2[own], weights.gate_up_layout)
            total += finalize(backend, run(d, share), d, x, routing)
        expected = moe_reference(x, routing.topk_ids, routing.topk_weights, weights, ActivationSpec())
        assert_near(total, expected, torch.float32)


def test_inputs_are_not_written() -> None:
    x, routing = make_step("dropped", 9, torch.bfloat16)
    seen = [(t, t._version, t.clone().nan_to_num()) for t in (x, routing.topk_ids, routing.topk_weights)]
    backend = BatchedPrepareAndFinalize(E)
    d = prepare(backend, x, routing, expert_map=torch.arange(E, dtype=torch.int32))
    y = run(d, make_weights(torch.bfloat16))
    seen.append((y, y._version, y.clone().nan_to_num()))
    finalize(backend, y, d, x, routing)
    for tensor, version, copy in seen:
        assert tensor._version == version
        assert torch.equal(tensor.nan_to_num(), copy)


def test_two_steps_in_flight() -> None:
    weights, backend = make_weights(), BatchedPrepareAndFinalize(E)
    steps = [make_step("random", 5), make_step("duplicates", 8)]
    flights = [prepare(backend, *step) for step in steps]
    results = [run(d, weights) for d in flights]
    for i in (1, 0):  # not in the order in which they began
        x, routing = steps[i]
        out = finalize(backend, results[i], flights[i], x, routing)
        assert_near(out, moe_reference(x, routing.topk_ids, routing.topk_weights, weights, ActivationSpec()), x.dtype)


def test_a_handle_is_consumed_exactly_once() -> None:
    backend, (x, routing) = BatchedPrepareAndFinalize(E), make_step("random", 3)
    d = prepare(backend, x, routing)
    finalize(backend, d.x, d, x, routing)
    with pytest.raises(MoEError, match=r"batched: finalize got one that was consumed; .* exactly once"):
        finalize(backend, d.x, d, x, routing)
    released = prepare(backend, x, routing)
    backend.release(released.handle)
    with pytest.raises(MoEError, match="consumed"):
        finalize(backend, released.x, released, x, routing)
    with pytest.raises(MoEError, match="finalize got 'mine'"):
        backend.finalize(d.x, "mine", routing, torch.empty(3, H))


def test_max_tokens_fixes_the_capacity() -> None:
    backend, weights = BatchedPrepareAndFinalize(E, max_tokens=8), make_weights()
    for tokens in (0, 3, 8):
        x, routing = make_step("random", tokens)
        d = prepare(backend, x, routing)
        assert d.x.shape == (E, 8, H)
        out = finalize(backend, run(d, weights), d, x, routing)
        assert_near(out, moe_reference(x, routing.topk_ids, routing.topk_weights, weights, ActivationSpec()), x.dtype)
    with pytest.raises(CapacityError, match="T = 9 tokens, but max_tokens_per_rank = 8"):
        prepare(backend, *make_step("random", 9))


def test_overflow_names_expert_rows_and_capacity() -> None:
    backend = BatchedPrepareAndFinalize(E, capacity=4)
    prepare(backend, *make_step("one expert", 4))
    with pytest.raises(CapacityError, match=f"local expert {E - 1} got 5 rows, capacity = 4; raise the capacity"):
        prepare(backend, *make_step("one expert", 5))
    backend.check()


def test_overflow_where_values_are_not_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, taken here: rows past the capacity are dropped and counted, the others are right."""

    def count(self: BatchedPrepareAndFinalize, counts: torch.Tensor, capacity: int) -> None:
        self._count_overflow(counts, capacity)

    monkeypatch.setattr(BatchedPrepareAndFinalize, "_note_overflow", count)
    backend, weights = BatchedPrepareAndFinalize(E, capacity=4), make_weights()
    x, routing = make_step("one expert", 7)
    d = prepare(backend, x, routing)
    assert d.tokens_per_expert is not None
    assert d.tokens_per_expert.tolist() == [0, 0, 0, 4]
    out = finalize(backend, run(d, weights), d, x, routing)
    expected = moe_reference(x, routing.topk_ids, routing.topk_weights, weights, ActivationSpec())
    expected[4:] = 0
    assert_near(out, expected, x.dtype)
    prepare(backend, x, routing)
    assert backend.status is not None
    assert backend.status.tolist() == [6]
    with pytest.raises(CapacityError, match="6 rows did not fit into capacity = 4"):
        backend.check()
    backend.check()


@pytest.mark.parametrize("option", ["capacity", "max_tokens"])
def test_a_capacity_of_nothing_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} = 0; legal values: None, or int >= 1"):
        BatchedPrepareAndFinalize(E, **{option: 0})


def test_another_payload_is_refused() -> None:
    with pytest.raises(MoEError, match=r"payload = 'nvfp4' .* it carries 'model dtype'"):
        prepare(BatchedPrepareAndFinalize(E), *make_step("random", 3), payload="nvfp4")


def test_duplicates_take_one_slot() -> None:
    x, routing = make_step("duplicates", 6)
    d = prepare(BatchedPrepareAndFinalize(E), x, routing)
    assert d.tokens_per_expert is not None
    assert int(d.tokens_per_expert.sum()) == 6
