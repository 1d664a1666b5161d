"""`PeerMemory`: symmetric memory between GPUs, and the launches of the kernels over it.

Shape letters: T tokens on this rank · H hidden · K top-k · W ranks.
"""

from __future__ import annotations

import ctypes
import math
import os
import socket
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed._symmetric_memory as symmetric_memory

from moe_core.agreement import check_agreement
from moe_core.errors import MoEError
from moe_core.interfaces import Group
from moe_symm.buffers import Layer, clear
from moe_symm.launches import Kernels, combine_grid, dispatch_programs, expand_programs
from moe_symm.layout import LANES, Layout


class PeerMemory:
    """A `Connection` over `torch.distributed._symmetric_memory`, by plain stores to peers; no multicast.

    Args:
        group: the ranks, with a `torch_group`.
        layout: of the memory.
        timeout_s: how long a kernel waits for another rank.
    """

    def __init__(self, group: Group, layout: Layout, timeout_s: float) -> None:
        assert group.torch_group is not None, "`connect` asks for it"
        self._group, self._layout, self._rank = group, layout, group.rank
        self._limit_ms = round(timeout_s * 1000)
        device = torch.device("cuda", torch.cuda.current_device())
        self.memory = symmetric_memory.empty(layout.total_bytes, dtype=torch.uint8, device=device)
        self._handle = symmetric_memory.rendezvous(self.memory, group.torch_group)
        clear(self.memory, layout)
        addresses = list(self._handle.buffer_ptrs)
        steps = [lane * layout.lane_bytes for lane in range(LANES)]
        self._peers = [torch.tensor([a + step for a in addresses], dtype=torch.int64, device=device) for step in steps]
        self._bases = [addresses[group.rank] + step for step in steps]
        # The kernels write here themselves, in a fault only: no copy on the step, and no sync to read it.
        self._status = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._seen = ctypes.c_int32.from_address(self._status.data_ptr())
        self._kernels: dict[Layer, Kernels] = {}
        torch.cuda.synchronize(device)
        group.barrier()  # nobody writes into memory that is not cleared yet

    def area(self, lane: int, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        begin = self._layout.begin(lane, name)
        return self.memory[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def compile(self, layer: Layer) -> None:
        """Every kernel on every rank before any of them runs: one that compiles late looks like one that is gone."""
        if layer not in self._kernels:
            self._kernels[layer] = Kernels(self._layout, layer, self._rank, self.memory.device)
        self._group.barrier()

    def dispatch(
        self,
        lane: int,
        layer: Layer,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        quantize: bool,
        wait: bool,
    ) -> None:
        tokens = x.shape[0]
        launch = self._kernels[layer].dispatch[quantize, wait]
        launch((dispatch_programs(tokens, quantize), 1, 1), ids.dtype, x, ids, weights, *self._tail(lane, tokens))

    def arrive(self, lane: int, layer: Layer) -> None:
        launch = self._kernels[layer].arrive
        assert launch is not None, "of the standard form only"
        launch((1, 1, 1), 0, *self._tail(lane))

    def expand(
        self,
        lane: int,
        layer: Layer,
        tokens: int,
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        tokens_per_expert: torch.Tensor,
    ) -> None:
        quantized = x_scale is not None
        launch, rows = self._kernels[layer].expand[quantized], x.view(torch.uint8) if quantized else x
        launch((expand_programs(tokens), 1, 1), 0, rows, x_scale, tokens_per_expert, *self._tail(lane))

    def combine(
        self,
        lane: int,
        layer: Layer,
        y: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        *,
        send: bool = True,
        collect: bool = True,
    ) -> None:
        launch = self._kernels[layer].combine[send, collect]
        grid = (combine_grid(self._layout)[0], 1, 1)
        launch(grid, ids.dtype, y, ids, weights, out, *self._tail(lane, out.shape[0]))

    def _tail(self, lane: int, *tokens: int) -> tuple[Any, ...]:
        return self._peers[lane], self._bases[lane], self._status.data_ptr(), *tokens, self._rank, self._limit_ms

    def reset(self) -> None:
        """All waits of this rank have ended, one way or another, before it clears; all have cleared before it ends."""
        torch.cuda.synchronize(self.memory.device)
        self._group.barrier()
        clear(self.memory, self._layout)
        self._status.zero_()
        torch.cuda.synchronize(self.memory.device)
        self._group.barrier()

    def fault(self) -> int:
        return self._seen.value

    def close(self) -> None:
        """Peers have ended what they write here when their last combine has: its counts are in."""
        torch.cuda.synchronize(self.memory.device)
        del self._handle, self.memory


def connect(group: Group, layout: Layout, timeout_s: float) -> PeerMemory:
    """Make and connect the memory. Collective.

    Raises:
        MoEError: on every rank, if one of them can't: another host, no access to a peer, another shape.
    """
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # torch sets it up unasked, and here nobody uses it
    check_agreement(
        group, {"host, which must be one": _host(), "symmetric memory": attrs.asdict(layout), "peer access": _misfit()}
    )
    if misfit := _misfit():
        raise MoEError(f"dispatch symm: {misfit}; choose another dispatch")
    if group.torch_group is None:
        raise MoEError("dispatch symm: symmetric memory needs a torch.distributed group; pass a TorchGroup")
    try:
        return PeerMemory(group, layout, timeout_s)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise MoEError(
            f"dispatch symm, rank {group.rank} of {group.size}: torch can't set up {layout.total_bytes >> 20} MiB of "
            f"symmetric memory: {reason}; choose another dispatch, or look at the other ranks' output"
        ) from error


def _host() -> str:
    """The same for processes of one host, also in containers with names of their own."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def _misfit() -> str:
    here = torch.cuda.current_device()
    others = [other for other in range(torch.cuda.device_count()) if other != here]
    apart = [other for other in others if not torch.cuda.can_device_access_peer(here, other)]
    return f"GPU {here} has no peer access to GPUs {apart}" if apart else ""
