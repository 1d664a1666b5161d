"""The kernels behind `rows.py`, each of which says there, in torch, what it computes.

Shape letters: T tokens on this rank · H hidden · E_l local experts · K top-k · W ranks · M the largest T of any rank ·
R rows · C row capacity per local expert · D rows that one row can make for one rank.

A program takes BLOCK columns of one row, and finds out by itself where they go: KP lanes, K rounded up to a power of
two, hold what belongs to the row's choices.
"""

import triton
import triton.language as tl


@triton.jit
def _at(values, k, index):
    """The element of `values` [KP] at `index`."""
    return tl.sum(tl.where(k == index, values, 0), 0)


@triton.jit
def _first(values, k, KP: tl.constexpr):
    """[KP]: the first lane that holds the same."""
    same = values[:, None] == values[None, :]
    return tl.min(tl.where(same, k[None, :], KP), 1)


@triton.jit
def _owner(expert, SHARE: tl.constexpr, MORE: tl.constexpr, LINEAR: tl.constexpr, W: tl.constexpr):
    """The rank of an expert; -1 for none."""
    if LINEAR:
        SPLIT: tl.constexpr = MORE * (SHARE + 1)
        owner = tl.where(expert < SPLIT, expert // (SHARE + 1), MORE + (expert - SPLIT) // SHARE)
    else:
        owner = expert % W
    return tl.where(expert < 0, -1, owner)


@triton.jit(do_not_specialize=["tokens"])
def spread(
    x,  # [T, WIDTH], unit stride
    scale,  # [T, GROUPS], unit stride
    ids,  # int32 or int64 [T, K], contiguous
    to_x, to_scale, to_ids,  # the same parts of the blocks [W · M, …]; strides in elements of each
    home,  # int64 [T, K]
    tokens,  # T
    x_stride, scale_stride, to_x_stride, to_scale_stride, to_ids_stride,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    SHARE: tl.constexpr,
    MORE: tl.constexpr,
    LINEAR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Programs (M, blocks of columns)."""
    token = tl.program_id(0).to(tl.int64)
    first_block = tl.program_id(1) == 0
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    group = tl.arange(0, BLOCK_G)
    k = tl.arange(0, KP)
    real = token < tokens
    chosen = tl.load(ids + token * K + k, mask=(k < K) & real, other=-1).to(tl.int32)
    owner = _owner(chosen, SHARE, MORE, LINEAR, W)
    if first_block:
        first = _first(chosen, k, KP)
        before = (owner[:, None] == owner[None, :]) & (k[None, :] < first[:, None]) & (first == k)[None, :]
        turn = tl.sum(before.to(tl.int32), 1)
        place = tl.where(owner < 0, -1, (owner * M + token) * D + turn)
        tl.store(home + token * K + k, place, mask=(k < K) & real)
    inside = (column < WIDTH) & real
    values = tl.load(x + token * x_stride + column, mask=inside)
    if GROUPS:
        scales = tl.load(scale + token * scale_stride + group, mask=(group < GROUPS) & real)
    for rank in range(W):
        row = rank * M + token
        wanted = tl.max((owner == rank).to(tl.int32), 0) > 0
        if wanted:
            tl.store(to_x + row * to_x_stride + column, values, mask=inside)
        if first_block:
            tl.store(to_ids + row * to_ids_stride + k, tl.where(wanted, chosen, -1), mask=k < K)
            if GROUPS:
                tl.store(to_scale + row * to_scale_stride + group, scales, mask=(group < GROUPS) & wanted)


@triton.jit(do_not_specialize=["rows", "capacity"])
def find_slots(
    ids,  # int32 or int64 [R, K], unit stride
    table,  # int32 [E], global id → local or -1
    place,  # int64 [R, K]
    counts,  # int32 [E_l]
    rows,  # R
    capacity,  # C
    ids_stride,
    MAPPED: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for each local expert, which walks over all rows in their order."""
    expert = tl.program_id(0)
    k = tl.arange(0, KP)
    taken = tl.zeros((), tl.int32)
    for start in range(0, rows, BLOCK):
        row = (start + tl.arange(0, BLOCK)).to(tl.int64)
        there = (row < rows)[:, None] & (k < K)[None, :]
        local = tl.load(ids + row[:, None] * ids_stride + k[None, :], mask=there, other=-1).to(tl.int32)
        if MAPPED:
            local = tl.load(table + local, mask=local >= 0, other=-1)
        mine = local == expert
        hit = tl.max(mine.to(tl.int32), 1)
        slot = taken + tl.cumsum(hit, 0) - 1
        taken += tl.sum(hit, 0)
        found = tl.where(slot < capacity, expert.to(tl.int64) * capacity + slot, -1)
        at = place + row[:, None] * K + k[None, :]
        tl.store(at, tl.broadcast_to(found[:, None], (BLOCK, KP)), mask=there & mine)
        if expert == 0:
            tl.store(at, tl.full((BLOCK, KP), -1, tl.int64), mask=there & (local < 0))
    tl.store(counts + expert, taken)


@triton.jit
def to_slots(
    rows,  # [R, WIDTH], unit stride
    scale,  # [R, GROUPS], unit stride
    place,  # int64 [R, K]
    x,  # [E_l · C, WIDTH], contiguous
    x_scale,  # [E_l · C, GROUPS], contiguous
    rows_stride,
    scale_stride,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Programs (R, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    group = tl.arange(0, BLOCK_G)
    k = tl.arange(0, KP)
    places = tl.load(place + row * K + k, mask=k < K, other=-1)
    if tl.max(places, 0) >= 0:
        values = tl.load(rows + row * rows_stride + column, mask=column < WIDTH)
        if GROUPS:
            scales = tl.load(scale + row * scale_stride + group, mask=group < GROUPS)
        for index in tl.static_range(K):
            slot = _at(places, k, index)
            if slot >= 0:
                tl.store(x + slot * WIDTH + column, values, mask=column < WIDTH)
                if GROUPS:
                    first_block = tl.program_id(1) == 0
                    tl.store(x_scale + slot * GROUPS + group, scales, mask=(group < GROUPS) & first_block)


@triton.jit
def from_slots(
    y,  # [E_l · C, WIDTH], unit stride
    place,  # int64 [R, K]
    back,  # [R · D, WIDTH], contiguous
    y_stride,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs (R, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, KP)
    places = tl.load(place + row * K + k, mask=k < K, other=-1)
    alone = ((_first(places, k, KP) == k) & (places >= 0)).to(tl.int32)
    turns = tl.cumsum(alone, 0) - 1
    for index in tl.static_range(K):
        if _at(alone, k, index) > 0:
            slot, turn = _at(places, k, index), _at(turns, k, index)
            values = tl.load(y + slot * y_stride + column, mask=column < WIDTH)
            tl.store(back + (row * D + turn) * WIDTH + column, values, mask=column < WIDTH)


@triton.jit
def weigh_and_sum(
    rows,  # [N, WIDTH], unit stride
    place,  # int64 [T, K]
    weights,  # float32 [T, K], contiguous
    out,  # [T, WIDTH], unit stride
    rows_stride,
    out_stride,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs (T, blocks of columns)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, KP)
    places = tl.load(place + token * K + k, mask=k < K, other=-1)
    # what stands where a choice has no row may be NaN, and NaN · 0 would be NaN: neither is read
    factors = tl.load(weights + token * K + k, mask=places >= 0, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for index in tl.static_range(K):
        slot = _at(places, k, index)
        values = tl.load(rows + slot * rows_stride + column, mask=(column < WIDTH) & (slot >= 0), other=0.0)
        total += values.to(tl.float32) * _at(factors, k, index)
    tl.store(out + token * out_stride + column, total.to(out.dtype.element_ty), mask=column < WIDTH)
