"""How rows move within a rank: to the slots of their experts, back, and into one sum. On a GPU each is one kernel.

Shape letters: T tokens on this rank · H hidden · E experts, global · E_l local experts · K top-k · W ranks · M the
largest T of any rank · R rows · C row capacity per local expert · D rows that one row can make for one rank.

Everywhere, equal ids in a row are one choice: they have one place, and the weights of all of them count.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_batched.owners import Owners, first_of, is_first
from moe_core.errors import MoEError
from moe_core.types import Routing
from moe_core.wire import WireRow, quantize_rows


def find_slots(
    ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slot of every choice: rows of an expert ascend from its slot 0.

    Args:
        ids: int32 or int64 `[R, K]`; -1 = none.
        expert_map: int32 `[E]`, global id → local, or -1; None: ids are local.
        num_experts: E_l.
        capacity: C.

    Returns:
        int64 `[R, K]`, e · C + slot, or -1 where there is no expert or no slot left; and int32 `[E_l]`, the rows of
        each expert, also those without a slot.
    """
    if ids.is_cuda:
        return _kernels().find_slots(ids, expert_map, num_experts, capacity)
    ids = ids.long()
    if expert_map is not None:
        # As an index, -1 would mean the last expert: it is replaced before the table is read and put back after.
        ids = torch.where(ids < 0, -1, expert_map[ids.clamp(min=0)].long())
    rows = ids.shape[0]
    if not rows:
        return ids, torch.zeros(num_experts, dtype=torch.int32, device=ids.device)
    # A column more takes the -1, so that none of the others is touched.
    chosen = torch.zeros(rows, num_experts + 1, dtype=torch.bool, device=ids.device)
    chosen.scatter_(1, torch.where(ids < 0, num_experts, ids), True)
    taken = chosen[:, :-1].cumsum(dim=0, dtype=torch.int32)  # rows up to and with this one that chose the expert
    slot = taken.gather(1, ids.clamp(min=0)).long() - 1
    place = torch.where((ids >= 0) & (slot < capacity), ids * capacity + slot, -1)
    return place, taken[-1].clone()  # not a view: it would keep all of `taken`


def to_slots(
    rows: torch.Tensor, scales: torch.Tensor | None, place: torch.Tensor, slots: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows `[R, …]` and their scales `[R, …]` into `[slots, …]` each; what nobody's place is stays uninitialised."""
    if rows.is_cuda:
        return _kernels().to_slots(rows, scales, place, slots)
    return _scattered(rows, place, slots), None if scales is None else _scattered(scales, place, slots)


def from_slots(y: torch.Tensor, place: torch.Tensor, most: int) -> torch.Tensor:
    """`[R · D, H]`: for each row its choices' rows of `y` in the order of K, then nothing, uninitialised.

    Args:
        y: `[E_l · C, H]`, unit stride in H.
        place: int64 `[R, K]`, as of `find_slots`.
        most: D.
    """
    if y.is_cuda:
        return _kernels().from_slots(y, place, most)
    rows = place.shape[0]
    alone = is_first(place) & (place >= 0)
    target = torch.arange(rows, device=y.device).unsqueeze(1) * most + alone.cumsum(1) - 1
    back = allocate(rows * most + 1, y)  # the last takes what goes nowhere
    target = target.masked_fill(~alone, rows * most)
    for k in range(place.shape[1]):
        back.index_copy_(0, target[:, k], y.index_select(0, place[:, k].clamp(min=0)))
    return back[:-1]


def weigh_and_sum(rows: torch.Tensor, place: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor) -> None:
    """Weigh and sum in fp32, in the order of K, and round once.

    Args:
        rows: `[N, H]`, raw rows of experts; those that no choice points at may hold NaN.
        place: int64 `[T, K]`, the row of each choice, or -1.
        topk_weights: float32 `[T, K]`; anything where the place is -1.
        out: `[T, H]`, written whole; tokens without a row get zeros.
    """
    if out.numel() == 0:
        return
    if rows.shape[0] == 0:  # nobody here has a row, and there is none to read instead
        out.zero_()
        return
    if rows.is_cuda:
        _kernels().weigh_and_sum(rows, place, topk_weights, out)
        return
    # A choice without a row reads row 0, and what it reads is replaced: NaN · 0 would be NaN.
    kept = place >= 0
    place, weights = place.clamp(min=0), topk_weights.masked_fill(~kept, 0.0)
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for k in range(place.shape[1]):
        term = rows.index_select(0, place[:, k]).float().masked_fill_(~kept[:, k : k + 1], 0.0)
        total.addcmul_(term, weights[:, k : k + 1])
    out.copy_(total)


def spread(
    row: WireRow, hidden_states: torch.Tensor, routing: Routing, owners: Owners, max_tokens: int, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A block of M rows for each rank: token t is row t in the blocks of all ranks that have one of its experts.

    Of each of these rows D come back: those of the token's choices there, in the order of K, then nothing.

    Args:
        row: how a row travels.
        hidden_states: `[T, H]`.
        routing: global ids.
        owners: which rank has which expert.
        max_tokens: M.
        most: D.

    Returns:
        uint8 `[W · M, row_bytes]`: where a rank has none of a token's experts, ids are -1 and the rest uninitialised;
        and int64 `[T, K]`, the row of each choice among the `[W · M · D]` that come back, or -1.
    """
    blocks = torch.empty(owners.ranks * max_tokens, row.row_bytes, dtype=torch.uint8, device=hidden_states.device)
    room = row.unpack(blocks)
    if hidden_states.is_cuda:
        values, scales = (hidden_states, None) if row.spec is None else quantize_rows(hidden_states, row.spec)
        return blocks, _kernels().spread(values, scales, routing.topk_ids, room, owners, max_tokens, most)
    ids, tokens = routing.topk_ids, hidden_states.shape[0]
    packed = row.pack(hidden_states, routing, tokens)
    room.topk_ids.fill_(-1)
    wants = owners.wants(ids)
    for rank, block in enumerate(blocks.view(owners.ranks, max_tokens, row.row_bytes)):
        here = wants[:, :, rank].any(dim=1).nonzero().flatten()
        block.index_copy_(0, here, packed.index_select(0, here))
    owner = owners.of(ids)
    turns = (wants.cumsum(dim=1) - 1).gather(2, owner.clamp(max=owners.ranks - 1).unsqueeze(2)).squeeze(2)
    home = (owner * max_tokens + torch.arange(tokens, device=ids.device).unsqueeze(1)) * most + turns
    return blocks, home.gather(1, first_of(ids)).masked_fill(ids < 0, -1)


def allocate(rows: int, like: torch.Tensor) -> torch.Tensor:
    """`[rows, …]`, uninitialised, in dtype and width of rows."""
    return torch.empty(rows, like.shape[1], dtype=like.dtype, device=like.device)


def _scattered(rows: torch.Tensor, place: torch.Tensor, slots: int) -> torch.Tensor:
    """`[slots, …]`; the buffer has one row more, which takes what goes nowhere."""
    buffer = allocate(slots + 1, rows)
    place = place.masked_fill(place < 0, slots)
    plain = torch.uint8 if rows.element_size() == 1 else rows.dtype  # fp8 has no index_copy_
    for k in range(place.shape[1]):  # K writes of [R, H]: one write would need the rows K times over
        buffer.view(plain).index_copy_(0, place[:, k], rows.view(plain))
    return buffer[:slots]


def _kernels() -> Any:
    try:
        from moe_batched import launch  # noqa: PLC0415 - needs triton, which most CUDA builds of torch bring
    except ImportError as error:
        raise MoEError("dispatch batched: its kernels for GPUs want triton; pip install 'moe-core[triton]'") from error
    return launch
