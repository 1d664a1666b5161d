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
from moe_core.ops import KernelLaunch
from moe_symm.buffers import clear
from moe_symm.kernels import pair
from moe_symm.layout import (
    COMBINE,
    DISPATCH,
    LANES,
    UNITS,
    Layout,
    Shares,
    combine_programs,
    dispatch_programs,
)

_ID_DTYPES = (torch.int32, torch.int64)
_MOST_COLUMNS = 8192
"""Columns of a row that a program holds at once: 16 a thread."""


def block_columns(hidden: int) -> int:
    return min(1 << (hidden - 1).bit_length(), _MOST_COLUMNS)


def warps(hidden: int) -> int:
    """16 columns a thread, from 4 to 16 warps."""
    return max(4, min(16, block_columns(hidden) // 512))


def constants(layout: Layout, shares: Shares) -> dict[str, dict[str, Any]]:
    """Kernel → its compile-time arguments; the same on every rank and for every lane."""
    both = {
        "W": layout.ranks,
        "WP": 1 << (layout.ranks - 1).bit_length(),
        "M": layout.max_tokens,
        "H": layout.hidden,
        "P": layout.pitch,
        "K": layout.top_k,
        "KP": 1 << (layout.top_k - 1).bit_length(),
        "SHARE": shares.share,
        "MORE": shares.more,
        "LINEAR": shares.linear,
        "UNITS": UNITS,
        "BLOCK": block_columns(layout.hidden),
    }
    of = {name.upper(): offset for name, offset in layout.offsets.items()}
    areas = {
        "dispatch": ("DISPATCHED", "COUNTS", "EPOCHS", "FAULT", "IDS", "WEIGHTS", "ROWS"),
        "combine": ("COMBINED", "COUNTS", "EPOCHS", "FAULT", "IDS", "SUMS"),
    }
    stages = {"dispatch": DISPATCH, "combine": COMBINE}
    return {name: both | {"STAGE": stages[name]} | {area: of[area] for area in areas[name]} for name in areas}


@attrs.frozen(eq=False)
class _Launches:
    """The kernels of one layer shape."""

    dispatch: KernelLaunch
    combine: KernelLaunch


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
        self._launches: dict[Shares, _Launches] = {}
        torch.cuda.synchronize(device)
        group.barrier()  # nobody writes into memory that is not cleared yet

    def area(self, lane: int, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        begin = lane * self._layout.lane_bytes + self._layout.offsets[name]
        return self.memory[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def compile(self, shares: Shares, dtype: torch.dtype) -> None:
        """Every kernel on every rank before any of them runs: one that compiles late looks like one that is gone."""
        if shares not in self._launches:
            fixed, count = constants(self._layout, shares), warps(self._layout.hidden)
            for id_dtype in _ID_DTYPES:
                self._warm_up(fixed, count, id_dtype, dtype)
            self._launches[shares] = _Launches(
                dispatch=KernelLaunch(pair.dispatch, fixed["dispatch"], warps=count, stages=1),
                combine=KernelLaunch(pair.combine, fixed["combine"], warps=count, stages=1),
            )
        self._group.barrier()

    def _warm_up(self, fixed: dict[str, dict[str, Any]], count: int, id_dtype: torch.dtype, dtype: torch.dtype) -> None:
        layout, device = self._layout, self.memory.device
        x = torch.empty(1, layout.hidden, dtype=dtype, device=device)
        ids = torch.empty(1, layout.top_k, dtype=id_dtype, device=device)
        weights = torch.empty(1, layout.top_k, device=device)
        tail, options = self._tail(0, 1), {"num_warps": count, "num_stages": 1, "grid": (1,)}
        pair.dispatch.warmup(x, ids, weights, *tail, **fixed["dispatch"], **options)
        pair.combine.warmup(x, ids, x, *tail, **fixed["combine"], **options)

    def dispatch(self, lane: int, shares: Shares, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        tokens = x.shape[0]
        launch = self._launches[shares].dispatch
        launch((dispatch_programs(tokens), 1, 1), ids.dtype, x, ids, weights, *self._tail(lane, tokens))

    def combine(self, lane: int, shares: Shares, y: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
        launch = self._launches[shares].combine
        grid = (combine_programs(self._layout.max_tokens), 1, 1)
        launch(grid, ids.dtype, y, ids, out, *self._tail(lane, out.shape[0]))

    def _tail(self, lane: int, tokens: int) -> tuple[Any, ...]:
        status = self._status.data_ptr()
        return self._peers[lane], self._bases[lane], status, tokens, self._rank, self._limit_ms

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
