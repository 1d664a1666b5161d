"""Launches of `kernels/rows.py`: what the functions of the same names in `rows.py` do on a GPU.

Shape letters: T tokens on this rank · H hidden · E_l local experts · K top-k · W ranks · M the largest T of any rank ·
R rows · C row capacity per local expert · D rows that one row can make for one rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

from moe_batched.kernels import rows as kernels
from moe_batched.owners import Owners
from moe_core.ops import KernelLaunch
from moe_core.wire import Arrived

_BLOCK_BYTES = 4096
"""Of a row in one program: two loads of 16 bytes for each of its threads."""
_WARPS = 4
_IDS_AT_ONCE = 4096
_COUNTING_WARPS = 8


def find_slots(
    ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    place = torch.empty(ids.shape, dtype=torch.int64, device=ids.device)
    counts = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
    choices = _choices(place)
    constants = choices | {"MAPPED": expert_map is not None, "BLOCK": max(_IDS_AT_ONCE // choices["KP"], 1)}
    tensors = (ids, ids if expert_map is None else expert_map, place, counts)
    _launch("find_slots", (num_experts, 1, 1), tensors, (ids.shape[0], capacity), (ids.stride(0),), constants)
    return place, counts


def to_slots(
    rows: torch.Tensor, scales: torch.Tensor | None, place: torch.Tensor, slots: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    x = torch.empty(slots, rows.shape[1], dtype=rows.dtype, device=rows.device)
    x_scale = None if scales is None else torch.empty(slots, scales.shape[1], dtype=scales.dtype, device=rows.device)
    source, target = _plain(rows), _plain(x)
    source_scale, target_scale = (source, target) if scales is None else (_plain(scales), _plain(x_scale))
    tensors, strides = (source, source_scale, place, target, target_scale), (source.stride(0), source_scale.stride(0))
    constants = _columns(source) | _groups(scales) | _choices(place)
    _launch("to_slots", _grid(place.shape[0], source), tensors, (), strides, constants)
    return x, x_scale


def from_slots(y: torch.Tensor, place: torch.Tensor, most: int) -> torch.Tensor:
    rows = place.shape[0]
    back = torch.empty(rows * most, y.shape[1], dtype=y.dtype, device=y.device)
    constants = _columns(y) | _choices(place) | {"D": most}
    _launch("from_slots", _grid(rows, y), (y, place, back), (), (y.stride(0),), constants)
    return back


def weigh_and_sum(rows: torch.Tensor, place: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor) -> None:
    tensors, strides = (rows, place, topk_weights.contiguous(), out), (rows.stride(0), out.stride(0))
    _launch("weigh_and_sum", _grid(out.shape[0], out), tensors, (), strides, _columns(out) | _choices(place))


def spread(
    values: torch.Tensor,
    scales: torch.Tensor | None,
    ids: torch.Tensor,
    room: Arrived,
    owners: Owners,
    max_tokens: int,
    most: int,
) -> torch.Tensor:
    """`values` `[T, …]` and `scales`, as they travel, into `room`, views on the blocks of all ranks."""
    home = torch.empty(ids.shape, dtype=torch.int64, device=ids.device)
    share, more = owners.shares
    source, target = _plain(values), _plain(room.x)
    source_scale, target_scale = (source, target) if scales is None else (_plain(scales), _plain(room.x_scale))
    strided = (source, source_scale, target, target_scale, room.topk_ids)
    shares = {"SHARE": share, "MORE": more, "LINEAR": owners.is_linear}
    _launch(
        "spread",
        _grid(max_tokens, source),
        (source, source_scale, ids.contiguous(), target, target_scale, room.topk_ids, home),
        (ids.shape[0],),
        tuple(each.stride(0) for each in strided),
        _columns(source) | _groups(scales) | _choices(home) | shares | {"W": owners.ranks, "M": max_tokens, "D": most},
    )
    return home


def _launch(
    name: str,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor, ...],
    free: tuple[int, ...],
    strides: tuple[int, ...],
    constants: dict[str, int],
) -> None:
    """`free`: integers that the kernel does not specialise; a grid of nothing is no launch."""
    if not grid[0]:
        return
    on_borders = not any(tensor.data_ptr() % 16 for tensor in tensors)
    key = (tensors[0].device, *(tensor.dtype for tensor in tensors), *strides)
    _bound(name, tuple(constants.items()))(grid, key if on_borders else None, *tensors, *free, *strides)


@functools.cache
def _bound(name: str, constants: tuple[tuple[str, int], ...]) -> KernelLaunch:
    warps = _COUNTING_WARPS if name == "find_slots" else _WARPS
    return KernelLaunch(getattr(kernels, name), dict(constants), warps=warps)


def _columns(rows: torch.Tensor) -> dict[str, int]:
    return {"WIDTH": rows.shape[1], "BLOCK": _block(rows)}


def _groups(scales: torch.Tensor | None) -> dict[str, int]:
    groups = 0 if scales is None else scales.shape[1]
    return {"GROUPS": groups, "BLOCK_G": triton.next_power_of_2(max(groups, 1))}


def _choices(place: torch.Tensor) -> dict[str, int]:
    return {"K": place.shape[1], "KP": triton.next_power_of_2(place.shape[1])}


def _grid(rows: int, columns: torch.Tensor) -> tuple[int, int, int]:
    return rows, triton.cdiv(columns.shape[1], _block(columns)), 1


def _block(rows: torch.Tensor) -> int:
    return min(triton.next_power_of_2(rows.shape[1]), _BLOCK_BYTES // rows.element_size())


def _plain(rows: Any) -> torch.Tensor:
    """One-byte formats as bytes: they are moved, not computed with."""
    plain: torch.Tensor = rows.view(torch.uint8) if rows.element_size() == 1 else rows
    return plain
