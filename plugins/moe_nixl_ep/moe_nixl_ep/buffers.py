"""NIXL EP's communication buffers: made once for all layers of one shape, connected, shared, destroyed in order.

Shape letters: H hidden · E experts, global · E_l local experts · W ranks · S slots per (source rank, local expert).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import attrs
import torch

from moe_core.agreement import check_agreement
from moe_core.interfaces import Group
from moe_core.pool import Lease, SharedPool
from moe_core.watchdog import limited
from moe_nixl_ep.library import Library
from moe_nixl_ep.limits import Version

MAX_IN_FLIGHT = 2
"""The library has two halves; each call flips them."""
_NVLINK_ONLY = "cuda_copy,cuda_ipc,sm,self"
_PROCESS = "this process"


@attrs.frozen
class BufferShape:
    """What a buffer is sized by; layers with the same share one.

    Attributes:
        ranks: W.
        experts_per_rank: E_l.
        slots: S.
        hidden: H on the wire.
    """

    ranks: int
    experts_per_rank: int
    slots: int
    hidden: int

    @property
    def num_experts(self) -> int:
        return self.ranks * self.experts_per_rank


@attrs.define(eq=False)
class SharedBuffer:
    """A connected buffer.

    Attributes:
        raw: the library's `Buffer`.
        device: where its tensors live.
        in_flight: dispatches of any layer whose combine is to come.
    """

    raw: Any
    device: torch.device
    in_flight: int = 0


def _destroy(buffer: SharedBuffer) -> None:
    if buffer.device.type == "cuda":
        torch.cuda.synchronize(buffer.device)  # kernels of the last step may still be on their way
    buffer.raw.destroy()


POOL: SharedPool[SharedBuffer] = SharedPool(_destroy)


def lease_buffer(library: Library, group: Group, shape: BufferShape, timeout_s: float) -> Lease[SharedBuffer]:
    """The buffer of this shape. The layer that is first to ask makes and connects it, on every rank at once.

    Args:
        library: NIXL EP, or its stand-in.
        group: the layer's ranks.
        shape: the buffer's.
        timeout_s: how long a kernel waits for a rank before it masks it, and how long the connection may take.

    Raises:
        MoEError: a rank did not come in time, or differs in its library or in its buffers.
    """
    # The UCX of wheel 1.4.0 unmaps a peer's memory for the whole process when one buffer ends (openucx/ucx #11744): so
    # all buffers of this process go together, whatever group they are of. A virtual rank stands for a process.
    owner: Any = group if group.torch_group is None else _PROCESS
    return POOL.lease(owner, (group.torch_group, library, shape), lambda: _connect(library, group, shape, timeout_s))


def _connect(library: Library, group: Group, shape: BufferShape, timeout_s: float) -> SharedBuffer:
    check_agreement(
        group,
        {
            "NIXL EP": str(library),
            "dtype of expert ids": str(library.module.topk_idx_t),
            "NIXL EP buffer": attrs.asdict(shape),
        },
    )
    if library.device.type == "cuda":
        torch.zeros(1, device=library.device)  # UCX wants a context that is there already
        choose_transport(library.version)
    # A key of an earlier buffer may still stand in the store while a slow rank connects: a prefix for each buffer.
    number = group.store.add(f"moe_nixl_ep/buffers/{group.rank}", 1)
    raw = library.module.Buffer(
        rank=group.rank,
        low_latency_mode=True,
        explicitly_destroy=True,
        tcp_store_group=library.prefixed(f"moe_nixl_ep/{number}", group.store),
        timeout_ms=round(timeout_s * 1000),
    )
    size = raw.get_low_latency_buffer_size_hint(shape.slots, shape.hidden, shape.ranks, shape.num_experts)
    raw.update_memory_buffers(num_ranks=shape.ranks, num_experts_per_rank=shape.experts_per_rank, num_rdma_bytes=size)
    with contextlib.ExitStack() as guarded:
        if library.unbounded:
            stage = f"moe-nixl-ep, rank {group.rank} of {group.size}, connect_ranks of {library}"
            guarded.enter_context(limited(stage, timeout_s))
        raw.connect_ranks(list(range(group.size)))
    return SharedBuffer(raw, library.device)


def choose_transport(version: Version | None) -> None:
    """Set what UCX needs to know before the first buffer; what the user has set stays.

    On a host without an RDMA device, NVLink between processes plus shared memory for its messages is all there is, and
    UCX finds that by itself only in some versions. The UCX in wheel 1.4 waits for ever there unless it resolves remote
    endpoints (openucx/ucx #11704).
    """
    if not any(Path("/sys/class/infiniband").glob("*")):
        os.environ.setdefault("UCX_TLS", _NVLINK_ONLY)
        if version is None or version[:2] == (1, 4):
            os.environ.setdefault("UCX_RESOLVE_REMOTE_EP_ID", "y")
