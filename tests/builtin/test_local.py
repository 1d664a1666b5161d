"""Dispatch `local`, alone and in a kernel.

Shape letters: T tokens · H hidden · E experts · K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_core.build import plan
from moe_core.builtin.local import LocalPrepareAndFinalize, local_ids
from moe_core.config import MODEL_DTYPES, MoEConfig, MoEParallelConfig
from moe_core.errors import MoEError, UnsupportedError
from moe_core.expert_map import ExpertMapManager
from moe_core.kernel import MoEKernel
from moe_core.reference import moe_reference
from moe_core.types import MODEL_DTYPE_PAYLOAD, Dispatched, ExpertPlacement, ExpertWeights, Routing
from tests.builtin.conftest import ROUTINGS, assert_near, make_layer, make_routing, make_tokens


class CountLaunches(TorchDispatchMode):
    """Counts every torch operator that runs."""

    launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += 1
        return func(*args, **(kwargs or {}))


def prepare(backend: LocalPrepareAndFinalize, x: torch.Tensor, routing: Routing, **options: Any) -> Dispatched:
    arguments: dict[str, Any] = {"num_experts": 4, "expert_map": None, "payload": MODEL_DTYPE_PAYLOAD}
    return backend.prepare(x, routing, **(arguments | options))


def make_step(tokens: int = 5) -> tuple[torch.Tensor, Routing]:
    ids, weights = make_routing("dropped", tokens, 4, 2)
    return make_tokens(ids, 8, torch.float32), Routing(ids, weights)


def test_without_an_expert_map_nothing_is_launched() -> None:
    backend, (x, routing), out = LocalPrepareAndFinalize(), make_step(), torch.empty(5, 8)
    with CountLaunches() as count:
        d = prepare(backend, x, routing)
        expert_out = backend.expert_output(d, out)
        assert expert_out is out
        backend.finalize(expert_out, d.handle, routing, out)
    assert count.launches == 0
    assert d.x is x
    assert d.topk_ids is routing.topk_ids
    assert d.topk_weights is routing.topk_weights
    assert d.num_rows is None
    assert d.tokens_per_expert is None
    assert d.x_scale is None


@pytest.mark.parametrize("placement", ExpertPlacement)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_become_local(placement: ExpertPlacement, dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, 6], [-1, 3], [-1, -1]], dtype=dtype)
    for rank in range(3):
        manager = ExpertMapManager(7, 3, rank, placement)
        table = manager.expert_map("cpu")
        assert table is not None
        own = list(manager.local_experts)
        expected = [[own.index(i) if i in own else -1 for i in row] for row in ids.tolist()]
        assert local_ids(ids, table).tolist() == expected


def test_a_result_elsewhere_is_copied() -> None:
    backend, (x, routing), out = LocalPrepareAndFinalize(), make_step(), torch.full((5, 8), float("nan"))
    elsewhere = torch.randn(5, 8)
    backend.finalize(elsewhere, prepare(backend, x, routing).handle, routing, out)
    assert torch.equal(out, elsewhere)


def test_rows_get_unit_stride(unchanged: Callable[..., Callable[[], None]]) -> None:
    _, routing = make_step()
    x = torch.randn(8, 5).t()
    check = unchanged(x, routing.topk_ids, routing.topk_weights)
    d = prepare(LocalPrepareAndFinalize(), x, routing, expert_map=torch.tensor([0, -1, 1, -1], dtype=torch.int32))
    assert d.x.stride(1) == 1
    assert torch.equal(d.x, x)
    check()


def test_a_handle_is_consumed_exactly_once() -> None:
    backend, (x, routing), out = LocalPrepareAndFinalize(), make_step(), torch.empty(5, 8)
    first, second = prepare(backend, x, routing), prepare(backend, x, routing)
    backend.finalize(out, second.handle, routing, out)
    backend.finalize(out, first.handle, routing, out)
    with pytest.raises(MoEError, match=r"local: finalize got handle = .*consumed=True.*exactly once"):
        backend.finalize(out, first.handle, routing, out)
    with pytest.raises(MoEError, match="finalize got handle = 'mine'"):
        backend.finalize(out, "mine", routing, out)


def test_another_payload_is_refused() -> None:
    x, routing = make_step()
    with pytest.raises(MoEError, match=r"payload = 'fp8' .* it carries 'model dtype', and the scheme's own"):
        prepare(LocalPrepareAndFinalize(), x, routing, payload="fp8")


@pytest.mark.parametrize("placement", ExpertPlacement)
def test_ranks_with_replicated_tokens_add_up(placement: ExpertPlacement) -> None:
    """The sum over ranks is the runner's; here it is taken by hand. 5 experts on 2 ranks: unequal shares."""
    for dtype in MODEL_DTYPES:
        layer = make_layer("gpt-oss", dtype, experts=5, bias=True)
        config = MoEConfig(
            num_experts=5, top_k=2, hidden_size=13, intermediate_size=7, dtype=dtype, activation=layer.activation,
            placement=placement, debug=True,
        )  # fmt: skip
        for kind in ROUTINGS:
            ids, weights = make_routing(kind, 9, 5, 2)
            x = make_tokens(ids, 13, dtype)
            total = torch.zeros(9, 13, dtype=torch.float64)
            for rank in range(2):
                parallel = MoEParallelConfig(ep_size=2, ep_rank=rank)
                kernel = MoEKernel(plan(config, parallel=parallel, dispatch="local", experts="torch", device="cpu"))
                total += kernel(x, Routing(ids, weights), share(layer.weights, rank, placement))[0].double()
            expected = moe_reference(x, ids, weights, layer.weights, layer.activation, compute_dtype=torch.float64)
            assert_near(total, expected, dtype, (dtype, kind))


def share(weights: ExpertWeights, rank: int, placement: ExpertPlacement) -> ExpertWeights:
    own = list(ExpertMapManager(5, 2, rank, placement).local_experts)
    names = ("w13", "w2", "w13_bias", "w2_bias")
    return attrs.evolve(weights, **{name: getattr(weights, name)[own] for name in names})


def test_tokens_of_each_ranks_own_are_refused() -> None:
    config = MoEConfig(num_experts=4, top_k=2, hidden_size=16, intermediate_size=8)
    parallel = MoEParallelConfig.fold(dp_size=2, expert_parallel=True)
    with pytest.raises(UnsupportedError, match="carries no tokens between ranks"):
        plan(config, parallel=parallel, dispatch="local", experts="torch", device="cpu")
