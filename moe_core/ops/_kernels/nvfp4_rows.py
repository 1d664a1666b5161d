"""NVFP4 experts for some rows an expert: each program finds its expert's rows and streams weights past them (Gluon).

T tokens · H hidden · I intermediate · E_l local experts · K top-k · C row capacity; slot s = t * K + k. LEN is the
length of the dot products, R the rows of a weight matrix, N the columns of the result, NT eights of rows multiplied at
once. Warps, tiles and blocks as in `nvfp4.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_core.ops._kernels.dependent import let_next_kernel_come, wait_for_kernel_before
from moe_core.ops._kernels.nvfp4 import (
    activated,
    load_tiles,
    loads_stay_above,
    multiply_tiles,
    result_pairs,
    row_tile,
    row_words,
    scales_of,
)


@gluon.jit
def _eight_rows(slot_of_row, row_0, m_0, count, LISTED: gl.constexpr, LAYOUT: gl.constexpr):
    """(number, slot) of eight rows of an expert, from its m_0-th on; past its last row, of that one.

    Without a list rows are the buffer's own, and there are no slots.
    """
    row = row_0 + gl.minimum(m_0 + gl.arange(0, 8, LAYOUT), count - 1)
    slot = row
    if LISTED:
        slot = gl.load(slot_of_row + row)
    return row, slot


@gluon.jit
def _per_lane(eight, LAYOUT: gl.constexpr):
    """`[8]` -> `[threads]`: lane 4 * g + q gets value g."""
    SPREAD: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 8, 4], [gl.num_warps(), 1, 1], [2, 1, 0])
    spread = gl.zeros((gl.num_warps(), 8, 4), eight.dtype, SPREAD)
    spread += gl.convert_layout(eight, gl.SliceLayout(0, gl.SliceLayout(2, SPREAD)))[None, :, None]
    return gl.convert_layout(gl.reshape(spread, (32 * gl.num_warps(),)), LAYOUT)


@gluon.jit
def _per_result(eight, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """`[8]` -> `[ROWS, 2]`: result line 4 * g + q gets values 2 q and 2 q + 1."""
    SPREAD: gl.constexpr = gl.BlockedLayout([1, 1, 2], [8, 4, 1], [gl.num_warps(), 1, 1], [2, 1, 0])
    spread = gl.zeros((ROWS // 4, 4, 2), eight.dtype, SPREAD)
    spread += gl.convert_layout(gl.reshape(eight, (4, 2)), gl.SliceLayout(0, SPREAD))[None, :, :]
    return gl.convert_layout(gl.reshape(spread, (ROWS, 2)), LAYOUT)


@gluon.jit
def _rows_of_expert(row_end, expert, capacity, BATCHED: gl.constexpr):
    """(first row, number of rows). BATCHED: `row_end` holds the counts, and each expert has `capacity` rows."""
    if BATCHED:
        count = gl.load(row_end + expert)
        return expert * capacity, gl.maximum(gl.minimum(count, capacity), 0)
    else:
        start = gl.load(row_end + expert - 1, mask=expert > 0, other=0)
        return start, gl.load(row_end + expert) - start


@gluon.jit
def _store_rows(
    acc, row, slot, weights, scale, scale_2, bias, c, expert, m_0, count, tile_0, stride_c: gl.constexpr,
    R: gl.constexpr, N: gl.constexpr, UP: gl.constexpr,
    ACT: gl.constexpr, GATED: gl.constexpr, UP_FIRST: gl.constexpr, INTERLEAVED: gl.constexpr,
    ALPHA: gl.constexpr, LIMIT: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr, WR: gl.constexpr, WK: gl.constexpr,
):  # fmt: skip
    """Rows `row` (`[8]`) of c, for the WR tiles from tile_0 on."""
    OUT: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [gl.num_warps(), 1], [1, 0])
    low, high = result_pairs(acc, WR, WK, OUT)
    line = gl.arange(0, 32 * WR, gl.SliceLayout(1, OUT))
    pair = gl.arange(0, 2, gl.SliceLayout(0, OUT))
    tile = tile_0 + line // 32
    ok = (tile < R // 16)[:, None] & (m_0 + (2 * (line % 4))[:, None] + pair[None, :] < count)
    column = (tile * (8 if UP and GATED else 16) + line % 32 // 4)[:, None] + pair[None, :] * 0
    row = _per_result(row, 32 * WR, OUT)
    low, high = low * scale, high * scale_2
    if UP:
        if WEIGHT_ON_INPUT:
            weight = gl.load(weights + _per_result(slot, 32 * WR, OUT), mask=ok, other=0)
            low, high = low * weight, high * weight
        low, high = activated(
            low, high, expert, bias, column, ok, N, ACT, GATED, UP_FIRST, INTERLEAVED, ALPHA, LIMIT
        )  # fmt: skip
    elif bias is not None:
        low += gl.load(bias + expert * N + column, mask=ok, other=0).to(gl.float32)
        high += gl.load(bias + expert * N + column + 8, mask=ok, other=0).to(gl.float32)
    at = c + row.to(gl.int64) * stride_c + column
    gl.store(at, low.to(c.dtype.element_ty), mask=ok)
    if not (UP and GATED):
        gl.store(at + 8, high.to(c.dtype.element_ty), mask=ok)


@gluon.jit(do_not_specialize=["capacity"])
def nvfp4_rows_kernel(
    x, slot_of_row, row_end, weights, w, w_scale, w_global, bias, c, capacity,
    stride_x: gl.constexpr, stride_c: gl.constexpr, shift_x: gl.constexpr, shift_c: gl.constexpr,
    LEN: gl.constexpr, R: gl.constexpr, N: gl.constexpr, K: gl.constexpr, UP: gl.constexpr, BATCHED: gl.constexpr,
    ACT: gl.constexpr, GATED: gl.constexpr, UP_FIRST: gl.constexpr, INTERLEAVED: gl.constexpr,
    ALPHA: gl.constexpr, LIMIT: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr, NT: gl.constexpr,
    WR: gl.constexpr, WK: gl.constexpr, RT: gl.constexpr, FEW: gl.constexpr, FENCED: gl.constexpr, PDL: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """c = activation(x rows @ w[e].T) of program 1's expert, or for the down product without one, for RT * WR tiles.

    x rows are tokens and c rows are grouped by expert in the up product; x rows are grouped and c rows are slots in the
    down product; BATCHED, all are rows of the padded buffer. Weights stream past 8 NT rows at once; an expert with more
    reads them again, from L2. shift_x and shift_c as in `grouped.py`. FEW > 0: experts with more rows are left to
    other kernels.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [num_warps, 1], [1, 0])
    EIGHT: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 1], [4, 8], [num_warps, 1], [1, 0]))
    TILES: gl.constexpr = LEN // 64
    BLOCKS: gl.constexpr = TILES // 4
    TAIL: gl.constexpr = TILES % 4
    STEPS: gl.constexpr = (BLOCKS + WK - 1) // WK
    expert = gl.program_id(1)
    if PDL:
        if UP:
            # The next kernel reads the lists without a wait of its own: it may start after this one's.
            wait_for_kernel_before()
        let_next_kernel_come()
    row_0, count = _rows_of_expert(row_end, expert, capacity, BATCHED)
    here = count > 0
    if FEW > 0:
        here = here & (count <= FEW)
    if here:
        if shift_x:
            x += expert.to(gl.int64) * shift_x
        if shift_c:
            c += expert.to(gl.int64) * shift_c
        scale, scale_2 = scales_of(w_global, expert, UP, GATED, UP_FIRST)
        thread = gl.arange(0, 32 * num_warps, gl.SliceLayout(1, L))
        lane, warp = thread % 32, thread // 32
        first = warp % WK
        mine = first == BLOCKS % WK
        tile = gl.program_id(0) * (WR * RT) + warp // WK
        for m_0 in range(0, count, 8 * NT):
            w_ptr, s_ptr = row_tile(w, w_scale, expert, tile, lane, TILES, R)
            block = load_tiles(w_ptr, s_ptr, lane, first, first < BLOCKS, 4)
            rows = ()
            slots = ()
            for n in gl.static_range(NT):
                row, slot = _eight_rows(slot_of_row, row_0, m_0 + 8 * n, count, not BATCHED, EIGHT)
                rows = rows + (row,)  # type: ignore[assignment]
                slots = slots + (slot,)  # type: ignore[assignment]
            if PDL and not UP:
                wait_for_kernel_before()
            x_ptrs = ()
            for n in gl.static_range(NT):
                x_row = rows[n]  # type: ignore[var-annotated]
                if UP and not BATCHED:
                    x_row = slots[n] // K
                x_ptrs = x_ptrs + (row_words(x, _per_lane(x_row, gl.SliceLayout(1, L)), lane % 4, stride_x),)  # type: ignore[assignment]
            for r in range(RT):
                accs = ()
                for _ in gl.static_range(NT):
                    accs = accs + (gl.zeros((32 * num_warps, 4), gl.float32, L),)  # type: ignore[assignment]
                tail = load_tiles(w_ptr, s_ptr, lane, BLOCKS + first * 0, mine, TAIL)
                for step in range(STEPS):
                    i = first + step * WK
                    ahead = i + WK
                    there = ahead < BLOCKS
                    if RT > 1:
                        if step == STEPS - 1:
                            w_ptr, s_ptr = row_tile(w, w_scale, expert, tile + (r + 1) * WR, lane, TILES, R)
                            ahead = first
                            there = (first < BLOCKS) & (r + 1 < RT)
                    following = load_tiles(w_ptr, s_ptr, lane, ahead, there, 4)
                    if FENCED:
                        loads_stay_above()
                    accs = multiply_tiles(block, x_ptrs, i, accs, i < BLOCKS, STEPS * WK > BLOCKS, 4, NT, False)
                    block = following
                if STEPS == 0:
                    # Dot products of less than a block: no step has moved on to the next row of tiles.
                    w_ptr, s_ptr = row_tile(w, w_scale, expert, tile + (r + 1) * WR, lane, TILES, R)
                accs = multiply_tiles(tail, x_ptrs, BLOCKS + first * 0, accs, mine, WK > 1, TAIL, NT, False)
                for n in gl.static_range(NT):
                    _store_rows(
                        accs[n], rows[n] if UP else slots[n], slots[n], weights, scale, scale_2, bias, c, expert,
                        m_0 + 8 * n, count, (gl.program_id(0) * RT + r) * WR, stride_c, R, N, UP, ACT, GATED, UP_FIRST,
                        INTERLEAVED, ALPHA, LIMIT, WEIGHT_ON_INPUT, WR, WK,
                    )  # fmt: skip
    else:
        if PDL and not UP:
            # The next kernel's wait for this one must cover the up product's too.
            wait_for_kernel_before()
