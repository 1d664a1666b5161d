"""What moe-symm must give, in plain torch: every rank draws every rank's tokens and experts' rows, and so knows all.

Shape letters: T tokens on this rank · M the largest T · H hidden · E experts · E_l local experts · C = W · M row
capacity · K top-k · W ranks · R = W · M.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from moe_core import formats
from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.expert_map import ExpertMapManager
from moe_core.group import TorchGroup
from moe_core.quant import UNQUANTIZED, QuantScheme, QuantSpec, ScaleFormat
from moe_core.types import MODEL_DTYPE_PAYLOAD, Dispatched, ExpertPlacement, Routing
from moe_symm.layout import LANES, Form
from moe_symm.limits import FP8_PAYLOADS
from moe_symm.peers import connect
from moe_symm.prepare_finalize import make

DEVICE = "cuda"


@attrs.frozen
class Shape:
    """A layer: what `MoEConfig` wants to know, the form of the dispatch, and how rows are quantized on the wire."""

    hidden: int
    experts: int = 256
    top_k: int = 8
    tokens: int = 128
    dtype: torch.dtype = torch.bfloat16
    placement: ExpertPlacement = ExpertPlacement.LINEAR
    form: Form = Form.STANDARD
    scales: ScaleFormat | None = None

    def __str__(self) -> str:
        wire = f"fp8 {self.scales.value}" if self.scales else str(self.dtype).removeprefix("torch.")
        return f"{self.form.value}, {wire}, H {self.hidden}, E {self.experts}, K {self.top_k}, M {self.tokens}"

    @property
    def config(self) -> MoEConfig:
        return MoEConfig(
            num_experts=self.experts,
            top_k=self.top_k,
            hidden_size=self.hidden,
            intermediate_size=64,
            max_tokens_per_rank=self.tokens,
            dtype=self.dtype,
        )

    @property
    def scheme(self) -> QuantScheme:
        if self.scales is None:
            return UNQUANTIZED
        name = next(name for name, scales in FP8_PAYLOADS.items() if scales is self.scales)
        return QuantScheme(name, activation=QuantSpec("float8_e4m3fn", (1, 128), self.scales, dynamic=True))


@attrs.frozen(eq=False)
class Batch:
    """A step of all ranks: `[W, M, H]`, ids `[W, M, K]`, weights `[W, M, K]`, and how many tokens each rank has."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    sizes: list[int]


class Reference:
    """One shape over all ranks, and the backend that it is compared with."""

    def __init__(self, group: TorchGroup, shape: Shape) -> None:
        self.group, self.shape, self.rank, self.size = group, shape, group.rank, group.size
        parallel = MoEParallelConfig.fold(dp_size=group.size, dp_rank=group.rank, expert_parallel=True)
        arguments = (shape.config, parallel, shape.scheme, group, shape.placement)
        self.backend = make(*arguments, connect=connect, form=shape.form)
        self.payload = MODEL_DTYPE_PAYLOAD if shape.scales is None else shape.scheme.name
        self.generator = torch.Generator(DEVICE).manual_seed(7)
        managers = [ExpertMapManager(shape.experts, group.size, rank, shape.placement) for rank in range(group.size)]
        self.local = torch.stack([manager.expert_map(DEVICE) for manager in managers])
        self.held = [len(manager.local_experts) for manager in managers]
        self.x = self._draw(group.size, shape.tokens, shape.hidden)
        rows = group.size * shape.tokens
        self.y = [
            self._draw(*((rows,) if shape.form is Form.STANDARD else (held, rows)), shape.hidden) for held in self.held
        ]

    def _draw(self, *extents: int) -> torch.Tensor:
        return torch.randn(*extents, generator=self.generator, device=DEVICE, dtype=self.shape.dtype)

    def _rand(self, *extents: int) -> torch.Tensor:
        return torch.rand(*extents, generator=self.generator, device=DEVICE)

    def batch(self, sizes: list[int], dropped: float = 0.1) -> Batch:
        """Random choices, some of them -1."""
        shape = self.shape
        weights, ids = self._rand(self.size, shape.tokens, shape.experts).topk(shape.top_k, dim=-1)
        gone = self._rand(*ids.shape) < dropped
        return Batch(self.x, ids.masked_fill(gone, -1).to(torch.int32), weights, sizes)

    def poison(self) -> None:
        """NaN wherever a step must not read before it has been written."""
        torch.cuda.synchronize()
        self.group.barrier()
        layout, memory = self.backend.layout, self.backend._connection
        ends = dict(zip(layout.offsets, [*list(layout.offsets.values())[1:], 0], strict=True))
        for lane in range(LANES):
            for name in ("weights", "rows", "scales", "sums", "places"):
                memory.area(lane, name, torch.uint8, ends[name] - layout.offsets[name]).fill_(255)
        torch.cuda.synchronize()
        self.group.barrier()

    def _own(self, batch: Batch) -> tuple[torch.Tensor, Routing]:
        own = slice(batch.sizes[self.rank])
        return batch.x[self.rank, own], Routing(batch.ids[self.rank, own], batch.weights[self.rank, own])

    def prepare(self, batch: Batch) -> Dispatched:
        x, routing = self._own(batch)
        named: dict[str, Any] = {"num_experts": self.shape.experts, "expert_map": None, "payload": self.payload}
        return self.backend.prepare(x, routing, **named)

    def prepare_start(self, batch: Batch) -> Callable[[], Dispatched]:
        x, routing = self._own(batch)
        named: dict[str, Any] = {"num_experts": self.shape.experts, "expert_map": None, "payload": self.payload}
        return self.backend.prepare_start(x, routing, **named)

    def finalize(
        self, batch: Batch, dispatched: Dispatched, *, poisoned: bool = False, split: bool = False
    ) -> torch.Tensor:
        """`[T, H]`; `poisoned`: rows that the experts of this rank have not got are NaN."""
        x, routing = self._own(batch)
        out, y = torch.full_like(x, torch.nan), self.y[self.rank]
        if poisoned and dispatched.tokens_per_expert is not None:
            past = torch.arange(y.shape[1], device=DEVICE) >= dispatched.tokens_per_expert[:, None]
            y = y.masked_fill(past[..., None], torch.nan)
        if split:
            self.backend.finalize_start(y, dispatched.handle, routing, out)()
        else:
            self.backend.finalize(y, dispatched.handle, routing, out)
        return out

    def _wanted(self, batch: Batch, rank: int) -> torch.Tensor:
        """What a rank gets: local ids or -1, `[R, K]`."""
        there = torch.arange(self.shape.tokens, device=DEVICE) < torch.tensor(batch.sizes, device=DEVICE)[:, None]
        wanted = torch.where(batch.ids >= 0, self.local[rank][batch.ids.clamp(min=0).long()], -1)
        return in_rows(wanted.masked_fill(~there[..., None], -1))

    def _places(self, wanted: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of each expert in their order: `[R, K]`, where in `[E_l · C]` or -1, and counts `[E_l]`."""
        chosen = (wanted[None] == torch.arange(experts, device=DEVICE)[:, None, None]).any(-1)
        slot = chosen.int().cumsum(1) - 1
        rows = torch.arange(len(wanted), device=DEVICE)[:, None]
        where = wanted.clamp(min=0).long()
        return torch.where(wanted >= 0, where * len(wanted) + slot[where, rows], -1), chosen.sum(1)

    def wrong_arrivals(self, batch: Batch, got: Dispatched) -> torch.Tensor:
        """How many elements of what `prepare` gave are not what was sent here; on the device."""
        wanted = self._wanted(batch, self.rank)
        here = wanted >= 0
        x, scale = in_rows(batch.x), None
        if self.shape.scales is not None:
            spec = self.shape.scheme.activation
            assert spec is not None
            x, scale = formats.quantize(x, spec)
        if self.shape.form is Form.STANDARD:
            assert got.topk_ids is not None
            assert got.topk_weights is not None
            wrong = (got.topk_ids != wanted).sum()
            wrong += (got.num_rows != self.size * max(batch.sizes)).sum()
            wrong += ((got.topk_weights != in_rows(batch.weights)) & here).sum()
            row = here.any(-1, keepdim=True)
            wrong += ((_bits(got.x) != _bits(x)) & row).sum()
            return wrong if scale is None else wrong + ((_bits(got.x_scale) != _bits(scale)) & row).sum()
        places, counts = self._places(wanted, self.held[self.rank])
        wrong = (got.tokens_per_expert != counts).sum()
        at, row = places.clamp(min=0).flatten(), here.flatten()[:, None]
        pairs = [(got.x, x)] if scale is None else [(got.x, x), (got.x_scale, scale)]
        for arrived, sent in pairs:
            assert arrived is not None
            sent = _bits(sent).repeat_interleave(self.shape.top_k, 0)
            wrong += ((_bits(arrived).flatten(0, 1)[at] != sent) & row).sum()
        return wrong

    def wrong_sums(self, batch: Batch, out: torch.Tensor) -> torch.Tensor:
        return (_bits(out) != _bits(self.expected(batch))).sum()

    def expected(self, batch: Batch) -> torch.Tensor:
        """`[T, H]`, as the form has it: sums in fp32, in the order of ranks or of choices."""
        tokens, shape = batch.sizes[self.rank], self.shape
        own = slice(self.rank, self.rank + tokens * self.size, self.size)
        _, routing = self._own(batch)
        total = torch.zeros(tokens, shape.hidden, device=DEVICE)
        if shape.form is Form.STANDARD:
            for rank, y in enumerate(self.y):
                sent = (self._wanted(batch, rank)[own] >= 0).any(1, keepdim=True)
                total = torch.where(sent, total + y[own].float(), total)
            return total.to(shape.dtype)
        places = [self._places(self._wanted(batch, rank), held)[0][own] for rank, held in enumerate(self.held)]
        if shape.form is Form.BATCHED:
            for place, y in zip(places, self.y, strict=True):
                part = torch.zeros_like(total)
                for k in range(shape.top_k):
                    part = _added(part, y, place[:, k], routing.topk_weights[:, k])
                sent = (place >= 0).any(1, keepdim=True)
                total = torch.where(sent, total + part.to(shape.dtype).float(), total)
            return total.to(shape.dtype)
        for k in range(shape.top_k):
            for place, y in zip(places, self.y, strict=True):
                total = _added(total, y, place[:, k], routing.topk_weights[:, k])
        return total.to(shape.dtype)


def in_rows(of_sources: torch.Tensor) -> torch.Tensor:
    """`[W, M, …]` as `[R, …]`, in the order in which a rank gets it."""
    return of_sources.transpose(0, 1).flatten(0, 1)


def capture(steps: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph of all steps, which run once before. Threads of other libraries may call CUDA meanwhile."""
    for step in steps:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for step in steps:
            step()
    return graph


def _bits(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def _added(total: torch.Tensor, y: torch.Tensor, place: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A fused multiply-add of the rows at `place`: the product is exact in fp64, and the sum all but always."""
    rows = y.flatten(0, 1)[place.clamp(min=0)]
    added = (rows.double() * weight[:, None].double() + total.double()).float()
    return torch.where((place >= 0)[:, None], added, total)
