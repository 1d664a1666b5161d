"""An emulation of MoRI in plain torch on a CPU, so that the adapter runs on virtual ranks and on gloo processes.

It is no MoRI: it follows the semantics that its documentation and sources give, and nothing here has seen an AMD GPU.
What it has of MoRI's ways, because adapters stumble over them: received rows, ids, weights and the combined rows lie in
single buffers that the next call overwrites, in no particular order, with old content behind them; ids come as they
were sent, other ranks' and all; the counter of received rows is reset by the combine; the combine goes by the sender's
own ids and weighs nothing; an empty tensor of scales counts as none; before version 1.2.1, -1 was sent to rank 0.
Where MoRI's kernels wait for a missing rank for ever, the emulation's collectives end with the group's own error.

As a plugin it registers the dispatch `mori_emulated`: `moe_core.register_plugin(moe_mori.emulation)`.

Shape letters: T tokens · H hidden · E_l local experts · K top-k · W ranks · M the largest T of any rank · R = W · M.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import attrs
import torch

from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.hookspecs import hookimpl
from moe_core.interfaces import Group
from moe_core.quant import QuantScheme
from moe_core.types import ExpertPlacement
from moe_mori import limits
from moe_mori.library import Library
from moe_mori.plugin import MORI
from moe_mori.prepare_finalize import MoriPrepareAndFinalize, make

moe_core_api = (1, 0)

NEWEST = (1, 2, 2)
_JUNK_ID = 0x7FFF
_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float4_e2m1fn_x2)


class EpDispatchCombineKernelType(enum.Enum):
    IntraNode = 0


@dataclasses.dataclass
class OldConfig:
    """The fields of `EpDispatchCombineConfig` up to 1.2.0."""

    data_type: torch.dtype
    rank: int
    world_size: int
    hidden_dim: int
    scale_dim: int
    scale_type_size: int
    max_token_type_size: int
    max_num_inp_token_per_rank: int
    num_experts_per_rank: int
    num_experts_per_token: int
    warp_num_per_block: int = 8
    block_num: int = 80
    use_external_inp_buf: bool = True
    kernel_type: EpDispatchCombineKernelType = EpDispatchCombineKernelType.IntraNode
    gpu_per_node: int = 8
    rdma_block_num: int = 0
    num_qp_per_pe: int = 1


@dataclasses.dataclass
class Config(OldConfig):
    """Those of 1.2.1 and later."""

    quant_type: str = "none"
    max_total_recv_tokens: int = 0


@attrs.frozen(eq=False)
class _Routing:
    """What a dispatch leaves for its combine.

    Attributes:
        ids: int32 `[T, K]`, this rank's own.
        row_of: (source rank, token) → row, among the received.
    """

    ids: torch.Tensor
    row_of: dict[tuple[int, int], int]


class OldOperator:
    """The calls of `mori.ops.EpDispatchCombineOp` up to 1.2.0, over a group's collectives."""

    skips_dropped = False

    def __init__(self, config: OldConfig, *, group: Callable[[], Group]) -> None:
        ranks = config.world_size
        if config.gpu_per_node & (config.gpu_per_node - 1) or ranks % config.gpu_per_node:
            raise ValueError(f"gpu_per_node = {config.gpu_per_node} for {ranks} ranks")
        if config.num_experts_per_token > limits.MAX_TOPK or ranks > limits.MAX_RANKS:
            raise ValueError(f"{config.num_experts_per_token} experts per token, {ranks} ranks")
        self.config, self._group = config, group
        rows, most = ranks * config.max_num_inp_token_per_rank, config.max_num_inp_token_per_rank
        width = config.hidden_dim * config.max_token_type_size
        self._out = torch.full((rows, width), 0xFF, dtype=torch.uint8)  # NaN, in every format there is
        self._weights = torch.full((rows, config.num_experts_per_token), torch.nan)
        self._scales = torch.full((rows, config.scale_dim * config.scale_type_size), 0xFF, dtype=torch.uint8)
        self._ids = torch.full((rows, config.num_experts_per_token), _JUNK_ID, dtype=torch.int32)
        self._total = torch.zeros(1, dtype=torch.int32)
        self._combined = torch.full((most, width), 0xFF, dtype=torch.uint8)
        self._last: _Routing | None = None
        self._calls = 0
        _gather(group(), "made")  # its constructor holds host barriers

    def dispatch(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int = -1,
        rdma_block_num: int = -1,
        warp_per_block: int = -1,
    ) -> tuple[Any, ...]:
        self._dispatch(input, weights, scales, indices)
        return self._received(input, scales)

    def combine(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int = -1,
        rdma_block_num: int = -1,
        warp_per_block: int = -1,
        use_external_inp_buf: int = -1,
        call_reset: bool = False,
    ) -> tuple[torch.Tensor, None]:
        assert self._last is not None, "combine without a dispatch"
        return self._combine(input, weights, indices, self._last)

    def reset(self) -> None:
        """Forget a dispatch whose combine will not come."""
        self._total.zero_()
        self._last = None

    def _dispatch(
        self, x: torch.Tensor, weights: torch.Tensor | None, scales: torch.Tensor | None, ids: torch.Tensor
    ) -> None:
        config = self.config
        if ids.dtype != torch.int32 or x.dtype not in _DTYPES:
            raise TypeError(f"indices {ids.dtype}, input {x.dtype}")
        if not (x.is_contiguous() and ids.is_contiguous()) or ids.shape[1] != config.num_experts_per_token:
            raise ValueError(f"input {tuple(x.shape)} {x.stride()}, indices {tuple(ids.shape)} {ids.stride()}")
        if not x.shape[0] == ids.shape[0] <= config.max_num_inp_token_per_rank:
            raise ValueError(f"{x.shape[0]} tokens, max_num_inp_token_per_rank = {config.max_num_inp_token_per_rank}")
        if self._last is not None:
            raise RuntimeError("a dispatch before the combine of the last one")
        carried = None if scales is None or not scales.numel() else _bytes(scales)
        everyone = _gather(self._group(), (_bytes(x), weights, carried, ids.clone()))
        rows = [
            (rank, token)
            for rank, (_, _, _, theirs) in enumerate(everyone)
            for token in range(theirs.shape[0])
            if config.rank in self._owners(theirs[token].tolist())
        ]
        order = torch.Generator().manual_seed(self._calls * 1013 + config.rank)
        shuffled = [rows[i] for i in torch.randperm(len(rows), generator=order).tolist()]
        self._calls += 1
        out = self._rows(x)
        for row, (rank, token) in enumerate(shuffled):
            sent, sent_weights, sent_scales, sent_ids = everyone[rank]
            out[row] = sent[token]
            self._ids[row] = sent_ids[token]
            if sent_weights is not None:
                self._weights[row] = sent_weights[token]
            if sent_scales is not None:
                self._scales[row] = sent_scales[token]
        self._total.fill_(len(rows))
        self._last = _Routing(ids.clone(), {source: row for row, source in enumerate(shuffled)})

    def _received(self, x: torch.Tensor, scales: torch.Tensor | None) -> tuple[Any, ...]:
        """Views of the buffers, in the dtypes of what was sent."""
        out_scales = None
        if scales is not None and scales.numel() and self.config.scale_dim:
            out_scales = self._scales.view(scales.dtype)
        return self._rows(x).view(x.dtype), self._weights, out_scales, self._ids, self._total

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """The receive buffer as rows of the width of `x`, in bytes."""
        width = x.shape[1] * x.dtype.itemsize
        return self._out.flatten()[: self._out.shape[0] * width].view(-1, width)

    def _combine(
        self, y: torch.Tensor, weights: torch.Tensor | None, ids: torch.Tensor, routing: _Routing
    ) -> tuple[torch.Tensor, None]:
        assert weights is None, "weights are for training, and not emulated"
        if ids.shape != routing.ids.shape or not torch.equal(ids, routing.ids):
            raise ValueError(f"indices {tuple(ids.shape)} are not those of this rank's dispatch")
        if not y.is_contiguous() or y.shape[0] < int(self._total):
            raise ValueError(f"input {tuple(y.shape)} for {int(self._total)} received rows")
        config = self.config
        everyone = _gather(self._group(), (y.clone(), routing.row_of))
        out = self._combined.view(y.dtype)
        for token in range(ids.shape[0]):
            total = torch.zeros(config.hidden_dim)
            for rank in self._owners(ids[token].tolist()):
                rows, row_of = everyone[rank]
                total += rows[row_of[config.rank, token]].float()
            out[token] = total.to(y.dtype)
        self.reset()  # MoRI's combine does so, too
        return out, None

    def _owners(self, ids: list[int]) -> list[int]:
        """The ranks of a row's ids, each once, in the order in which they come."""
        config = self.config
        experts = config.world_size * config.num_experts_per_rank
        valid = [e for e in ids if e < experts and (e >= 0 or not self.skips_dropped)]
        return list(dict.fromkeys(int(e / config.num_experts_per_rank) for e in valid))


class Operator(OldOperator):
    """The same from 1.2.1 on: routing handles, and ids that are no expert's are skipped."""

    skips_dropped = True

    def dispatch(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int = -1,
        rdma_block_num: int = -1,
        warp_per_block: int = -1,
        call_local_expert_count: bool = False,
        *,
        routing: _Routing | None = None,
        return_routing: bool = False,
    ) -> tuple[Any, ...]:
        assert routing is None, "a dispatch by an old routing is not emulated"
        self._dispatch(input, weights, scales, indices)
        received = self._received(input, scales)
        return (*received, self._last) if return_routing else received

    def combine(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int = -1,
        rdma_block_num: int = -1,
        warp_per_block: int = -1,
        use_external_inp_buf: int = -1,
        call_reset: bool = False,
        *,
        routing: _Routing | None = None,
    ) -> tuple[torch.Tensor, None]:
        assert self._last is not None, "combine without a dispatch"
        return self._combine(input, weights, indices, routing or self._last)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `[N, …]` as uint8 `[N, bytes of a row]`."""
    return tensor.contiguous().view(torch.uint8).clone()


def _gather(group: Group, mine: Any) -> list[Any]:
    """What every rank brought, in rank order."""
    packed = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
    with getattr(group, "emulating", contextlib.nullcontext)():  # the library moves other bytes, by other means
        sizes = group.all_gather(torch.tensor([packed.shape[0]])).tolist()
        parts = group.all_gather(packed, sizes).split(sizes)
    return [pickle.loads(part.numpy().tobytes()) for part in parts]


class _Ops:
    """In the place of `mori.ops`."""

    EpDispatchCombineKernelType = EpDispatchCombineKernelType

    def __init__(self, group: Callable[[], Group], version: limits.Version) -> None:
        new = limits.skips_dropped_ids(version)
        self.EpDispatchCombineConfig = Config if new else OldConfig
        self.EpDispatchCombineOp = functools.partial(Operator if new else OldOperator, group=group)


class _Shmem:
    """In the place of `mori.shmem`."""

    MORI_SHMEM_INIT_WITH_UNIQUEID = 1

    def shmem_get_unique_id(self) -> bytes:
        return b"emulated".ljust(128, b"\0")

    def shmem_init_attr(self, flags: int, rank: int, nranks: int, unique_id: bytes) -> int:
        assert unique_id == self.shmem_get_unique_id()
        return 0

    def shmem_finalize(self) -> int:
        return 0


_libraries: weakref.WeakKeyDictionary[Group, dict[limits.Version, Library]] = weakref.WeakKeyDictionary()


def emulated_library(group: Group, version: limits.Version = NEWEST) -> Library:
    """The emulation for one rank, with the ways of a version: before or from 1.2.1 on."""
    made = _libraries.setdefault(group, {})
    if version not in made:
        alive: Any = weakref.ref(group)  # or the group would never be freed
        made[version] = Library(
            _Ops(alive, version), _Shmem(), "emulation of mori", version, torch.device("cpu"), 80, unbounded=False
        )
    return made[version]


def make_emulated(
    config: MoEConfig,
    parallel: MoEParallelConfig,
    scheme: QuantScheme,
    group: Group | None,
    placement: ExpertPlacement,
    *,
    version: limits.Version = NEWEST,
) -> MoriPrepareAndFinalize:
    """The adapter over the emulation."""
    library = None if group is None else emulated_library(group, version)
    return make(config, parallel, scheme, group, placement, library=library)


def capabilities(version: limits.Version = NEWEST) -> Any:
    """What the adapter declares with that version, for tensors on a CPU."""
    return attrs.evolve(
        MORI,
        device_types=frozenset({"cpu"}),
        graph_capturable=False,
        accepts_dropped_ids=limits.skips_dropped_ids(version),
    )


@hookimpl
def moe_core_register_prepare_finalize(register: Callable[..., None]) -> None:
    register("mori_emulated", make_emulated, capabilities(), priority=-1000)
