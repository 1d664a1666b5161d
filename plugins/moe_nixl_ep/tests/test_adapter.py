"""The adapter over the emulation: bits, handles, buffers. Rows past the counts, and outputs, are NaN before they are
written.

Shape letters: T tokens on one rank · H hidden · E experts, global · E_l local experts · K top-k · W ranks.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch

from moe_core import formats
from moe_core.config import MoEConfig, MoEParallelConfig, Problem
from moe_core.errors import CapacityError, MoEError
from moe_core.quant import UNQUANTIZED, QuantSpec
from moe_core.testing import run_on_ranks
from moe_core.types import MODEL_DTYPE_PAYLOAD, Dispatched, ExpertPlacement, Routing
from moe_nixl_ep import emulation, limits
from moe_nixl_ep.buffers import POOL
from moe_nixl_ep.emulation import emulated_library, fused_multiply_add, make_emulated, quantize
from moe_nixl_ep.prepare_finalize import NixlEPPrepareAndFinalize

E, K, M = 8, 3, 7
SIZES = ((4, 7, 0, 2), (0, 0, 5, 0), (0, 0, 0, 0), (7, 7, 7, 7))
PAYLOADS = (MODEL_DTYPE_PAYLOAD, "fp8_block", "fp8_block_ue8m0")
NAN = float("nan")


@pytest.fixture
def random_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks send, and go on after they have received, in another order each time."""

    def late(original: Any) -> Any:
        def call(*arguments: Any) -> Any:
            time.sleep(random.uniform(0, 0.004))
            return original(*arguments)

        return call

    for name in ("set", "get"):
        monkeypatch.setattr(emulation._Prefixed, name, late(getattr(emulation._Prefixed, name)))


@pytest.fixture(autouse=True)
def _no_buffer_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not POOL._owners


def make(group: Any, hidden: int = 2100, **options: Any) -> NixlEPPrepareAndFinalize:
    config = MoEConfig(
        num_experts=E, top_k=K, hidden_size=hidden, intermediate_size=8, max_tokens_per_rank=M, dtype=torch.bfloat16
    )
    parallel = MoEParallelConfig.fold(dp_size=group.size, dp_rank=group.rank, expert_parallel=True)
    return make_emulated(config, parallel, UNQUANTIZED, group, ExpertPlacement.LINEAR, **options)


def batch(rank: int, tokens: int, hidden: int, seed: int = 0) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    x = torch.randn(tokens, hidden + 3, generator=generator).bfloat16()[:, :hidden]
    ids = torch.rand(tokens, E, generator=generator).argsort(dim=1)[:, :K]
    ids = ids.masked_fill(torch.rand(tokens, K, generator=generator) < 0.2, -1)
    ids[2:3] = -1
    return x, Routing(ids, torch.rand(tokens, K, generator=generator).masked_fill(ids < 0, NAN))


def prepare(backend: NixlEPPrepareAndFinalize, x: torch.Tensor, routing: Routing, payload: str) -> Dispatched:
    return backend.prepare(x, routing, num_experts=E, expert_map=None, payload=payload)


def expert(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """In the place of an expert: a factor of its own, rounded to bf16 once."""
    return (x.float() * (3 + ids.float()).unsqueeze(-1)).bfloat16()


def seen_by_experts(x: torch.Tensor, payload: str) -> torch.Tensor:
    if payload == MODEL_DTYPE_PAYLOAD:
        return x
    q, scale = quantize(torch.nn.functional.pad(x, (0, -x.shape[1] % 128)), payload.endswith("ue8m0"))
    return (q.float() * scale.repeat_interleave(128, dim=1))[:, : x.shape[1]]


def run_experts(d: Dispatched, rank: int) -> torch.Tensor:
    rows = d.x
    if d.x_scale is not None:
        rows = rows.float() * d.x_scale.repeat_interleave(128, dim=2)[..., : rows.shape[2]]
    ids = torch.arange(rows.shape[0]) + rank * rows.shape[0]
    y = expert(rows, ids.unsqueeze(1).expand(rows.shape[:2]))
    for local, count in enumerate(d.tokens_per_expert.tolist()):
        y[local, count:] = NAN
    return y


def combine(backend: NixlEPPrepareAndFinalize, d: Dispatched, rank: int, x: torch.Tensor, routing: Routing) -> Any:
    out = torch.full(x.shape, NAN, dtype=torch.bfloat16)
    place = backend.expert_output(d, out)
    y = run_experts(d, rank)
    backend.finalize(y if place is None else place.copy_(y), d.handle, routing, out)
    return out


def foretold(x: torch.Tensor, routing: Routing, payload: str) -> torch.Tensor:
    """fp32 fused multiply-adds in the order of K, rounded once."""
    seen, total = seen_by_experts(x, payload), torch.zeros(x.shape)
    for k in range(K):
        ids, weights = routing.topk_ids[:, k], routing.topk_weights[:, k : k + 1]
        total = torch.where((ids < 0).unsqueeze(1), total, fused_multiply_add(expert(seen, ids), weights, total))
    return total.bfloat16()


@pytest.mark.parametrize("hidden", [2048, 2100])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_bits_are_those_of_the_declared_rounding(payload, hidden):
    def work(group: Any, sizes: tuple[int, ...]) -> None:
        backend = make(group, hidden)
        x, routing = batch(group.rank, sizes[group.rank], hidden)
        before = x.clone()
        d = prepare(backend, x, routing, payload)
        own = range(group.rank * E // group.size, (group.rank + 1) * E // group.size)
        everyone = torch.cat([batch(rank, sizes[rank], hidden)[1].topk_ids for rank in range(group.size)])
        assert d.x.shape == (len(own), 8 * group.size, hidden), "S = 8: slots of 2 ranks come in pairs"
        assert d.tokens_per_expert.tolist() == [int((everyone == expert).sum()) for expert in own]
        assert torch.equal(combine(backend, d, group.rank, x, routing), foretold(x, routing, payload))
        assert torch.equal(x, before)

    for sizes in SIZES:
        run_on_ranks(2, work, sizes)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_result_is_near_float64(payload):
    """One fp32 sum, so half a unit in the last place of the result, and the rows' own rounding."""
    x, routing = batch(0, 7, 2100)
    seen, exact, parts = (
        seen_by_experts(x, payload).double(),
        torch.zeros(x.shape).double(),
        torch.zeros(x.shape).double(),
    )
    for k in range(K):
        part = seen * (3 + routing.topk_ids[:, k : k + 1]) * routing.topk_weights[:, k : k + 1].double()
        part = torch.where(routing.topk_ids[:, k : k + 1] < 0, 0.0, part)
        exact, parts = exact + part, parts + part.abs()
    assert bool(((foretold(x, routing, payload).double() - exact).abs() <= 2**-8 * (parts + exact.abs())).all())


@pytest.mark.parametrize("hidden", [2048, 2100])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_a_step_holds_is_what_was_declared(payload, hidden):
    """Every tensor that `prepare` leaves behind, by the storage behind it."""

    def work(group: Any) -> None:
        backend = make(group, hidden)
        x, routing = batch(group.rank, 5, hidden)
        routing.topk_ids = routing.topk_ids.to(torch.int64)
        d = prepare(backend, x, routing, payload)
        left = [d.x, d.x_scale, d.tokens_per_expert, d.handle.ids, d.handle.expert_out, *d.handle.vendor[:2]]
        held = sum(tensor.untyped_storage().nbytes() for tensor in left if tensor is not None)
        config = MoEConfig(
            num_experts=E, top_k=K, hidden_size=hidden, intermediate_size=8, max_tokens_per_rank=M, dtype=torch.bfloat16
        )
        parallel = MoEParallelConfig.fold(dp_size=2, dp_rank=group.rank, expert_parallel=True)
        declared = limits.footprint(Problem(config=config, parallel=parallel), payload, 5, limits.limits_of(None))
        assert (declared.held_bytes, declared.rows) == (held, d.x.shape[1])
        assert declared.buffer_bytes == backend._buffer.raw._bytes + limits.WORKSPACE_BYTES
        assert declared.own_output == (backend.expert_output(d, x) is not None)
        combine(backend, d, group.rank, x, routing)

    run_on_ranks(2, work)


def test_rows_that_are_not_in_the_buffer_are_brought_there():
    """Whoever does not ask where to write has written elsewhere."""

    def work(group: Any) -> None:
        backend = make(group)
        x, routing = batch(group.rank, 5, 2100)
        d = prepare(backend, x, routing, MODEL_DTYPE_PAYLOAD)
        out = torch.full(x.shape, NAN, dtype=torch.bfloat16)
        backend.finalize(run_experts(d, group.rank), d.handle, routing, out)
        assert torch.equal(out, foretold(x, routing, MODEL_DTYPE_PAYLOAD))

    run_on_ranks(2, work)


def test_rows_that_begin_between_two_words_are_moved():
    """The kernels read and write 16 bytes at once, and a view may begin anywhere."""

    def off_by_one(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)

    def work(group: Any) -> None:
        backend = make(group, 2048)
        x, routing = batch(group.rank, 5, 2048)
        d = prepare(backend, off_by_one(x), routing, MODEL_DTYPE_PAYLOAD)
        out = off_by_one(torch.full(x.shape, NAN, dtype=torch.bfloat16))
        backend.finalize(off_by_one(run_experts(d, group.rank)), d.handle, routing, out)
        assert torch.equal(out, foretold(x, routing, MODEL_DTYPE_PAYLOAD))

    run_on_ranks(2, work)


def test_buffers_of_two_shapes_do_not_hear_each_other():
    def work(group: Any) -> None:
        for seed, hidden in enumerate((2048, 3000, 2048)):
            layers = [make(group, hidden) for hidden in (2048, 3000)]
            x, routing = batch(group.rank, 5, hidden, seed)
            backend = layers[hidden == 3000]
            d = prepare(backend, x, routing, MODEL_DTYPE_PAYLOAD)
            assert torch.equal(combine(backend, d, group.rank, x, routing), foretold(x, routing, MODEL_DTYPE_PAYLOAD))

    run_on_ranks(2, work)


def test_the_librarys_quantizer_differs_from_ours_in_the_last_bit_alone():
    """It multiplies by fp32(448 / amax) where `formats` divides by the scale, and it has another floor."""
    x = torch.randn(500, 1024).bfloat16()
    spec = QuantSpec("float8_e4m3fn", (1, 128), dynamic=True)
    (q, scale), (ours, our_scale) = quantize(x, False), formats.quantize(x, spec)
    torch.testing.assert_close(scale, our_scale, rtol=2**-22, atol=0)
    apart = (q.view(torch.uint8).int() - ours.view(torch.uint8).int()).abs()
    assert int(apart.max()) <= 1, "the neighbouring code at most"
    assert 0 < float((apart > 0).float().mean()) < 0.01
    rounded, power = quantize(x, True)[1], formats.round_up_to_power_of_two(our_scale)
    assert float((rounded != power).float().mean()) < 0.001
    floor = quantize(torch.zeros(1, 128).bfloat16(), False)[1]
    assert float(floor) == pytest.approx(1e-4 / 448)


@pytest.mark.usefixtures("random_delays")
@pytest.mark.parametrize("order", ["abAB", "abBA"])
def test_two_micro_batches_in_flight_over_two_layers(order):
    """a, b: dispatch of a layer; A, B: its combine. Both layers share one buffer."""

    def work(group: Any) -> None:
        layers = {name: make(group) for name in "ab"}
        assert len(POOL._owners[group]) == 1
        batches = {name: batch(group.rank, 5, 2100, seed) for seed, name in enumerate("ab")}
        flights: dict[str, Dispatched] = {}
        for step in order:
            name = step.lower()
            if step in "ab":
                flights[name] = prepare(layers[name], *batches[name], MODEL_DTYPE_PAYLOAD)
            else:
                out = combine(layers[name], flights[name], group.rank, *batches[name])
                assert torch.equal(out, foretold(*batches[name], MODEL_DTYPE_PAYLOAD))

    for _ in range(2):
        run_on_ranks(2, work)


def test_ranks_that_interleave_differently_are_told():
    """In the emulation: the library would mix one rank's dispatch with the other's combine."""

    def work(group: Any) -> None:
        backend = make(group)
        x, routing = batch(group.rank, 2, 2100)
        d = prepare(backend, x, routing, MODEL_DTYPE_PAYLOAD)
        if group.rank:
            prepare(backend, x, routing, MODEL_DTYPE_PAYLOAD)
        else:
            combine(backend, d, group.rank, x, routing)

    with pytest.raises(AssertionError, match=r"as call 1, rank . came to (dispatch|combine) and rank . to"):
        run_on_ranks(2, work, timeout_s=3)


@pytest.mark.usefixtures("random_delays")
@pytest.mark.parametrize("payload", PAYLOADS)
def test_random_delays_change_no_bit(payload):
    def work(group: Any) -> None:
        backend = make(group)
        for seed in range(4):
            x, routing = batch(group.rank, 5, 2100, seed)
            d = prepare(backend, x, routing, payload)
            assert torch.equal(combine(backend, d, group.rank, x, routing), foretold(x, routing, payload))

    run_on_ranks(4, work)


def test_a_third_micro_batch_is_refused_and_a_release_makes_room():
    def work(group: Any) -> None:
        first, second = make(group), make(group)
        x, routing = batch(group.rank, 3, 2100)
        held = [prepare(layer, x, routing, MODEL_DTYPE_PAYLOAD) for layer in (first, second)]
        with pytest.raises(MoEError, match="2 micro-batches are in flight over the layers that share this buffer"):
            prepare(first, x, routing, MODEL_DTYPE_PAYLOAD)
        for layer, dispatched in zip((first, second), held, strict=True):
            layer.release(dispatched.handle)
            layer.release(dispatched.handle)
        held.clear()
        del dispatched
        d = prepare(first, x, routing, MODEL_DTYPE_PAYLOAD)
        assert torch.equal(combine(first, d, group.rank, x, routing), foretold(x, routing, MODEL_DTYPE_PAYLOAD))

    run_on_ranks(2, work)


def test_what_does_not_fit_and_what_is_used_twice_is_named():
    def work(group: Any) -> None:
        backend = make(group)
        with pytest.raises(CapacityError, match=f"rank {group.rank}: T = 8 tokens, but max_tokens_per_rank = 7"):
            prepare(backend, *batch(0, 8, 2100), MODEL_DTYPE_PAYLOAD)
        with pytest.raises(
            MoEError, match="payload = 'nvfp4'; it carries 'model dtype', 'fp8_block', 'fp8_block_ue8m0'"
        ):
            prepare(backend, *batch(0, 2, 2100), "nvfp4")
        x, routing = batch(group.rank, 2, 2100)
        d = prepare(backend, x, routing, MODEL_DTYPE_PAYLOAD)
        combine(backend, d, group.rank, x, routing)
        for handle, said in ((d.handle, "one that was consumed"), (None, "None")):
            with pytest.raises(
                MoEError, match=f"finalize got {said}; it takes the handle of one prepare, exactly once"
            ):
                backend.finalize(d.x, handle, routing, torch.empty_like(x))

    run_on_ranks(2, work)


def test_buffers_live_as_long_as_somebody_holds_one_and_go_together():
    def work(group: Any) -> None:
        wide, narrow = make(group, 3000), make(group, 2000)
        raws = [entry.item.raw for entry in POOL._owners[group].values()]
        assert len(raws) == 2
        del narrow
        gc.collect()
        assert not any(raw._destroyed for raw in raws), "one that is still held may share mapped memory"
        again = make(group, 2000)
        assert len(POOL._owners[group]) == 2, "the same one again"
        del wide, again
        gc.collect()
        assert all(raw._destroyed for raw in raws)
        assert group not in POOL._owners

    run_on_ranks(1, work)


def test_buffers_of_all_groups_of_a_process_go_together():
    """The end of one would unmap the peers' memory for all, as the emulation has it."""

    @attrs.frozen(eq=False)
    class Launched:
        """The rank of a launched process in a group of its own."""

        virtual: Any
        torch_group: Any = attrs.field(factory=object)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.virtual, name)

    def work(group: Any) -> None:
        layers = {name: make(Launched(group)) for name in ("target", "draft")}
        assert len(POOL._owners) == 1
        del layers["draft"]
        gc.collect()
        x, routing = batch(group.rank, 5, 2100)
        d = prepare(layers["target"], x, routing, MODEL_DTYPE_PAYLOAD)
        out = combine(layers["target"], d, group.rank, x, routing)
        assert torch.equal(out, foretold(x, routing, MODEL_DTYPE_PAYLOAD))

    run_on_ranks(1, work)


def test_the_emulated_end_of_a_buffer_unmaps_the_peers_of_the_others():
    def work(group: Any) -> None:
        layer, other = make(group), make(group, 3000)
        other._buffer.raw.destroy()
        with pytest.raises(AssertionError, match="an illegal address: a buffer that has ended"):
            prepare(layer, *batch(group.rank, 2, 2100), MODEL_DTYPE_PAYLOAD)
        other._buffer.raw._destroyed = False  # for the pool, which ends both

    run_on_ranks(1, work)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_fills_what_the_library_allocates_in_torchs_deterministic_mode(payload):
    """The library's kernels don't wait for such fills, and the emulation refuses them."""

    def work(group: Any) -> None:
        backend = make(group)
        x, routing = batch(group.rank, 5, 2100)
        d = prepare(backend, x, routing, payload)
        assert torch.equal(combine(backend, d, group.rank, x, routing), foretold(x, routing, payload))
        with pytest.raises(AssertionError, match="torch would fill what is allocated here"):
            backend._buffer.raw.low_latency_dispatch(torch.zeros(0, 3072).bfloat16(), d.handle.ids[:0], 8, E)

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        run_on_ranks(4, work)
        assert torch.empty(1, dtype=torch.int32).item() == torch.iinfo(torch.int32).max, "it fills again"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_captured_graph_keeps_its_buffer():
    def work(group: Any) -> Any:
        backend = make(group)
        raw = backend._buffer.raw
        backend._keep()
        del backend
        gc.collect()
        return raw

    (raw,) = run_on_ranks(1, work)
    assert not raw._destroyed
    POOL.close()
    assert raw._destroyed


def test_ranks_whose_libraries_differ_are_told():
    def work(group: Any) -> None:
        make(group, version=("1.3.0", "1.4.0")[group.rank])

    for error in run_on_ranks(2, work, return_errors=True):
        assert isinstance(error, MoEError)
        assert "NIXL EP: rank 0 has 'emulation of nixl_ep_cu13 1.3.0', rank 1 has" in str(error)
        assert "dtype of expert ids: rank 0 has 'torch.int64', rank 1 has 'torch.int32'" in str(error)


def test_a_group_and_a_bound_are_needed():
    config = MoEConfig(num_experts=E, top_k=K, hidden_size=2048, intermediate_size=8)
    with pytest.raises(MoEError, match="group = None, max_tokens_per_rank = None; pass both"):
        make_emulated(config, MoEParallelConfig(ep_size=2), UNQUANTIZED, None, ExpertPlacement.LINEAR)


def test_the_emulation_refuses_what_the_library_does_not_survive():
    def work(group: Any) -> None:
        library = emulated_library("1.4.0")
        raw = library.module.Buffer(rank=0, explicitly_destroy=True, tcp_store_group=library.prefixed("x", group.store))
        raw.update_memory_buffers(1, E, limits_bytes(raw))
        raw.connect_ranks([0])
        x, ids = torch.randn(4, 2048).bfloat16(), torch.arange(12, dtype=torch.int32).view(4, 3) % E
        good = {"x": x, "topk_idx": ids, "num_max_dispatch_tokens_per_rank": 8, "num_experts": E, "use_fp8": False}
        for bad in (
            {"x": x.float()},
            {"x": x[:, :2000].contiguous()},
            {"x": x.T.contiguous().T},
            {"topk_idx": ids.long()},
            {"topk_idx": ids + E},
            {"topk_idx": torch.zeros_like(ids)},
            {"num_max_dispatch_tokens_per_rank": 3},
            {"num_max_dispatch_tokens_per_rank": 6},
            {"num_experts": E + 1},
        ):
            with pytest.raises(AssertionError):
                raw.low_latency_dispatch(**(good | bad))
        held = [raw.low_latency_dispatch(**good) for _ in range(2)]
        with pytest.raises(AssertionError, match="third"):
            raw.low_latency_dispatch(**good)
        handle, weights, y = held[0][2], torch.rand(4, 3), torch.zeros(E, 8, 2048).bfloat16()
        for bad_ids in (ids.roll(1, 0), ids.long()):
            with pytest.raises(AssertionError, match="other ids"):
                raw.low_latency_combine(y, bad_ids, weights, handle)
        raw.low_latency_combine(y, ids, weights, handle)
        with pytest.raises(AssertionError, match="once"):
            raw.low_latency_combine(y, ids, weights, handle)

    def limits_bytes(raw: Any) -> int:
        return raw.get_low_latency_buffer_size_hint(8, 2048, 1, E)

    run_on_ranks(1, work)
