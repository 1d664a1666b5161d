"""Groups slots by expert and cuts each group into row tiles: one launch, stable, no shared state.

T tokens · E_l local experts · C row capacity · K top-k; slot s = t * K + k.

Tiles: expert e owns the tile numbers offset[e] // BM + e .. offset[e + 1] // BM + e + 1, which always suffices for its
rows and needs no sum over the other experts' tile counts. Numbers without rows hold expert -1.

SHORT > 0: LISTED neighbouring experts share their tile numbers, and among them come first those whose last tile has at
most SHORT rows and goes along with the one before it (`grouped.py`): a GEMM that ends with shorter tiles leaves fewer
processors idle.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _ids_block(ids, first, end, VEC: tl.constexpr):
    """VEC ids of every warp, from `first` on, and their slots; -1 from the warp's `end` on."""
    slot = first[:, None] + tl.arange(0, VEC)[None, :]
    return tl.load(ids + slot, mask=slot < end[:, None], other=-1).to(tl.int32), slot


@triton.jit
def _place(slot_of_row, row_of_slot, chosen, slot, first, row_0, row_1, PAIR: tl.constexpr):
    """Writes the rows of a block's slots that chose `first`, or with PAIR the expert after it, behind each warp's
    last rows; returns the last rows now."""
    hit = chosen == first
    ones = hit.to(tl.int32)
    if PAIR:
        # Both experts in one prefix sum: a block has fewer than 2**15 ids.
        ones += (chosen == first + 1).to(tl.int32) << 16
    rank = tl.cumsum(ones, 1)
    row = row_0[:, None] + (rank & 65535)
    if PAIR:
        row = tl.where(hit, row, row_1[:, None] + (rank >> 16))
    # In any order: each thread then writes what it has, and nothing moves through shared memory.
    pair = tl.where(ones > 0, row.to(tl.int64) << 32 | slot, -1)
    pair = tl.reshape(pair, (chosen.shape[0] * chosen.shape[1],), can_reorder=True)
    tl.store(slot_of_row + (pair >> 32), pair.to(tl.int32), mask=pair >= 0)
    tl.store(row_of_slot + pair.to(tl.int32), (pair >> 32).to(tl.int32), mask=pair >= 0)
    block = tl.sum(ones, 1)
    return row_0 + (block & 65535), row_1 + (block >> 16)


@triton.jit
def _write_tiles(
    tile_expert, tile_row, row_end, expert, offset, count, num_slots, E: tl.constexpr, BM: tl.constexpr,
    SHORT: tl.constexpr,
):  # fmt: skip
    """One expert's end and its tile numbers; the last expert also empties the numbers that no expert can need."""
    tl.store(row_end + expert, offset + count)
    if SHORT:
        return
    first_tile = offset // BM + expert
    end_tile = (offset + count) // BM + expert + 1
    if expert == E - 1:
        end_tile = num_slots // BM + E
    used_tiles = tl.cdiv(count, BM)
    step = tl.arange(0, 32)
    for i in range(0, end_tile - first_tile, 32):
        j = i + step
        mine = j < end_tile - first_tile
        tl.store(tile_expert + first_tile + j, tl.where(j < used_tiles, expert, -1), mask=mine)
        tl.store(tile_row + first_tile + j, offset + j * BM, mask=mine)


@triton.jit
def _write_list(
    ids, tile_expert, tile_row, num_slots, valid_slots, low, E: tl.constexpr, LISTED: tl.constexpr, BM: tl.constexpr,
    SHORT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tiles of the LISTED experts from `low` on, by one program, which counts ids itself and so waits for no other.

    A histogram of few experts is cheap, and the programs of all lists take no longer than the others beside them.
    """
    counts = tl.zeros((LISTED,), tl.int32)
    below = tl.zeros((BLOCK,), tl.int32)
    for i in tl.range(0, valid_slots, BLOCK):
        slot = i + tl.arange(0, BLOCK)
        chosen = tl.load(ids + slot, mask=slot < valid_slots, other=-1).to(tl.int32)
        below += ((chosen >= 0) & (chosen < low)).to(tl.int32)
        mine = (chosen >= low) & (chosen < tl.minimum(low + LISTED, E))
        counts += tl.histogram(tl.where(mine, chosen - low, 0), LISTED, mask=mine)
    start = tl.sum(below, 0)
    offset = start + tl.cumsum(counts, 0) - counts
    tiles = tl.cdiv(counts, BM)
    rest = counts % BM
    first = (tiles > 1) & (rest > 0) & (rest <= SHORT)
    tiles_first = tl.where(first, tiles, 0)
    tiles_after = tiles - tiles_first
    end = tl.where(first, tl.cumsum(tiles_first, 0), tl.sum(tiles_first, 0) + tl.cumsum(tiles_after, 0))
    first_tile = start // BM + low
    e = low + tl.arange(0, LISTED)
    step = tl.arange(0, 16)
    for i in range(0, tl.max(tiles, 0), 16):
        j = i + step[None, :]
        at = first_tile + (end - tiles)[:, None] + j
        wanted = j < tiles[:, None]
        tl.store(tile_expert + at, e[:, None] + tl.zeros_like(j), mask=wanted)
        tl.store(tile_row + at, offset[:, None] + j * BM, mask=wanted)
    end_tile = (start + tl.sum(counts, 0)) // BM + low + LISTED
    if low + LISTED >= E:
        end_tile = num_slots // BM + E
    for i in range(first_tile + tl.sum(tiles, 0), end_tile, 64):
        at = i + tl.arange(0, 64)
        tl.store(tile_expert + at, tl.full((64,), -1, tl.int32), mask=at < end_tile)


@triton.jit
def _keep_rows(x, tokens, stride_x: tl.constexpr, H: tl.constexpr, LINES: tl.constexpr, THREADS: tl.constexpr):
    """Asks for the first LINES lines of 128 bytes of x [T, H] into L2, to be evicted last: weights stream past them."""
    BYTES: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
    PER_ROW: tl.constexpr = (H * BYTES + 127) // 128
    lines = tl.minimum(tokens * PER_ROW, LINES)
    for i in tl.range(tl.program_id(0) * THREADS, lines, tl.num_programs(0) * THREADS):
        line = tl.minimum(i + tl.arange(0, THREADS), lines - 1)
        address = x.to(tl.int64) + (line // PER_ROW).to(tl.int64) * (stride_x * BYTES) + line % PER_ROW * 128
        tl.inline_asm_elementwise(
            "prefetch.global.L2::evict_last [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_slots"])
def align_kernel(
    ids, num_rows, slot_of_row, row_of_slot, row_end, tile_expert, tile_row, num_slots, x, stride_x: tl.constexpr,
    H: tl.constexpr, KEEP: tl.constexpr,
    K: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    BY_4: tl.constexpr, PDL: tl.constexpr, PAIR: tl.constexpr, SHORT: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """A program's expert, or two (PAIR): counts the ids below and equal, then writes their slots in order and tiles.

    Every program reads all ids, twice: nothing is shared, so there is nothing to clear or to wait for. Each of LANES
    warps owns a contiguous part of the slots and reads VEC of them at a time: its prefix sums stay inside the warp.
    BY_4: the number of slots is a multiple of 4, which loads of 16 bytes need to know. SHORT: see above; further
    programs then write the tiles of LISTED experts each. KEEP: lines of x to be kept in L2, 0 for none.
    """
    first = tl.program_id(0) * 2 if PAIR else tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if KEEP:
        _keep_rows(x, num_slots // K, stride_x, H, KEEP, 32 * LANES)
    valid_slots = num_slots
    if num_rows is not None:
        valid_slots = tl.minimum(num_slots, tl.load(num_rows) * K)
    if BY_4:
        valid_slots = valid_slots // 4 * 4
    if SHORT:
        counting = tl.cdiv(E, 2) if PAIR else E
        if tl.program_id(0) >= counting:
            low = (tl.program_id(0) - counting) * LISTED
            _write_list(ids, tile_expert, tile_row, num_slots, valid_slots, low, E, LISTED, BM, SHORT, 4 * LANES * VEC)
            return
    length = tl.cdiv(tl.cdiv(valid_slots, LANES), VEC) * VEC
    start = tl.arange(0, LANES) * length
    end = tl.minimum(start + length, valid_slots)
    below = tl.zeros((LANES, VEC), tl.int32)
    equal_0 = tl.zeros((LANES, VEC), tl.int32)
    equal_1 = tl.zeros((LANES, VEC), tl.int32)
    for i in tl.range(0, length, VEC, loop_unroll_factor=4):
        chosen, _ = _ids_block(ids, start + i, end, VEC)
        below += ((chosen >= 0) & (chosen < first)).to(tl.int32)
        equal_0 += (chosen == first).to(tl.int32)
        if PAIR:
            equal_1 += (chosen == first + 1).to(tl.int32)
    equal_0 = tl.sum(equal_0, 1)
    equal_1 = tl.sum(equal_1, 1)
    offset_0 = tl.sum(tl.sum(below, 1), 0)
    offset_1 = offset_0 + tl.sum(equal_0, 0)
    _write_tiles(tile_expert, tile_row, row_end, first, offset_0, offset_1 - offset_0, num_slots, E, BM, SHORT)
    if PAIR and first + 1 < E:
        _write_tiles(tile_expert, tile_row, row_end, first + 1, offset_1, tl.sum(equal_1, 0), num_slots, E, BM, SHORT)
    row_0 = offset_0 + tl.cumsum(equal_0, 0) - equal_0 - 1
    row_1 = offset_1 + tl.cumsum(equal_1, 0) - equal_1 - 1
    for i in tl.range(0, length, 4 * VEC):
        # Four blocks are requested before the first one is used: a store keeps later loads behind it.
        chosen_0, slot_0 = _ids_block(ids, start + i, end, VEC)
        chosen_1, slot_1 = _ids_block(ids, start + i + VEC, end, VEC)
        chosen_2, slot_2 = _ids_block(ids, start + i + 2 * VEC, end, VEC)
        chosen_3, slot_3 = _ids_block(ids, start + i + 3 * VEC, end, VEC)
        row_0, row_1 = _place(slot_of_row, row_of_slot, chosen_0, slot_0, first, row_0, row_1, PAIR)
        row_0, row_1 = _place(slot_of_row, row_of_slot, chosen_1, slot_1, first, row_0, row_1, PAIR)
        row_0, row_1 = _place(slot_of_row, row_of_slot, chosen_2, slot_2, first, row_0, row_1, PAIR)
        row_0, row_1 = _place(slot_of_row, row_of_slot, chosen_3, slot_3, first, row_0, row_1, PAIR)


@triton.jit(do_not_specialize=["capacity"])
def batched_tiles_kernel(
    tokens_per_expert, row_end, tile_expert, tile_row, num_tiles, capacity,
    E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, FEW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tiles of the first tokens_per_expert[e] rows of each expert's C rows; rows are numbered e * C + i.

    An expert with up to FEW rows gets none.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    e = tl.arange(0, EP)
    count = tl.load(tokens_per_expert + e, mask=e < E, other=0)
    count = tl.maximum(tl.minimum(count, capacity), 0)
    tl.store(row_end + e, e * capacity + count, mask=e < E)
    tiles = tl.where(count > FEW, tl.cdiv(count, BM), 0)
    end = tl.cumsum(tiles, 0)
    tl.store(num_tiles, tl.sum(tiles, 0))
    step = tl.arange(0, 16)
    for i in range(0, tl.max(tiles, 0), 16):
        j = i + step[None, :]
        at = (end - tiles)[:, None] + j
        mine = j < tiles[:, None]
        tl.store(tile_expert + at, e[:, None] + tl.zeros_like(j), mask=mine)
        tl.store(tile_row + at, (e * capacity)[:, None] + j * BM, mask=mine)
