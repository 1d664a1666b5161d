"""An emulation of NIXL EP in plain torch on a CPU, so that the adapter runs on virtual ranks and on gloo processes.

It is no NIXL: it follows the library's documented contract and its kernels' arithmetic, and imports none of it. What it
has of the library's ways, because adapters stumble over them: rows arrive in no particular order; what is past the
counts is NaN; results are not there before they are waited for; two halves and no more; a buffer that ends takes the
mappings of the others with it; memory that torch fills is lost; whatever the kernels answer with a lost process is
refused; a rank that does not answer in time is masked, its rows count as nothing from then on, and it masks those that
masked it.

As a plugin it registers the dispatch `nixl_ep_emulated`: `moe_core.register_plugin(moe_nixl_ep.emulation)`.

Shape letters: T tokens · H hidden · E_l local experts · K top-k · W ranks · S slots per (source rank, local expert) ·
C = S · W.
"""

from __future__ import annotations

import functools
import pickle
import threading
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import attrs
import torch

from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.hookspecs import hookimpl
from moe_core.interfaces import Group
from moe_core.quant import QuantScheme
from moe_core.types import ExpertPlacement
from moe_nixl_ep import limits
from moe_nixl_ep.library import DETERMINISM, Library
from moe_nixl_ep.plugin import NIXL_EP
from moe_nixl_ep.prepare_finalize import NixlEPPrepareAndFinalize, make

moe_core_api = (1, 0)

NEWEST = "1.5.1"


class EventOverlap:
    """The library's event: the results exist once the current stream waits for it."""

    def __init__(self, receive: Callable[[], None] | None) -> None:
        self._receive = receive

    def current_stream_wait(self) -> None:
        assert self._receive is not None, "the event is there with async_finish = True only"
        receive, self._receive = self._receive, lambda: None
        receive()


@attrs.define(eq=False)
class _Flight:
    """A dispatch whose combine is to come.

    Attributes:
        ids: what the combine must be given again.
        source: the first tensor of its handle; dead: nobody holds that handle any more.
    """

    ids: torch.Tensor
    source: weakref.ReferenceType[torch.Tensor]


@attrs.define
class _Process:
    """What the buffers of one process share.

    Attributes:
        ends: how many were destroyed. Each takes with it what the process has mapped of its peers' memory.
    """

    ends: int = 0


class _Here(threading.local):
    """A virtual rank is a thread, and stands for a process."""

    def __init__(self) -> None:
        self.process = _Process()


_here = _Here()


class Buffer:
    """The calls of `nixl_ep.Buffer` in low-latency mode, over any store with `set`, `get` and `wait`."""

    version: limits.Version = limits.parse_version(NEWEST)
    topk_idx_t: torch.dtype = torch.int32

    def __init__(
        self,
        disable_ll_nvlink: bool = False,
        explicitly_destroy: bool = False,
        rank: int = 0,
        low_latency_mode: bool = True,
        group: Any = None,
        comm: Any = None,
        tcp_store_group: Any = None,
        timeout_ms: int = 30_000,
    ) -> None:
        assert low_latency_mode, "the high-throughput mode is for more than 8 ranks"
        self.rank, self._store, self._timeout = rank, tcp_store_group, timedelta(milliseconds=timeout_ms)
        self._explicitly_destroy = explicitly_destroy
        self._calls = 0
        self._flights: list[_Flight] = []
        self._masked: set[int] = set()
        self._ranks = self._experts_per_rank = 0
        self._destroyed = False
        self._process = _here.process
        self._ends = 0

    @staticmethod
    def get_low_latency_buffer_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        return limits.buffer_bytes(num_max_dispatch_tokens_per_rank, hidden, num_experts)

    def update_memory_buffers(
        self, num_ranks: int, num_experts_per_rank: int, num_rdma_bytes: int, num_nvl_bytes: int = 0
    ) -> None:
        assert not self._ranks, "memory is allocated once"
        assert num_rdma_bytes > 0 and num_rdma_bytes % 128 == 0, f"num_rdma_bytes = {num_rdma_bytes}"
        assert num_ranks < 8 or num_ranks % 8 == 0, f"num_ranks = {num_ranks}"
        self._ranks, self._experts_per_rank, self._bytes = num_ranks, num_experts_per_rank, num_rdma_bytes
        self._masked = set(range(num_ranks)) - {self.rank}

    def connect_ranks(self, remote_ranks: list[int], activate: bool = True) -> None:
        """Waits for every rank. (The library's own wait, once the metadata are there, has no timeout.)"""
        self._store.set(f"NIXL_EP/{self.rank}", b"connected")
        self._store.wait([f"NIXL_EP/{rank}" for rank in remote_ranks], self._timeout)
        self._ends = self._process.ends
        if activate:
            self._masked -= set(remote_ranks)

    def query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        assert mask_status.dtype == torch.int32 and mask_status.shape == (self._ranks,)
        mask_status.copy_(torch.tensor([int(rank in self._masked) for rank in range(self._ranks)]))

    def destroy(self) -> None:
        assert self._explicitly_destroy and not self._destroyed
        self._destroyed = True
        self._process.ends += 1

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, torch.Tensor, tuple[Any, ...], EventOverlap, Callable[[], None] | None]:
        slots, hidden = num_max_dispatch_tokens_per_rank, x.shape[1]
        self._check_dispatch(x, topk_idx, slots, num_experts)
        assert not use_ue8m0, "packed UE8M0 scales are not emulated"
        assert not (async_finish and return_recv_hook), "the two exclude each other"
        self._flights = [flight for flight in self._flights if flight.source() is not None]
        assert len(self._flights) < 2, "a third result: the library has two halves"
        payload = quantize(x, round_scale) if use_fp8 else (x.clone(), None)
        receive_rows = self._exchange("dispatch", (_plain(payload[0]), payload[1], topk_idx.clone()))
        shape = (self._experts_per_rank, self._ranks * slots)
        rows = torch.full((*shape, hidden), torch.nan, dtype=payload[0].dtype)
        scales = None
        if use_fp8:  # column-major, as the kernels write them
            scales = torch.full((shape[0], hidden // limits.SCALE_GROUP, shape[1]), torch.nan).transpose(1, 2)
        counts = torch.full((shape[0],), -1, dtype=torch.int32)
        source = torch.full(shape, -1, dtype=torch.int32)
        layout = torch.zeros(shape[0], self._ranks, dtype=torch.int64)
        self._flights.append(_Flight(topk_idx.clone(), weakref.ref(source)))

        def receive() -> None:
            self._unpack(receive_rows(), rows, scales, counts, source, layout)

        handle: tuple[Any, ...] = (source, layout, slots, hidden)
        if self.version < (1, 3):
            handle += (num_experts,)
        event, hook = _finish(receive, async_finish, return_recv_hook)
        return (rows, scales) if use_fp8 else rows, counts, handle, event, hook

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Callable[[], None] | None]:
        assert not use_logfmt and not zero_copy, "not emulated"
        self._check_mapped()
        source, layout, slots, hidden = handle[:4]
        assert len(handle) == (5 if self.version < (1, 3) else 4), f"a handle of {len(handle)} is of another version"
        assert x.dtype == torch.bfloat16 and x.is_contiguous(), "rows are bf16 and contiguous"
        _check_address(x)
        assert x.shape == (self._experts_per_rank, self._ranks * slots, hidden), f"rows are {tuple(x.shape)}"
        assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
        assert topk_weights.shape == topk_idx.shape
        flight = next((flight for flight in self._flights if flight.source() is source), None)
        assert flight is not None, "a combine for each dispatch, once"
        assert topk_idx.dtype == self.topk_idx_t and torch.equal(flight.ids, topk_idx), "other ids than were dispatched"
        self._flights.remove(flight)
        combined = torch.empty(topk_idx.shape[0], hidden, dtype=torch.bfloat16) if out is None else out
        assert combined.is_contiguous() and combined.dtype == torch.bfloat16
        assert combined.shape == (topk_idx.shape[0], hidden)
        _check_address(combined)
        receive_rows = self._exchange("combine", (x.clone(), source, layout))
        weights, ids = topk_weights.clone(), flight.ids

        def receive() -> None:
            combined.copy_(self._sum(receive_rows(), ids, weights, hidden))

        event, hook = _finish(receive, async_finish, return_recv_hook)
        return combined, event, hook

    def _check_mapped(self) -> None:
        """The UCX in wheel 1.4.0 (1.22.0) unmaps a peer as a whole when any connection to it ends."""
        assert not self._destroyed
        assert self._ends == self._process.ends, (
            "an illegal address: a buffer that has ended unmapped the peers' memory"
        )

    def _check_dispatch(self, x: torch.Tensor, ids: torch.Tensor, slots: int, num_experts: int | None) -> None:
        """What the library asserts on the host or on the device."""
        bound, known = self._ranks * self._experts_per_rank, limits.limits_of(self.version)
        self._check_mapped()
        fills = torch.are_deterministic_algorithms_enabled() and DETERMINISM.fill_uninitialized_memory
        assert not fills, "torch would fill what is allocated here while the kernel, on another stream, writes it"
        assert x.dtype == torch.bfloat16 and x.is_contiguous(), "x is bf16 and contiguous"
        _check_address(x)
        assert x.shape[1] in known.hidden_sizes, f"hidden size {x.shape[1]}"
        assert x.shape[0] == ids.shape[0] <= slots <= limits.MAX_TOKENS, f"{x.shape[0]} tokens, {slots} slots"
        assert self._ranks * slots % 4 == 0, f"{self._ranks} ranks of {slots} slots"
        assert limits.buffer_bytes(slots, x.shape[1], bound) <= self._bytes, "the buffer is too small"
        assert ids.dtype == self.topk_idx_t and ids.is_contiguous(), f"ids are {ids.dtype}"
        assert ids.shape[1] <= known.max_topk, f"K = {ids.shape[1]}"
        assert not ids.numel() or int(ids.max()) < bound, "an id beyond the experts loses the process"
        assert num_experts == bound or (num_experts is None and self.version >= (1, 3)), f"num_experts = {num_experts}"
        ordered = ids.sort(dim=1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        assert not bool(twice.any()), "a row that holds an id twice runs past its slots"

    def _exchange(self, stage: str, mine: Any) -> Callable[[], list[Any]]:
        """Send to every rank that is not masked; the result receives, None from those that are masked or don't come."""
        number, self._calls = self._calls, self._calls + 1
        self._store.set(f"{number}/{self.rank}", pickle.dumps((stage, sorted(self._masked), mine)))

        def receive() -> list[Any]:
            theirs = [self._from(rank, number, stage) for rank in range(self._ranks)]
            return theirs

        return receive

    def _from(self, rank: int, number: int, stage: str) -> Any:
        if rank in self._masked:
            return None
        try:
            self._store.wait([f"{number}/{rank}"], self._timeout)
        except (RuntimeError, TimeoutError):  # as torch's stores and virtual ones say it
            self._masked.add(rank)
            return None
        theirs, masked, message = pickle.loads(self._store.get(f"{number}/{rank}"))
        if self.rank in masked:  # it sends to this rank no longer, which waits in vain
            self._masked.add(rank)
            return None
        assert theirs == stage, f"as call {number}, rank {self.rank} came to {stage} and rank {rank} to {theirs}"
        return message

    def _unpack(
        self,
        messages: Sequence[Any],
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        counts: torch.Tensor,
        source: torch.Tensor,
        layout: torch.Tensor,
    ) -> None:
        """A block of rows for each source rank; blocks, and rows within one, are shuffled as atomics would."""
        order = torch.Generator().manual_seed(self._calls * 1009 + self.rank)
        for expert in range(self._experts_per_rank):
            begin = 0
            for rank in torch.randperm(self._ranks, generator=order).tolist():
                if messages[rank] is None:
                    layout[expert, rank] = begin << 32
                    continue
                sent, sent_scales, ids = messages[rank]
                tokens = (ids == self.rank * self._experts_per_rank + expert).any(dim=1).nonzero().flatten()
                tokens = tokens[torch.randperm(len(tokens), generator=order)]
                end = begin + len(tokens)
                _plain(rows)[expert, begin:end] = sent[tokens]
                if scales is not None:
                    scales[expert, begin:end] = sent_scales[tokens]
                source[expert, begin:end] = tokens.to(torch.int32)
                layout[expert, rank] = (begin << 32) | len(tokens)
                begin = end
            counts[expert] = begin

    def _sum(self, messages: Sequence[Any], ids: torch.Tensor, weights: torch.Tensor, hidden: int) -> torch.Tensor:
        """fp32 fused multiply-adds in the order of K; choices of masked ranks' experts count as nothing."""
        tokens, top_k = ids.shape
        total = torch.zeros(tokens, hidden)
        for k in range(top_k):
            for token in range(tokens):
                rank, expert = divmod(int(ids[token, k]), self._experts_per_rank)
                if rank < 0 or messages[rank] is None:
                    continue
                y, source, layout = messages[rank]
                begin, count = divmod(int(layout[expert, self.rank]), 1 << 32)
                row = begin + source[expert, begin : begin + count].tolist().index(token)
                total[token] = fused_multiply_add(y[expert, row], weights[token, k], total[token])
        return total.to(torch.bfloat16)


def fused_multiply_add(row: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """fp32 total + row · weight, rounded once: the product of a bf16 and an fp32 is exact in fp64."""
    return (row.double() * weight.double() + total.double()).float()


def quantize(x: torch.Tensor, round_scale: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The library's own fp8 formula: `[T, H]` → e4m3 `[T, H]` and fp32 scales `[T, H / 128]`."""
    groups = x.float().unflatten(1, (-1, limits.SCALE_GROUP))
    amax = groups.abs().amax(-1).clamp(min=1e-4)
    scale = amax * torch.tensor(1 / 448, dtype=torch.float32)
    inverse = torch.full_like(amax, 448) / amax  # a plain 448 would multiply by the reciprocal
    if round_scale:
        mantissa, exponent = torch.frexp(scale)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        one = torch.ones_like(scale)
        scale, inverse = torch.ldexp(one, exponent), torch.ldexp(one, -exponent)
    q = (groups * inverse.unsqueeze(-1)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return q.flatten(1), scale


def _check_address(rows: torch.Tensor) -> None:
    assert rows.data_ptr() % 16 == 0, f"rows at {rows.data_ptr():#x}: kernels move 16 bytes at once"


def _plain(rows: torch.Tensor) -> torch.Tensor:
    """fp8 as bytes: it can't be pickled, nor written by index."""
    return rows.view(torch.uint8) if rows.dtype.itemsize == 1 else rows


def _finish(
    receive: Callable[[], None], async_finish: bool, return_recv_hook: bool
) -> tuple[EventOverlap, Callable[[], None] | None]:
    """Receive when the caller says so; by default at once."""
    if return_recv_hook:
        return EventOverlap(None), receive
    if async_finish:
        return EventOverlap(receive), None
    receive()
    return EventOverlap(None), None


class _Prefixed:
    """What `torch.distributed.PrefixStore` does, for stores of any kind."""

    def __init__(self, prefix: str, store: Any) -> None:
        self._prefix, self._store = prefix, store

    def set(self, key: str, value: bytes) -> None:
        self._store.set(f"{self._prefix}/{key}", value)

    def get(self, key: str) -> bytes:
        value: bytes = self._store.get(f"{self._prefix}/{key}")
        return value

    def wait(self, keys: Sequence[str], timeout: timedelta) -> None:
        self._store.wait([f"{self._prefix}/{key}" for key in keys], timeout)


class _Module:
    """In the place of the library's module."""

    def __init__(self, version: limits.Version) -> None:
        self.topk_idx_t = torch.int32 if version >= (1, 4) else torch.int64
        self.Buffer = type("Buffer", (Buffer,), {"version": version, "topk_idx_t": self.topk_idx_t})


@functools.cache
def emulated_library(version: str = NEWEST) -> Library:
    """The emulation, with the ways of a version: 1.1.0 to 1.5.1."""
    parsed = limits.parse_version(version)
    name = "emulation of nixl_ep" + ("" if parsed < (1, 3) else "_cu13")
    return Library(_Module(parsed), name, parsed, _Prefixed, torch.device("cpu"), unbounded=False)


def make_emulated(
    config: MoEConfig,
    parallel: MoEParallelConfig,
    scheme: QuantScheme,
    group: Group | None,
    placement: ExpertPlacement,
    *,
    version: str = NEWEST,
) -> NixlEPPrepareAndFinalize:
    """The adapter over the emulation."""
    return make(config, parallel, scheme, group, placement, library=emulated_library(version))


def capabilities(version: str = NEWEST) -> Any:
    """What the adapter declares with that version, for tensors on a CPU."""
    known = limits.limits_of(limits.parse_version(version))
    return attrs.evolve(
        NIXL_EP,
        device_types=frozenset({"cpu"}),
        min_compute_capability=None,
        graph_capturable=False,
        refuse=lambda problem: limits.refuse(problem, known),
        footprint=lambda problem, payload, tokens: limits.footprint(problem, payload, tokens, known),
    )


@hookimpl
def moe_core_register_prepare_finalize(register: Callable[..., None]) -> None:
    register("nixl_ep_emulated", make_emulated, capabilities(), priority=-1000)
