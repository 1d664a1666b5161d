"""Which kernels a layer launches, with which constants, in which grids. All are compiled when the layer is built.

Shape letters: T tokens on this rank · M the largest T · H hidden · G groups of columns · E_l local experts ·
C = W · M row capacity · K top-k · W ranks.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from moe_core.ops import KernelLaunch
from moe_core.quant import ScaleFormat
from moe_symm.buffers import Layer
from moe_symm.kernels import combine, dispatch
from moe_symm.layout import COMBINE, DISPATCH, SCALE_GROUP, UNITS, Form, Layout

_ID_DTYPES = (torch.int32, torch.int64)
_MOST_COLUMNS = 8192
"""Columns of a row that a program holds at once: 16 a thread."""
_FETCHED_COLUMNS = 2048
"""Columns that a program fetches at once, 8 a thread: in smaller pieces, so that more of them are under way."""
_MOST_IDS = 4096
"""Ids that a program of `expand` looks at together."""

Constants = dict[str, Any]


def power_of_two(number: int) -> int:
    """The next one from `number` on."""
    return 1 << (number - 1).bit_length()


def block_columns(hidden: int) -> int:
    return max(SCALE_GROUP, min(power_of_two(hidden), _MOST_COLUMNS))


def warps(hidden: int) -> int:
    """16 columns a thread, from 4 to 16 warps."""
    return max(4, min(16, block_columns(hidden) // 512))


def dispatch_programs(tokens: int, quantize: bool) -> int:
    """The grid of a dispatch, by T: beyond what fills the links, each program is one more count to wait for.

    To quantize a row takes a program longer than to send it: with 8 tokens on 4 ranks, 32 programs of one row save
    1.2 us against 16 of two.
    """
    few = 4 if quantize else 8
    return next((programs for most, programs in ((few, 16), (16, 32), (256, 64)) if tokens <= most), 128)


def combine_grid(layout: Layout) -> tuple[int, int, int]:
    """Programs of a combine, the columns that each sums at once, and its warps.

    By M, since T of the other ranks is known on the device only; idle programs just end. All programs that wait must
    run at once: 128 of 16 warps, or 256 of 8, fit on every GPU that this is for.
    """
    columns = block_columns(layout.hidden)
    if layout.bulk:
        columns = min(columns, _FETCHED_COLUMNS)
        return 256, columns, max(4, columns // 256)
    return 64 if layout.max_tokens <= 256 else 128, columns, warps(layout.hidden)


def expand_programs(tokens: int) -> int:
    """The grid of `expand`, by T: programs that find no row have looked at the counters as often as the others."""
    return 64 if 1 <= tokens <= 8 else 256


_EXPAND_WARPS = 8
"""A row's places are found in steps that all its threads must meet at; rows are many."""


class Kernels:
    """The compiled kernels of one layer shape over one memory.

    Args:
        layout: of the memory.
        layer: the shape.
        rank: this rank.
        device: where they run.
    """

    def __init__(self, layout: Layout, layer: Layer, rank: int, device: torch.device) -> None:
        self._layout, self._layer, self._device = layout, layer, device
        self._warps = warps(layout.hidden)
        self._known = _constants(layout, layer, rank)
        self._peers = torch.zeros(layout.ranks, dtype=torch.int64, device=device)
        payloads = (False, True) if layer.scales is not None else (False,)
        expanded = layout.form is not Form.STANDARD
        self.dispatch = {
            (quantize, wait): self._dispatch(quantize, wait)
            for quantize, wait in itertools.product(payloads, (False,) if expanded else (False, True))
        }
        self.arrive = None if expanded else self._arrive()
        self.expand = {quantize: self._expand(quantize) for quantize in (payloads if expanded else ())}
        halves = ((True, True), (True, False), (False, True))
        self.combine = {(send, collect): self._combine(send, collect) for send, collect in halves}

    def _bind(self, kernel: Any, stage: int, constants: Constants, warps: int | None = None) -> KernelLaunch:
        known = {name: self._known[name] for name in kernel.arg_names if name in self._known}
        constants = known | constants | {"STAGE": stage}
        return KernelLaunch(kernel, constants, warps=warps or self._warps, stages=1, pdl=True)

    def _tail(self, *tokens: int) -> tuple[Any, ...]:
        """As `PeerMemory` has it, with other values."""
        return (self._peers, 1 << 40, 1 << 41, *tokens, 1, 1)

    def _dispatch(self, quantize: bool, wait: bool) -> KernelLaunch:
        payload = self._payload(quantize) | {"POWER_OF_TWO": self._layer.scales is ScaleFormat.UE8M0, "WAITS": wait}
        launch = self._bind(dispatch.dispatch, DISPATCH, payload)
        x, ids, weights = self._row(self._layer.dtype), self._choices(torch.int32), self._choices(torch.float32)
        for dtype in _ID_DTYPES:
            launch.compile(dtype, x, ids.to(dtype), weights, *self._tail(1))
        return launch

    def _arrive(self) -> KernelLaunch:
        launch = self._bind(dispatch.arrive, DISPATCH, {}, warps=1)
        launch.compile(0, *self._tail())
        return launch

    def _expand(self, quantize: bool) -> KernelLaunch:
        launch = self._bind(dispatch.expand, DISPATCH, self._payload(quantize), _EXPAND_WARPS)
        rows = self._row(torch.uint8 if quantize else self._layer.dtype)
        scales = self._choices(torch.float32) if quantize else None
        launch.compile(0, rows, scales, self._choices(torch.int32), *self._tail())
        return launch

    def _combine(self, send: bool, collect: bool) -> KernelLaunch:
        _, columns, warps = combine_grid(self._layout)
        launch = self._bind(combine.combine, COMBINE, {"SENDS": send, "COLLECTS": collect, "BLOCK": columns}, warps)
        row, ids, weights = self._row(self._layer.dtype), self._choices(torch.int32), self._choices(torch.float32)
        for dtype in _ID_DTYPES:
            launch.compile(dtype, row, ids.to(dtype), weights, row, *self._tail(1))
        return launch

    def _payload(self, quantize: bool) -> Constants:
        layout = self._layout
        return {
            "GROUP": SCALE_GROUP if quantize else 0,
            "ROW_BYTES": layout.quantized_pitch if quantize else layout.pitch * layout.item,
        }

    def _row(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(1, self._layout.hidden, dtype=dtype, device=self._device)

    def _choices(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(1, self._layout.top_k, dtype=dtype, device=self._device)


def _constants(layout: Layout, layer: Layer, rank: int) -> Constants:
    """What kernels know at compile time of the memory and of the layer, the same for every lane."""
    sizes = {
        "W": layout.ranks,
        "WP": power_of_two(layout.ranks),
        "M": layout.max_tokens,
        "H": layout.hidden,
        "P": layout.pitch,
        "G": layout.groups,
        "GP": power_of_two(layout.groups),
        "K": layout.top_k,
        "KP": power_of_two(layout.top_k),
        "SHARE": layer.shares.share,
        "MORE": layer.shares.more,
        "LINEAR": layer.shares.linear,
        "EXPERTS": layer.shares.held(rank),
        "UNITS": UNITS,
        "BLOCK": block_columns(layout.hidden),
        "CHUNK": min(power_of_two(layout.rows * layout.top_k), _MOST_IDS),
        "SCALE_BYTES": layout.scale_pitch * 4,
        "FORM": layout.form.value,
        "FETCHES": layout.bulk,
    }
    return sizes | {name.upper(): offset for name, offset in layout.offsets.items()}
