"""The adapter over the emulation: bits, handles, aliases, scales, operators that are shared.

Shape letters: T tokens on one rank · H hidden · E experts, global · E_l local experts · K top-k · W ranks · R rows.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch

from moe_core import formats
from moe_core.config import MoEConfig, MoEParallelConfig, Problem
from moe_core.errors import CapacityError, MoEError
from moe_core.quant import UNQUANTIZED, QuantScheme, QuantSpec, ScaleFormat
from moe_core.testing import Faults, run_on_ranks
from moe_core.types import MODEL_DTYPE_PAYLOAD, Dispatched, ExpertPlacement, Routing
from moe_mori import limits
from moe_mori.emulation import emulated_library, make_emulated
from moe_mori.operators import POOL
from moe_mori.prepare_finalize import MoriPrepareAndFinalize
from moe_mori.prepare_finalize import make as make_over

E, H, K, M = 8, 64, 3, 7
SIZES = ((4, 7, 0, 2), (0, 0, 5, 0), (0, 0, 0, 0), (7, 7, 7, 7))
VERSIONS = ((1, 2, 0), (1, 2, 2))
NAN = float("nan")
FP8 = QuantSpec("float8_e4m3fn", (1, 32), dynamic=True)
SCHEMES = (
    UNQUANTIZED,
    QuantScheme("fp8_block", attrs.evolve(FP8, group_shape=(32, 32)), FP8),
    QuantScheme("fp8_token", FP8, attrs.evolve(FP8, group_shape=(1, -1))),
    QuantScheme("fp8_ue8m0", FP8, attrs.evolve(FP8, scale_format=ScaleFormat.UE8M0)),
    QuantScheme("mxfp4", FP8, QuantSpec("float4_e2m1", (1, 32), ScaleFormat.UE8M0, dynamic=True)),
)


@pytest.fixture(autouse=True)
def _no_operator_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not POOL._owners


def make(
    group: Any, scheme: QuantScheme = UNQUANTIZED, version: tuple[int, ...] = (1, 2, 2), hidden: int = H
) -> MoriPrepareAndFinalize:
    config = MoEConfig(
        num_experts=E, top_k=K, hidden_size=hidden, intermediate_size=8, max_tokens_per_rank=M, dtype=torch.bfloat16
    )
    parallel = MoEParallelConfig.fold(dp_size=group.size, dp_rank=group.rank, expert_parallel=True)
    return make_emulated(config, parallel, scheme, group, ExpertPlacement.LINEAR, version=version)


def batch(rank: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, Routing]:
    """Choices of nobody, rows of nobody, an id twice; NaN is the weight of what isn't there."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    x = torch.randn(tokens, H + 3, generator=generator).bfloat16()[:, :H]
    ids = torch.randint(-1, E, (tokens, K), generator=generator)
    ids[2:3] = -1
    return x, Routing(ids, torch.rand(tokens, K, generator=generator).masked_fill(ids < 0, NAN))


def payload_of(scheme: QuantScheme) -> str:
    return MODEL_DTYPE_PAYLOAD if scheme.activation is None else scheme.name


def prepare(backend: MoriPrepareAndFinalize, x: torch.Tensor, routing: Routing) -> Dispatched:
    return backend.prepare(x, routing, num_experts=E, expert_map=None, payload=payload_of(backend.scheme))


def as_seen(x: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """The rows as experts read them, fp32."""
    spec = scheme.activation
    return x.float() if spec is None else formats.quantize_dequantize(x, spec)


def experts(rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """In the place of experts, with a factor each: their weighted sum over `kept` choices, rounded to bf16 once."""
    total = torch.zeros(rows.shape)
    for k in range(K):
        term = rows * (3 + ids[:, k : k + 1].float()) * weights[:, k : k + 1]
        total += torch.where(kept[:, k : k + 1], term, 0.0)
    return total.bfloat16()


def run_experts(backend: MoriPrepareAndFinalize, d: Dispatched, rank: int, size: int) -> torch.Tensor:
    rows, spec = d.x, backend.scheme.activation
    if spec is not None:
        rows = formats.dequantize(d.x, d.x_scale, spec)
    y = experts(rows.float(), d.topk_ids + rank * E // size, d.topk_weights, d.topk_ids >= 0)
    y[int(d.num_rows) :] = NAN
    return y


def foretold(x: torch.Tensor, routing: Routing, scheme: QuantScheme, size: int) -> torch.Tensor:
    """Each rank's sum rounded to bf16, then a plain fp32 sum in the order in which the ids name the ranks."""
    ids, share = routing.topk_ids, E // size
    owners = torch.where(ids < 0, -1, ids // share)
    parts = [experts(as_seen(x, scheme), ids, routing.topk_weights, owners == rank) for rank in range(size)]
    out = torch.zeros(x.shape)
    for token in range(x.shape[0]):
        for rank in dict.fromkeys(owner for owner in owners[token].tolist() if owner >= 0):
            out[token] += parts[rank][token].float()
    return out.bfloat16()


@pytest.mark.parametrize("version", VERSIONS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_the_bits_are_those_of_the_declared_rounding(scheme, version):
    def work(group: Any, sizes: tuple[int, ...]) -> None:
        backend = make(group, scheme, version)
        for seed in range(2):  # twice, over buffers that hold the first step's rows
            x, routing = batch(group.rank, sizes[group.rank], seed)
            before = x.clone()
            d = prepare(backend, x, routing)
            first, share = group.rank * E // group.size, E // group.size
            everyone = [batch(rank, sizes[rank], seed)[1].topk_ids for rank in range(group.size)]
            mine = [((ids >= first) & (ids < first + share)).any(dim=1).sum() for ids in everyone]
            extra = [(ids == -1).any(dim=1).sum() for ids in everyone] if version < (1, 2, 1) else [0]
            assert sum(mine) <= int(d.num_rows) <= sum(mine) + sum(extra), "once to each rank that has an expert"
            assert d.x.shape[0] == M * group.size
            assert int(d.topk_ids.max()) < share
            y = run_experts(backend, d, group.rank, group.size)
            out = torch.full(x.shape, NAN, dtype=torch.bfloat16)
            backend.finalize(y, d.handle, routing, out)
            assert torch.equal(out, foretold(x, routing, scheme, group.size))
            assert torch.equal(x, before)

    for sizes in SIZES:
        run_on_ranks(4, work, sizes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_the_result_is_near_float64(scheme):
    """Half a unit in the last place of each rank's part, and of their sum."""
    x, routing = batch(0, 7)
    seen, ids = as_seen(x, scheme).double(), routing.topk_ids
    parts = [torch.zeros(x.shape).double() for _ in range(4)]
    for k in range(K):
        for rank in range(4):
            mine = (ids[:, k : k + 1] >= 0) & (ids[:, k : k + 1] // 2 == rank)
            term = seen * (3 + ids[:, k : k + 1]) * routing.topk_weights[:, k : k + 1].double()
            parts[rank] += torch.where(mine, term, 0.0)
    exact = sum(parts)
    bound = 2**-8 * (sum(part.abs() for part in parts) + exact.abs())
    assert bool(((foretold(x, routing, scheme, 4).double() - exact).abs() <= bound).all())


def test_what_was_handed_out_outlives_the_vendors_counters():
    """The combine resets MoRI's counter of rows, and its result lies in a buffer that the next one overwrites."""

    def work(group: Any) -> None:
        backend = make(group)
        outs = []
        for seed in range(2):
            x, routing = batch(group.rank, 5, seed)
            d = prepare(backend, x, routing)
            rows = int(d.num_rows)
            out = torch.empty_like(x)
            backend.finalize(run_experts(backend, d, group.rank, group.size), d.handle, routing, out)
            assert int(d.num_rows) == rows
            outs.append((out, foretold(x, routing, UNQUANTIZED, group.size)))
        assert all(torch.equal(out, wanted) for out, wanted in outs)

    run_on_ranks(2, work, faults=Faults(jitter=0.003))


def test_what_a_step_holds_is_what_was_declared():
    """Beside views of MoRI's own buffers: the local ids and the copy of its counter."""

    def work(group: Any) -> None:
        backend = make(group)
        d = prepare(backend, *batch(group.rank, 5))
        held = d.topk_ids.untyped_storage().nbytes() + d.num_rows.untyped_storage().nbytes()
        config = MoEConfig(
            num_experts=E, top_k=K, hidden_size=H, intermediate_size=8, max_tokens_per_rank=M, dtype=torch.bfloat16
        )
        parallel = MoEParallelConfig.fold(dp_size=2, dp_rank=group.rank, expert_parallel=True)
        declared = limits.footprint(Problem(config=config, parallel=parallel), MODEL_DTYPE_PAYLOAD, 5)
        assert (declared.held_bytes, declared.rows) == (held, d.x.shape[0])
        backend.release(d.handle)

    run_on_ranks(2, work)


def test_one_micro_batch_over_all_layers_and_a_release_makes_room():
    def work(group: Any) -> None:
        first, second = make(group), make(group)
        assert len(POOL._owners[group]) == 1
        x, routing = batch(group.rank, 3)
        d = prepare(first, x, routing)
        with pytest.raises(MoEError, match="a micro-batch is in flight over the layers that share this operator"):
            prepare(second, x, routing)
        first.release(d.handle)
        first.release(d.handle)
        d = prepare(second, x, routing)
        out = torch.empty_like(x)
        second.finalize(run_experts(second, d, group.rank, group.size), d.handle, routing, out)
        assert torch.equal(out, foretold(x, routing, UNQUANTIZED, group.size))

    run_on_ranks(2, work)


def test_what_does_not_fit_and_what_is_used_twice_is_named():
    def work(group: Any) -> None:
        backend = make(group)
        with pytest.raises(CapacityError, match=f"rank {group.rank}: T = 8 tokens, but max_tokens_per_rank = 7"):
            prepare(backend, *batch(0, 8))
        x, routing = batch(group.rank, 2)
        with pytest.raises(MoEError, match="payload = 'nvfp4' in a layer of scheme 'unquantized'"):
            backend.prepare(x, routing, num_experts=E, expert_map=None, payload="nvfp4")
        d = prepare(backend, x, routing)
        y = run_experts(backend, d, group.rank, group.size)
        backend.finalize(y, d.handle, routing, torch.empty_like(x))
        for handle, said in ((d.handle, "one that was consumed"), (None, "None")):
            with pytest.raises(
                MoEError, match=f"finalize got {said}; it takes the handle of one prepare, exactly once"
            ):
                backend.finalize(y, handle, routing, torch.empty_like(x))

    run_on_ranks(2, work)


def test_operators_live_as_long_as_somebody_holds_one():
    def work(group: Any) -> None:
        layers = [make(group, hidden=hidden) for hidden in (64, 32)]
        operators = [entry.item for entry in POOL._owners[group].values()]
        layers.pop()
        gc.collect()
        assert all(operator.raw is not None for operator in operators)
        layers.clear()
        gc.collect()
        assert all(operator.raw is None for operator in operators)

    run_on_ranks(2, work)


def test_a_second_group_of_ranks_is_refused():
    """MoRI has one symmetric heap, over one set of ranks, in a process."""

    def work(group: Any) -> None:
        make(group)
        pair = group.subgroup([0, 1])
        library = emulated_library(group)
        config = MoEConfig(num_experts=E, top_k=K, hidden_size=H, intermediate_size=8, max_tokens_per_rank=M)
        parallel = MoEParallelConfig.fold(dp_size=2, dp_rank=group.rank, expert_parallel=True)
        with pytest.raises(MoEError, match="MoRI has one world of ranks per process"):
            make_over(config, parallel, UNQUANTIZED, pair, ExpertPlacement.LINEAR, library=library)

    run_on_ranks(2, work)


def test_a_heap_that_is_too_small_is_said_so():
    def work(group: Any) -> None:
        emulated_library(group).shmem.shmem_init_attr = lambda *arguments: 3
        with pytest.raises(MoEError, match=r"shmem_init_attr returned 3; is MORI_SHMEM_HEAP_SIZE \(2 GiB"):
            make(group)

    run_on_ranks(1, work)


def test_ranks_whose_libraries_differ_are_told():
    for error in run_on_ranks(2, lambda group: make(group, version=VERSIONS[group.rank]), return_errors=True):
        assert isinstance(error, MoEError)
        assert "MoRI: rank 0 has 'emulation of mori 1.2.0', rank 1 has 'emulation of mori 1.2.2'" in str(error)


def test_a_group_and_a_bound_are_needed():
    config = MoEConfig(num_experts=E, top_k=K, hidden_size=H, intermediate_size=8)
    with pytest.raises(MoEError, match="group = None, max_tokens_per_rank = None; pass both"):
        make_emulated(config, MoEParallelConfig(ep_size=2), UNQUANTIZED, None, ExpertPlacement.LINEAR)


def test_the_emulation_refuses_what_mori_gets_wrong():
    def work(group: Any) -> None:
        library = emulated_library(group)
        good = {
            "data_type": torch.bfloat16, "rank": 0, "world_size": 1, "hidden_dim": H, "scale_dim": 0,
            "scale_type_size": 0, "max_token_type_size": 2, "max_num_inp_token_per_rank": M,
            "num_experts_per_rank": E, "num_experts_per_token": K, "gpu_per_node": 1,
        }  # fmt: skip
        for bad in ({"gpu_per_node": 3}, {"gpu_per_node": 2}, {"num_experts_per_token": 10}):
            with pytest.raises(ValueError, match=r"gpu_per_node|experts per token"):
                library.ops.EpDispatchCombineOp(library.ops.EpDispatchCombineConfig(**(good | bad)))
        raw = library.ops.EpDispatchCombineOp(library.ops.EpDispatchCombineConfig(**good))
        x, ids = torch.randn(4, H).bfloat16(), torch.zeros(4, K, dtype=torch.int32)
        with pytest.raises(AssertionError, match="without a dispatch"):
            raw.combine(x, None, ids)
        for bad_call in ((x, ids.long()), (x.double(), ids)):
            with pytest.raises(TypeError):
                raw.dispatch(bad_call[0], None, None, bad_call[1])
        for bad_call in ((x[:, ::2], ids), (x, ids[:, :2]), (x[:3], ids), (x.repeat(2, 1), ids.repeat(2, 1))):
            with pytest.raises(ValueError, match=r"input|tokens"):
                raw.dispatch(bad_call[0], None, None, bad_call[1])
        out, _, scales, _, total = raw.dispatch(x, None, x.new_empty(0, 2), ids)
        assert scales is None
        with pytest.raises(RuntimeError, match="before the combine"):
            raw.dispatch(x, None, None, ids)
        with pytest.raises(ValueError, match="not those of this rank's dispatch"):
            raw.combine(out, None, ids[:3])
        assert int(total) == 4
        raw.combine(out, None, ids)
        assert int(total) == 0

    run_on_ranks(1, work)
