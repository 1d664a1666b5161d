"""Groups slots by expert and cuts each group into row tiles: one launch, stable, no atomics, no shared state.

T tokens · E_l local experts · C row capacity · K top-k; slot s = t * K + k.

Tiles: expert e owns the tile numbers offset[e] // BM + e .. offset[e + 1] // BM + e + 1, which always suffices for its
rows and needs no sum over the other experts' tile counts. Numbers without rows hold expert -1.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _ids_block(ids, first, lane_end, valid_slots, VEC: tl.constexpr):
    """VEC ids of every warp, from `first` on, and their slots; -1 past its part and past the valid slots."""
    slot = first[:, None] + tl.arange(0, VEC)[None, :]
    mine = (slot < lane_end[:, None]) & (slot < valid_slots)
    return tl.load(ids + slot, mask=mine, other=-1).to(tl.int32), slot


@triton.jit
def _write_tiles(tile_expert, tile_row, row_end, expert, offset, count, end_tile, BM: tl.constexpr):
    """One expert's end and its tile numbers."""
    tl.store(row_end + expert, offset + count)
    first_tile = offset // BM + expert
    used_tiles = tl.cdiv(count, BM)
    step = tl.arange(0, 32)
    for i in range(0, end_tile - first_tile, 32):
        j = i + step
        mine = j < end_tile - first_tile
        tl.store(tile_expert + first_tile + j, tl.where(j < used_tiles, expert, -1), mask=mine)
        tl.store(tile_row + first_tile + j, offset + j * BM, mask=mine)


@triton.jit(do_not_specialize=["num_slots"])
def align_kernel(
    ids, num_rows, slot_of_row, row_of_slot, row_end, tile_expert, tile_row, num_slots,
    K: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    BY_4: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program's two experts: counts the ids below and equal, then writes their slots in order and their tiles.

    Every program reads all ids, twice: nothing is shared, so there is nothing to clear or to wait for. Each of LANES
    warps owns a contiguous part of the slots and reads VEC of them at a time: its prefix sums stay inside the warp.
    BY_4: the number of slots is a multiple of 4, which loads of 16 bytes need to know.
    """
    first = tl.program_id(0) * 2
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    valid_slots = num_slots
    if num_rows is not None:
        valid_slots = tl.minimum(num_slots, tl.load(num_rows) * K)
    if BY_4:
        valid_slots = valid_slots // 4 * 4
    length = tl.cdiv(tl.cdiv(valid_slots, LANES), VEC) * VEC
    start = tl.arange(0, LANES) * length
    below = tl.zeros((LANES,), tl.int32)
    equal_0 = tl.zeros((LANES,), tl.int32)
    equal_1 = tl.zeros((LANES,), tl.int32)
    for i in tl.range(0, length, VEC):
        chosen, _ = _ids_block(ids, start + i, start + length, valid_slots, VEC)
        below += tl.sum(((chosen >= 0) & (chosen < first)).to(tl.int32), 1)
        equal_0 += tl.sum((chosen == first).to(tl.int32), 1)
        equal_1 += tl.sum((chosen == first + 1).to(tl.int32), 1)
    count_0 = tl.sum(equal_0, 0)
    count_1 = tl.sum(equal_1, 0)
    offset_0 = tl.sum(below, 0)
    offset_1 = offset_0 + count_0
    # The last expert also empties the tile numbers that no expert can need.
    all_tiles = num_slots // BM + E
    end_tile = tl.where(first == E - 1, all_tiles, offset_1 // BM + first + 1)
    _write_tiles(tile_expert, tile_row, row_end, first, offset_0, count_0, end_tile, BM)
    if first + 1 < E:
        end_tile = tl.where(first == E - 2, all_tiles, (offset_1 + count_1) // BM + first + 2)
        _write_tiles(tile_expert, tile_row, row_end, first + 1, offset_1, count_1, end_tile, BM)
    position_0 = offset_0 + tl.cumsum(equal_0, 0) - equal_0
    position_1 = offset_1 + tl.cumsum(equal_1, 0) - equal_1
    for i in tl.range(0, length, VEC):
        chosen, slot = _ids_block(ids, start + i, start + length, valid_slots, VEC)
        second = chosen == first + 1
        hit = second | (chosen == first)
        # Both experts in one prefix sum: a block has fewer than 2**15 ids.
        ones = tl.where(second, 65536, hit.to(tl.int32))
        rank = tl.cumsum(ones, 1)
        row = tl.where(second, position_1[:, None] + (rank >> 16), position_0[:, None] + (rank & 65535)) - 1
        tl.store(slot_of_row + row, slot, mask=hit)
        tl.store(row_of_slot + slot, row, mask=hit)
        block = tl.sum(ones, 1)
        position_0 += block & 65535
        position_1 += block >> 16


@triton.jit(do_not_specialize=["capacity"])
def batched_tiles_kernel(
    tokens_per_expert, row_end, tile_expert, tile_row, num_tiles, capacity,
    E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tiles of the first tokens_per_expert[e] rows of each expert's C rows; rows are numbered e * C + i."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    e = tl.arange(0, EP)
    count = tl.load(tokens_per_expert + e, mask=e < E, other=0)
    count = tl.maximum(tl.minimum(count, capacity), 0)
    tl.store(row_end + e, e * capacity + count, mask=e < E)
    tiles = tl.cdiv(count, BM)
    end = tl.cumsum(tiles, 0)
    tl.store(num_tiles, tl.sum(tiles, 0))
    step = tl.arange(0, 16)
    for i in range(0, tl.max(tiles, 0), 16):
        j = i + step[None, :]
        at = (end - tiles)[:, None] + j
        mine = j < tiles[:, None]
        tl.store(tile_expert + at, e[:, None] + tl.zeros_like(j), mask=mine)
        tl.store(tile_row + at, (e * capacity)[:, None] + j * BM, mask=mine)
