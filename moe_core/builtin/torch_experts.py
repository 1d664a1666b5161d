"""Experts in plain torch: right on every device, and as fast as torch's own GEMMs on a CPU.

Shape letters: H hidden · I intermediate per rank · E_l local experts · K top-k · R received rows ·
C row capacity per local expert · S choices in one block, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import attrs
import torch

from moe_core.builtin import device_experts
from moe_core.builtin.activation import activate
from moe_core.builtin.cpu_gemm import grouped_linear, linear, native_dtypes
from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.interfaces import Experts, WorkspaceShapes
from moe_core.types import ActivationFormat, Dispatched, ExpertWeights

MAX_BLOCK_ROWS = 1024
"""Choices go through both GEMMs in blocks of this many, so that a block's activations stay in the cache and the
workspaces stay small however large R is. Fewer would repeat the fixed costs of a block, some ten operators."""

MIN_PARALLEL_ROWS = 64
"""`index_add_` with an int64 index sorts and goes parallel, which pays from here on; with int32 it is a plain loop."""

Workspaces = Mapping[str, torch.Tensor]


@attrs.frozen
class _Groups:
    """The part of each expert in a block of rows.

    Attributes:
        experts: local indices, rising, each once.
        sizes: rows of each, all > 0.
    """

    experts: list[int]
    sizes: list[int]


class TorchExperts(Experts):
    """STANDARD and BATCHED, fp32, fp16 and bf16, every activation.

    On a CPU: one sort by expert, then block by block gather, GEMM per expert, activation, GEMM per expert, and one
    addition into an fp32 sum. On other devices: see `device_experts`.
    """

    def __init__(self, config: MoEConfig, parallel: MoEParallelConfig) -> None:
        self._activation = config.activation
        self._weight_on_input = config.router_weight_on_input and config.top_k > 1  # K = 1 is done by the kernel
        self._dtype = config.dtype
        self._compute_dtype = config.dtype if config.dtype in native_dtypes() else torch.float32
        self._topk = config.top_k
        self._hidden = config.experts_hidden_size
        self._intermediate = config.intermediate_size // parallel.tp_size
        self._w13_rows = self._intermediate * (2 if config.activation.gated else 1)

    def workspace_shapes(self, rows: int, activation_format: ActivationFormat) -> WorkspaceShapes:
        """Scratch of the CPU path. A GEMM by oneDNN, and the path of other devices, allocate on top of this."""
        standard = activation_format is ActivationFormat.STANDARD
        block = min(rows * self._topk if standard else rows, MAX_BLOCK_ROWS)
        compute, fp32 = self._compute_dtype, torch.float32
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "x": ((block * self._hidden,), compute),
            "h": ((block * self._w13_rows,), compute),
            "act": ((block * self._intermediate,), compute),
            "y": ((block * self._hidden,), compute),
            "turned": ((block * max(self._w13_rows, self._hidden),), compute),
        }
        if standard and compute is not fp32:
            shapes["weighted"] = ((block * self._hidden,), fp32)
        if standard and self._dtype is not fp32:
            shapes["sum"] = ((rows, self._hidden), fp32)
        if compute is not self._dtype:
            shapes["weight"] = ((max(self._w13_rows, self._intermediate) * self._hidden,), compute)
        return shapes

    @torch.no_grad()  # `out=` refuses weights that require a gradient, and a foreign module's do
    def apply(
        self,
        dispatched: Dispatched,
        weights: ExpertWeights,
        workspaces: Workspaces,
        out: torch.Tensor,
    ) -> None:
        """See `Experts.apply`. Choices of the same expert in one row are computed one by one and add up."""
        if out.numel() == 0:
            return
        batched = dispatched.tokens_per_expert is not None
        if dispatched.x.device.type != "cpu":
            run = device_experts.apply_batched if batched else device_experts.apply_standard
            run(self._activation, self._weight_on_input, dispatched, weights, out)
        elif batched:
            self._apply_batched(dispatched, weights, workspaces, out)
        elif out.shape[0] == 1 and dispatched.num_rows is None and not self._weight_on_input:
            self._apply_one_row(dispatched, weights, workspaces, out)
        else:
            self._apply_standard(dispatched, weights, workspaces, out)

    def _apply_standard(
        self, dispatched: Dispatched, weights: ExpertWeights, ws: Workspaces, out: torch.Tensor
    ) -> None:
        ids, router_weights = dispatched.topk_ids, dispatched.topk_weights
        assert ids is not None and router_weights is not None, "STANDARD format comes with ids and weights"
        if dispatched.num_rows is not None:
            valid = int(dispatched.num_rows)  # on a CPU this waits for nothing
            ids, router_weights = ids[:valid], router_weights[:valid]
        total = out if self._dtype is torch.float32 else ws["sum"]
        total.zero_()
        flat = ids.reshape(-1)
        order = torch.sort(flat, stable=True).indices
        dropped, *counts = torch.bincount(flat + 1, minlength=1).tolist()  # -1 is counted first, and sorted first
        order = order[dropped:]
        source = order.div(ids.shape[1], rounding_mode="floor")
        if source.shape[0] < MIN_PARALLEL_ROWS:
            source = source.int()
        scale = router_weights.reshape(-1, 1)[order]
        first = 0
        for groups in _blocks(counts):
            size = sum(groups.sizes)
            source_s, scale_s1 = source.narrow(0, first, size), scale.narrow(0, first, size)
            x = self._gather(dispatched.x, source_s, ws["x"])
            if self._weight_on_input:
                x.mul_(scale_s1)
            y = self._run(groups, x, weights, ws)
            total.index_add_(0, source_s, self._weigh(y, scale_s1, ws))
            first += size
        if total is not out:
            out.copy_(total)

    def _apply_one_row(self, dispatched: Dispatched, weights: ExpertWeights, ws: Workspaces, out: torch.Tensor) -> None:
        """Decoding: one token, so nothing to sort or gather, and the sum over K is one product."""
        ids, router_weights = dispatched.topk_ids, dispatched.topk_weights
        assert ids is not None and router_weights is not None, "STANDARD format comes with ids and weights"
        experts = ids[0].tolist()
        if -1 in experts:
            kept = [k for k, expert in enumerate(experts) if expert >= 0]
            if not kept:
                out.zero_()
                return
            experts = [experts[k] for k in kept]
            router_weights = router_weights[:, kept]
        groups = _Groups(experts, [1] * len(experts))
        x = dispatched.x.to(self._compute_dtype).expand(len(experts), -1)
        y = self._run(groups, x, weights, ws)
        if y.dtype is not torch.float32:
            y = _view(ws["weighted"], len(experts), self._hidden).copy_(y)
        if out.dtype is torch.float32:
            torch.mm(router_weights, y, out=out)
        else:
            out.copy_(torch.mm(router_weights, y, out=ws["sum"]))

    def _apply_batched(self, dispatched: Dispatched, weights: ExpertWeights, ws: Workspaces, out: torch.Tensor) -> None:
        assert dispatched.tokens_per_expert is not None
        for expert, count in enumerate(dispatched.tokens_per_expert.tolist()):
            for start in range(0, count, MAX_BLOCK_ROWS):
                size = min(MAX_BLOCK_ROWS, count - start)
                x = dispatched.x[expert].narrow(0, start, size)
                if x.dtype is not self._compute_dtype:
                    x = _view(ws["x"], size, self._hidden).copy_(x)
                y = self._run(_Groups([expert], [size]), x, weights, ws)
                out[expert].narrow(0, start, size).copy_(y)

    def _gather(self, x: torch.Tensor, source: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """Rows `source` of `x` `[R, H]`, in the compute dtype, as scratch `[S, H]` that may be written."""
        target = _view(buffer, source.shape[0], self._hidden)
        if x.dtype is target.dtype:
            return torch.index_select(x, 0, source, out=target)
        return target.copy_(x.index_select(0, source))

    def _run(self, groups: _Groups, x: torch.Tensor, weights: ExpertWeights, ws: Workspaces) -> torch.Tensor:
        """`[S, H]` through w13, the activation and w2, with biases → `[S, H]` scratch."""
        size = x.shape[0]
        h = _view(ws["h"], size, self._w13_rows)
        act = _view(ws["act"], size, self._intermediate)
        y = _view(ws["y"], size, self._hidden)
        self._linear(groups, x, weights.w13, weights.w13_bias, h, ws)
        activate(self._activation, weights.gate_up_layout, h, act)
        self._linear(groups, act, weights.w2, weights.w2_bias, y, ws)
        return y

    def _linear(
        self,
        groups: _Groups,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        ws: Workspaces,
    ) -> None:
        """`x [S, in]` times each group's `weight [E_l, out, in]`, plus its `bias [E_l, out]` → `out [S, out]`."""
        if weight.dtype is self._compute_dtype:
            grouped_linear(x, groups.sizes, groups.experts, weight, out, ws["turned"])
        else:
            parts = zip(groups.experts, torch.split(x, groups.sizes), torch.split(out, groups.sizes), strict=True)
            for expert, x_g, out_g in parts:
                linear(x_g, _convert(weight[expert], ws["weight"]), out_g, ws["turned"])
        if bias is not None:
            for expert, part in zip(groups.experts, torch.split(out, groups.sizes), strict=True):
                part.add_(bias[expert])

    def _weigh(self, y: torch.Tensor, scale: torch.Tensor, ws: Workspaces) -> torch.Tensor:
        """`y [S, H]` times the router weight `scale [S, 1]`, in fp32."""
        if y.dtype is torch.float32:
            return y if self._weight_on_input else y.mul_(scale)
        # Conversion and product apart: each is vectorised, the mixed product is not.
        weighted = _view(ws["weighted"], y.shape[0], self._hidden).copy_(y)
        return weighted if self._weight_on_input else weighted.mul_(scale)


def _blocks(counts: Sequence[int]) -> Iterator[_Groups]:
    """Cut rows sorted by expert, `counts[e]` of expert e, into blocks of at most `MAX_BLOCK_ROWS`."""
    experts: list[int] = []
    sizes: list[int] = []
    room = MAX_BLOCK_ROWS
    for expert, count in enumerate(counts):
        while count:
            size = min(count, room)
            experts.append(expert)
            sizes.append(size)
            count, room = count - size, room - size
            if not room:
                yield _Groups(experts, sizes)
                experts, sizes, room = [], [], MAX_BLOCK_ROWS
    if sizes:
        yield _Groups(experts, sizes)


def _view(buffer: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The start of a 1-D buffer as `[rows, columns]`; one operator where slice and view would be two."""
    return buffer.as_strided((rows, columns), (columns, 1))


def _convert(w: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """A weight in the buffer's dtype, lying as it lay."""
    rows, columns = w.shape
    strides = (columns, 1) if w.stride(1) == 1 else (1, rows)
    return buffer.as_strided((rows, columns), strides).copy_(w)
