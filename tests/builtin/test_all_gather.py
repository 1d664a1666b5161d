"""All-gather / reduce-scatter on virtual ranks: what travels, the bits of the sum, and what is refused.

Shape letters: T tokens · H hidden · E experts · K top-k · R received rows · W ranks · M the largest T.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_core import CapacityError, MoEConfig, MoEError, MoEParallelConfig, Routing, UnsupportedError, plan
from moe_core.builtin import ALL_GATHER
from moe_core.builtin.all_gather import AllGatherPrepareAndFinalize
from moe_core.builtin.local import LocalPrepareAndFinalize
from moe_core.config import Problem
from moe_core.expert_map import ExpertMapManager
from moe_core.kernel import MoEKernel
from moe_core.testing import run_on_ranks
from moe_core.types import MODEL_DTYPE_PAYLOAD, Device, ExpertPlacement

E, H, K, M = 5, 13, 3, 6
SIZES = (4, 0, 6)
CONFIG: dict[str, Any] = {"num_experts": 6, "top_k": 2, "hidden_size": 16, "intermediate_size": 8}
OWN_TOKENS = MoEParallelConfig.fold(dp_size=2, expert_parallel=True)


def step(rank: int, dtype: torch.dtype, tokens: int | None = None) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(rank)
    tokens = SIZES[rank] if tokens is None else tokens
    x = torch.randn(tokens, H + 2, generator=generator).to(dtype)[:, :H]
    ids = torch.randint(-1, E, (tokens, K), generator=generator)
    return x, Routing(ids, torch.rand(tokens, K, generator=generator))


def prepare(backend: Any, x: torch.Tensor, routing: Routing, **options: Any) -> Any:
    arguments: dict[str, Any] = {"num_experts": E, "expert_map": None, "payload": MODEL_DTYPE_PAYLOAD}
    return backend.prepare(x, routing, **(arguments | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bound", [None, M])
@pytest.mark.parametrize("placement", ExpertPlacement)
def test_rows_ids_and_weights_of_all_ranks_and_the_bits_of_the_sum(
    placement: ExpertPlacement, bound: int | None, dtype: torch.dtype
) -> None:
    def work(group: Any) -> None:
        manager = ExpertMapManager(E, group.size, group.rank, placement)
        backend = AllGatherPrepareAndFinalize(group, max_tokens=bound)
        x, routing = step(group.rank, dtype)
        d = prepare(backend, x, routing, expert_map=manager.expert_map("cpu"))
        starts = [sum(SIZES[:rank]) if bound is None else rank * M for rank in range(3)]
        assert d.x.shape == (sum(SIZES) if bound is None else 3 * M, H)
        assert d.x.stride(-1) == 1
        own = list(manager.local_experts)
        partial = torch.randn(d.x.shape, generator=torch.Generator().manual_seed(90 + group.rank)).to(dtype)
        for rank, start in enumerate(starts):
            rows, sent = step(rank, dtype)
            here = slice(start, start + SIZES[rank])
            assert torch.equal(d.x[here], rows)
            assert torch.equal(d.topk_weights[here], sent.topk_weights)
            wanted = [[own.index(e) if e in own else -1 for e in row] for row in sent.topk_ids.tolist()]
            assert d.topk_ids[here].tolist() == wanted
        padding = torch.ones(len(d.x), dtype=torch.bool)
        for rank, start in enumerate(starts):
            padding[start : start + SIZES[rank]] = False
        assert d.topk_ids[padding].eq(-1).all()
        out = torch.full(x.shape, torch.nan, dtype=dtype)
        backend.finalize(partial, d.handle, routing, out)
        total = torch.zeros_like(partial)
        for rank in range(3):  # the declared rounding: a sum over ranks in the model dtype
            total += torch.randn(partial.shape, generator=torch.Generator().manual_seed(90 + rank)).to(dtype)
        assert torch.equal(out, total[starts[group.rank] :][: SIZES[group.rank]])

    run_on_ranks(3, work)


def test_one_collective_each_way_where_the_bound_is_known() -> None:
    def work(group: Any, bound: int | None) -> int:
        backend = AllGatherPrepareAndFinalize(group, max_tokens=bound)
        x, routing = step(group.rank, torch.float32)
        d = prepare(backend, x, routing)
        backend.finalize(d.x, d.handle, routing, torch.empty(x.shape))
        return int(group.calls)

    assert run_on_ranks(3, work, M) == [2] * 3
    assert run_on_ranks(3, work, None) == [3] * 3, "and one more that tells the sizes"


def test_what_does_not_fit_and_what_is_used_twice_is_named() -> None:
    def work(group: Any) -> None:
        backend = AllGatherPrepareAndFinalize(group, max_tokens=M)
        with pytest.raises(CapacityError, match=f"rank {group.rank}: T = 7 tokens, but max_tokens_per_rank = 6"):
            prepare(backend, *step(0, torch.float32, tokens=7))
        with pytest.raises(MoEError, match=r"payload = 'nvfp4' .* it carries 'model dtype', and the scheme's own"):
            prepare(backend, *step(0, torch.float32), payload="nvfp4")
        x, routing = step(group.rank, torch.float32)
        d = prepare(backend, x, routing)
        backend.release(d.handle)
        with pytest.raises(MoEError, match=r"all_gather: finalize got handle = .* exactly once"):
            backend.finalize(d.x, d.handle, routing, torch.empty(x.shape))

    run_on_ranks(3, work)


def test_a_gpu_or_a_graph_wants_the_bound() -> None:
    assert ALL_GATHER.refuse is not None
    gpu = Device("cuda", (9, 0), "H200")
    for config, device, refused in (
        ({}, Device("cpu"), False),
        ({}, gpu, True),
        ({"max_tokens_per_rank": 8}, gpu, False),
        ({"max_tokens_per_rank": 8, "cuda_graph": True}, gpu, False),
        ({"cuda_graph": True}, Device("cpu"), True),
    ):
        reason = ALL_GATHER.refuse(Problem(config=MoEConfig(**CONFIG, **config), parallel=OWN_TOKENS, device=device))
        assert (reason is not None) == refused
        assert reason is None or "max_tokens_per_rank = None" in reason
    assert ALL_GATHER.refuse(Problem(config=MoEConfig(**CONFIG), device=gpu)) is None, "one rank tells nobody"


def test_it_is_chosen_where_local_cannot_serve() -> None:
    chosen = plan(MoEConfig(**CONFIG), parallel=OWN_TOKENS, device="cpu")
    assert chosen.dispatch.name == "all_gather"
    assert chosen.output_is_reduced
    assert "carries no tokens between ranks" in chosen.explain()
    with pytest.raises(UnsupportedError, match="gathers no tokens, and with tp_size = 2, sp_size = 2"):
        plan(
            MoEConfig(**CONFIG),
            parallel=MoEParallelConfig.fold(tp_size=2, sequence_parallel=True),
            dispatch="local",
            device="cpu",
        )


def test_with_replicated_tokens_it_stays_local() -> None:
    chosen = plan(MoEConfig(**CONFIG), parallel=MoEParallelConfig(ep_size=2), dispatch="all_gather", device="cpu")
    assert not chosen.output_is_reduced
    assert isinstance(MoEKernel(chosen).prepare_finalize, LocalPrepareAndFinalize)


def test_without_a_group_it_says_so() -> None:
    chosen = plan(MoEConfig(**CONFIG), parallel=OWN_TOKENS, dispatch="all_gather", device="cpu")
    with pytest.raises(MoEError, match="all_gather moves tokens between ranks, and group is None"):
        MoEKernel(chosen)
