"""The symmetric memory of a rank: made once for all layers of one shape, shared, its lanes handed out.

Shape letters: T tokens on this rank · M the largest T · H hidden · G groups of columns · E_l local experts ·
C = W · M row capacity · K top-k · W ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import attrs
import torch

from moe_core.errors import MoEError
from moe_core.interfaces import Group
from moe_core.pool import Lease, SharedPool
from moe_core.quant import ScaleFormat
from moe_symm.layout import LANES, Form, Layout, Shares


@attrs.frozen
class Layer:
    """What the kernels of a layer know of it, beside the layout of the memory.

    Attributes:
        shares: which rank holds which experts.
        dtype: the model's.
        scales: how rows are quantized where the payload is; None: it never is.
    """

    shares: Shares
    dtype: torch.dtype
    scales: ScaleFormat | None = None


class Connection(Protocol):
    """One rank's end of the connected memories: kernels on a GPU, or the emulation.

    All tensors that go in and out are contiguous. A step is `dispatch`, `arrive` or `expand` if nobody has waited yet,
    and `combine`, as a whole or in its halves.
    """

    def area(self, lane: int, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """One area of a lane of this rank's own memory, from its start; `clear` has set it."""

    def compile(self, layer: Layer) -> None:
        """Collective: make ready, on every rank, whatever a step of such a layer will launch."""

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
        """Send `[T, H]`, `[T, K]` and `[T, K]` float32; `wait`: for the other ranks' too (standard form only)."""

    def arrive(self, lane: int, layer: Layer) -> None:
        """Wait for the other ranks' tokens."""

    def expand(
        self,
        lane: int,
        layer: Layer,
        tokens: int,
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        tokens_per_expert: torch.Tensor,
    ) -> None:
        """Wait for them, and write `[E_l, C, H]`, its scales `[E_l, C, G]` where rows are quantized, and `[E_l]`.

        `tokens` is this rank's T, by which it is guessed how many rows have come.
        """

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
        """`send` the experts' rows home; `collect`: wait, and write the sums into `out` `[T, H]`.

        `y` is `[W · M, H]` in the standard form, else `[E_l, C, H]`; ids and weights are those of the dispatch.
        """

    def fault(self) -> int:
        """What `layout.fault_code` makes, or 0. Asks nothing of the device: it may lag behind."""

    def reset(self) -> None:
        """Collective: the state before the first step. No rank is in a step when it calls this."""

    def close(self) -> None: ...


Connect = Callable[[Group, Layout, float], Connection]
"""`connect(group, layout, timeout_s)`: collective."""


@attrs.frozen(eq=False)
class Lane:
    """One lane's areas as tensors.

    Attributes:
        index: its number.
        x: `[W · M, H]`, a view on rows of pitch P.
        quantized: float8_e4m3fn `[W · M, H]`, the same memory for quantized rows.
        scales: float32 `[W · M, G]`.
        ids: int32 `[W · M, K]`.
        weights: float32 `[W · M, K]`.
        num_rows: int32 `[1]`: no row that has come is past it.
        places: int32 `[W · M, K]`, or `[0, K]` in the standard form.
        y: `[W · M, H]`, a view of `sums` where the experts write, in a layout for many tokens; else None.
    """

    index: int
    x: torch.Tensor
    quantized: torch.Tensor
    scales: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    num_rows: torch.Tensor
    places: torch.Tensor
    y: torch.Tensor | None


@attrs.define(eq=False)
class SharedBuffer:
    """Connected memory and its lanes.

    Attributes:
        connection: to the other ranks.
        lanes: all of them.
        free: lanes that nobody uses, rising. All ranks take the first, and so the same, as they make the same calls.
        resets: how often the memory has been reset: what was in flight before has no lane any more.
    """

    connection: Connection
    lanes: tuple[Lane, ...]
    free: list[Lane]
    resets: int = 0

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

    def reset(self) -> None:
        """Collective."""
        self.connection.reset()
        self.free = list(self.lanes)
        self.resets += 1


POOL: SharedPool[SharedBuffer] = SharedPool(lambda buffer: buffer.connection.close())


def lease_buffer(
    connect: Connect, group: Group, layout: Layout, dtype: torch.dtype, timeout_s: float
) -> Lease[SharedBuffer]:
    """The buffer of this shape. The layer that is first to ask makes and connects it, on every rank at once."""
    owner: Any = group if group.torch_group is None else group.torch_group

    def make() -> SharedBuffer:
        connection = connect(group, layout, timeout_s)
        lanes = tuple(_lane(connection, layout, dtype, lane) for lane in range(LANES))
        return SharedBuffer(connection, lanes, list(lanes))

    return POOL.lease(owner, (connect, layout, dtype), make)


def _lane(connection: Connection, layout: Layout, dtype: torch.dtype, lane: int) -> Lane:
    area, rows, top_k = functools.partial(connection.area, lane), layout.rows, layout.top_k
    return Lane(
        index=lane,
        x=area("rows", dtype, rows, layout.pitch)[:, : layout.hidden],
        quantized=area("rows", torch.float8_e4m3fn, rows, layout.quantized_pitch)[:, : layout.hidden],
        scales=area("scales", torch.float32, rows, layout.scale_pitch)[:, : layout.groups],
        ids=area("ids", torch.int32, rows, top_k),
        weights=area("weights", torch.float32, rows, top_k),
        num_rows=area("num_rows", torch.int32, 1),
        places=area("places", torch.int32, 0 if layout.form is Form.STANDARD else rows, top_k),
        y=area("sums", dtype, rows, layout.pitch)[:, : layout.hidden] if layout.bulk else None,
    )


def clear(memory: torch.Tensor, layout: Layout) -> None:
    """The state before the first step, of a whole uint8 memory: no ids; counters, epochs and fault words at 0."""
    memory.zero_()
    for lane in range(LANES):
        begin = layout.begin(lane, "ids")
        memory[begin : begin + layout.rows * layout.top_k * 4].fill_(255)  # -1
