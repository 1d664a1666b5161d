"""What the planner says, held against what steps on virtual ranks really allocate and receive.

Shape letters: T tokens on this rank · H hidden · W ranks · K top-k.
"""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import attrs
import pytest
import torch
from allocations import Allocations, CountingGroup

import moe_core
from moe_core import formats
from moe_core.config import MoEConfig, MoEParallelConfig, Problem
from moe_core.footprint import payload_row_bytes, share_of_tokens
from moe_core.interfaces import Candidate
from moe_core.planner import cost_of, pair_costs, weight_bytes
from moe_core.plugins import registry
from moe_core.routed_experts import RoutedExperts
from moe_core.testing import run_on_ranks
from moe_core.types import Availability, Device, Routing

E, K, H, INNER = 16, 4, 256, 128
CONFIG = MoEConfig(num_experts=E, top_k=K, hidden_size=H, intermediate_size=INNER, dtype=torch.float32)

needs_batched = pytest.mark.skipif(
    importlib.util.find_spec("moe_batched") is None, reason="moe-batched is not installed"
)
needs_fp8 = pytest.mark.skipif(importlib.util.find_spec("quant_fp8") is None, reason="moe-quant-fp8 is not installed")


def spread(kind: str, ranks: int, rank: int) -> MoEParallelConfig:
    if kind == "tp":
        return MoEParallelConfig(tp_size=ranks, tp_rank=rank)
    own = {"dp_size": ranks, "dp_rank": rank} if kind == "ep" else {}
    return MoEParallelConfig(ep_size=ranks, ep_rank=rank, **own)


def routing(tokens: int, seed: int) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, E, generator=generator).topk(K, dim=1).indices.int()
    return Routing(ids, torch.rand(tokens, K, generator=generator))


def run_step(
    dispatch: str, ranks: int, tokens: int, *, kind: str = "ep", scheme: str | None = None, fixed: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Any]:  # fmt: skip
    """On each rank: (weights, peak of a step, bytes received in it, what the planner says)."""
    config = attrs.evolve(CONFIG, max_tokens_per_rank=tokens, dtype=dtype)

    def work(group: Any) -> Any:
        allocations = Allocations()
        counting = CountingGroup(group, allocations)
        runner: Any = moe_core.build_runner(
            config, parallel=spread(kind, ranks, group.rank), scheme=scheme, dispatch=dispatch,
            group=counting if ranks > 1 else None, device="cpu",
        )  # fmt: skip
        plan = runner.plan
        if fixed:  # what a GPU does, on the CPU; the planner knows it by the device
            runner.kernel.prepare_finalize.exact = False
            plan = attrs.evolve(plan, problem=attrs.evolve(plan.problem, device=Device("cuda", (9, 0))))
        for parameter in runner.parameters():
            parameter.data.zero_()
        x, routed = torch.randn(tokens, H).to(dtype), routing(tokens, group.rank)
        with torch.no_grad(), allocations:
            runner.kernel(x, routed, runner.routed_experts.weights)  # tables that are made once
            counting.received = 0
            before = allocations.restart()
            _out, _ = runner.kernel(x, routed, runner.routed_experts.weights)
        weights = sum(parameter.nbytes for parameter in runner.routed_experts.parameters())
        return weights, allocations.peak - before, counting.received, cost_of(plan, tokens)

    return run_on_ranks(ranks, work)


STEPS = [
    ("local", 1, {}),
    ("local", 1, {"dtype": torch.bfloat16}),
    ("local", 4, {"kind": "ep-replicated"}),
    ("local", 4, {"kind": "tp"}),
    ("all_gather", 4, {}),
    pytest.param("batched", 1, {}, marks=needs_batched),
    pytest.param("batched", 4, {"fixed": True}, marks=needs_batched),
    pytest.param("batched", 3, {"fixed": True, "dtype": torch.bfloat16}, marks=needs_batched),
]


@pytest.mark.parametrize(("dispatch", "ranks", "options"), STEPS)
def test_a_step_allocates_and_receives_what_was_planned(dispatch, ranks, options):
    for weights, peak, received, cost in run_step(dispatch, ranks, 256, **options):
        assert cost.weight_bytes == weights
        # the upper bound may be missed by index arrays that no one declares, [T, K] in size
        assert 0.9 * cost.step_bytes <= peak <= 1.01 * cost.step_bytes
        assert received == cost.wire_bytes - cost.reduce_wire_bytes


@needs_batched
def test_traffic_that_follows_the_routing_is_told_in_the_mean():
    results = run_step("batched", 4, 512)
    measured = sum(received for _, _, received, _ in results)
    planned = sum(cost.wire_bytes for *_, cost in results)
    assert measured == pytest.approx(planned, rel=0.02)
    for _, peak, _, cost in results:
        assert peak == pytest.approx(cost.step_bytes, rel=0.05)


@needs_batched
@needs_fp8
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("dispatch", ["all_gather", "batched"])
def test_a_quantized_payload(dispatch, ranks):
    """Experts without declared workspaces: the dispatch alone is compared."""
    config = attrs.evolve(CONFIG, max_tokens_per_rank=128)

    def work(group: Any) -> None:
        parallel = spread("ep", ranks, group.rank)
        plan = moe_core.plan(config, parallel=parallel, scheme="fp8_block", dispatch=dispatch, device="cpu")
        assert plan.payload == "fp8_block"
        footprint = plan.dispatch.capabilities.footprint(plan.problem, plan.payload, 128)
        allocations = Allocations()
        counting = CountingGroup(group, allocations)
        backend = plan.dispatch.factory(config, parallel, plan.scheme, counting, config.placement)
        manager = moe_core.expert_map.ExpertMapManager(E, ranks, group.rank, config.placement)
        with allocations:
            given, x = routing(128, group.rank), torch.randn(128, H)
            before = allocations.restart()
            dispatched = backend.prepare(
                x, given, num_experts=E, expert_map=manager.expert_map("cpu"), payload=plan.payload
            )
            assert allocations.live - before == pytest.approx(footprint.held_bytes, rel=0.02)
            assert counting.received == pytest.approx(footprint.dispatch_wire_bytes, rel=0.05 * (dispatch == "batched"))
            assert allocations.peak - before <= 1.05 * (footprint.held_bytes + footprint.scratch_bytes)
        assert dispatched.x.shape[dispatch == "batched"] == footprint.rows
        backend.release(dispatched.handle)

    run_on_ranks(ranks, work)


@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_channel"])
@needs_fp8
def test_bytes_of_a_packed_row(scheme):
    problem = Problem(config=CONFIG, scheme=registry().find("quant_methods", scheme).factory().scheme)
    values, scales = formats.quantize(torch.randn(3, H), problem.scheme.activation)
    assert payload_row_bytes(problem, scheme) == (values.nbytes // 3, scales.nbytes // 3)
    assert payload_row_bytes(problem, "model dtype") == (4 * H, 0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_share_of_tokens_by_enumeration(ranks):
    problem = Problem(
        config=attrs.evolve(CONFIG, num_experts=16, top_k=3), parallel=MoEParallelConfig(ep_size=ranks, dp_size=ranks)
    )
    own = set(range(problem.num_local_experts))
    sets = list(itertools.combinations(range(16), 3))
    assert share_of_tokens(problem) == pytest.approx(sum(bool(own & set(chosen)) for chosen in sets) / len(sets))


def test_the_work_of_a_step_by_sampling():
    """Choices, experts that are touched and rows with work, against routings that are drawn."""
    parallel = MoEParallelConfig(ep_size=4, dp_size=4)
    plan = moe_core.plan(attrs.evolve(CONFIG, max_tokens_per_rank=5), parallel=parallel, dispatch="all_gather",
                         device="cpu")  # fmt: skip
    cost = cost_of(plan, 5)
    drawn = [routing(20, seed).topk_ids for seed in range(2000)]
    assert cost.choices == pytest.approx(sum((ids < 4).sum().item() for ids in drawn) / 2000, rel=0.03)
    assert cost.filled == pytest.approx(sum((ids < 4).any(dim=1).sum().item() for ids in drawn) / 2000, rel=0.03)
    touched = sum(ids[ids < 4].unique().numel() for ids in drawn) / 2000
    assert cost.active_experts == pytest.approx(touched, rel=0.01)
    assert cost.slots == 20
    assert cost.flops == 6 * cost.choices * H * INNER


def test_least_traffic_of_the_experts_on_one_rank():
    cost = cost_of(moe_core.plan(attrs.evolve(CONFIG, dtype=torch.bfloat16), device="cpu"), 8)
    touched = E * (1 - (1 - K / E) ** 8)
    assert cost.traffic_bytes == pytest.approx(touched * 6 * H * INNER + 8 * (4 * H + 8 * K))


def test_weights_of_a_rank_and_its_scales():
    config = attrs.evolve(CONFIG, num_experts=10)
    plan = moe_core.plan(config, parallel=MoEParallelConfig(ep_size=4), device="cpu")
    assert weight_bytes(plan) == 3 * 3 * H * INNER * 4  # rank 0 of 10 on 4 holds 3


def test_a_pair_that_only_this_machine_lacks_is_costed_and_says_so(monkeypatch):
    def absent(candidate: Candidate[Any]) -> Candidate[Any]:
        return attrs.evolve(candidate, probe=lambda: Availability(False, "acme is not installed: pip install acme"))

    here = registry()
    monkeypatch.setattr(here, "dispatch", {name: absent(c) if name == "all_gather" else c
                                           for name, c in here.dispatch.items()})  # fmt: skip
    problem = Problem(config=CONFIG, device=Device("cuda", (9, 0), "elsewhere"))
    pairs = {(pair.report.dispatch, pair.report.experts): pair for pair in pair_costs(problem, 4)}
    found = pairs["all_gather", "torch"]
    assert found.verdict == "not here"
    assert found.missing == ("dispatch all_gather: acme is not installed: pip install acme",)
    assert found.cost is not None
    assert found.report.rejections
    assert pairs["local", "triton"].verdict == "chosen"


def test_a_dispatch_that_declares_nothing_leaves_open_what_follows_from_it(monkeypatch):
    here = registry()
    silent = {
        name: attrs.evolve(c, capabilities=attrs.evolve(c.capabilities, footprint=None))
        for name, c in here.dispatch.items()
    }
    monkeypatch.setattr(here, "dispatch", silent)
    cost = cost_of(moe_core.plan(CONFIG, device="cpu"), 4)
    assert (cost.wire_bytes, cost.step_bytes, cost.buffer_bytes, cost.slots) == (None, None, None, None)
    assert cost.weight_bytes > 0


@pytest.mark.parametrize("scheme", ["unquantized", pytest.param("fp8_block", marks=needs_fp8)])
def test_loading_needs_no_more_than_one_expert(scheme, tmp_path):
    """Beside the weights: the tensor that is read (the reader's, so it is added here), and what quantizing it takes."""
    safetensors = pytest.importorskip("safetensors.torch")
    from moe_core.checkpoint import Checkpoint, load_experts

    size = 1024
    names = [f"model.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in range(2) for p in ("gate", "up", "down")]
    safetensors.save_file({name: torch.randn(size, size) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    config = attrs.evolve(CONFIG, num_experts=2, top_k=1, hidden_size=size, intermediate_size=size)
    plan = moe_core.plan(config, scheme=scheme, device="cpu")
    cost = cost_of(plan, 1)
    allocations = Allocations()
    with Checkpoint.open(tmp_path) as checkpoint, allocations:
        method = registry().find("quant_methods", scheme).factory()
        layer = RoutedExperts(plan, method, torch.device("cpu"))
        assert allocations.live == cost.weight_bytes
        load_experts(checkpoint, "model.layers.0.mlp", layer)
    assert allocations.peak - cost.weight_bytes + 4 * size * size <= cost.loading_bytes
