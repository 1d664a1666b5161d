"""The symmetric memory of a rank: made once for all layers of one shape, shared, its lanes handed out.

Shape letters: T tokens on this rank · M the largest T · H hidden · P pitch of a row · K top-k · W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import attrs
import torch

from moe_core.errors import MoEError
from moe_core.interfaces import Group
from moe_core.pool import Lease, SharedPool
from moe_symm.layout import LANES, Layout, Shares


class Connection(Protocol):
    """One rank's end of the connected memories: kernels on a GPU, or the emulation."""

    def area(self, lane: int, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """One area of a lane of this rank's own memory, contiguous; `clear` has set it."""

    def compile(self, shares: Shares, dtype: torch.dtype) -> None:
        """Collective: make ready, on every rank, whatever a step of such a layer will launch."""

    def dispatch(self, lane: int, shares: Shares, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Send, and wait: `[T, H]`, `[T, K]`, `[T, K]` float32, contiguous."""

    def combine(self, lane: int, shares: Shares, y: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
        """Send `y` `[W · M, H]` home, wait, and write the sums into `out` `[T, H]`; all contiguous."""

    def fault(self) -> int:
        """What `layout.fault_code` makes, or 0. Asks nothing of the device: it may lag behind."""

    def close(self) -> None: ...


Connect = Callable[[Group, Layout, float], Connection]
"""`connect(group, layout, timeout_s)`: collective."""


@attrs.frozen(eq=False)
class Lane:
    """One lane's areas as tensors.

    Attributes:
        index: its number.
        x: `[W · M, H]`, a view on rows of pitch P.
        ids: int32 `[W · M, K]`.
        weights: float32 `[W · M, K]`.
    """

    index: int
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


@attrs.define(eq=False)
class SharedBuffer:
    """Connected memory and its lanes.

    Attributes:
        connection: to the other ranks.
        free: lanes that nobody uses, rising. All ranks take the first, and so the same, as they make the same calls.
    """

    connection: Connection
    free: list[Lane]

    def take(self) -> Lane:
        if not self.free:
            raise MoEError(
                f"dispatch symm: {LANES} micro-batches are in flight over the layers that share this buffer, which has "
                f"{LANES} lanes; combine one before the next dispatch"
            )
        return self.free.pop(0)

    def give(self, lane: Lane) -> None:
        self.free.append(lane)
        self.free.sort(key=lambda each: each.index)


POOL: SharedPool[SharedBuffer] = SharedPool(lambda buffer: buffer.connection.close())


def lease_buffer(
    connect: Connect, group: Group, layout: Layout, dtype: torch.dtype, timeout_s: float
) -> Lease[SharedBuffer]:
    """The buffer of this shape. The layer that is first to ask makes and connects it, on every rank at once."""
    owner: Any = group if group.torch_group is None else group.torch_group

    def make() -> SharedBuffer:
        connection = connect(group, layout, timeout_s)
        return SharedBuffer(connection, [_lane(connection, layout, dtype, lane) for lane in range(LANES)])

    return POOL.lease(owner, (connect, layout, dtype), make)


def _lane(connection: Connection, layout: Layout, dtype: torch.dtype, lane: int) -> Lane:
    rows, top_k = layout.rows, layout.top_k
    return Lane(
        index=lane,
        x=connection.area(lane, "rows", dtype, rows, layout.pitch)[:, : layout.hidden],
        ids=connection.area(lane, "ids", torch.int32, rows, top_k),
        weights=connection.area(lane, "weights", torch.float32, rows, top_k),
    )


def clear(memory: torch.Tensor, layout: Layout) -> None:
    """The state before the first step, of a whole uint8 memory: no ids; counters, epochs and fault words at 0."""
    memory.zero_()
    for lane in range(LANES):
        begin = lane * layout.lane_bytes + layout.offsets["ids"]
        memory[begin : begin + layout.rows * layout.top_k * 4].fill_(255)  # -1
