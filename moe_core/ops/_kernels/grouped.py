"""Both GEMMs for many rows: one program per (row tile, block of columns), each tile of one expert.

T tokens · H hidden · I intermediate · E_l local experts · K top-k; slot s = t * K + k. Rows are the slots grouped by
expert (`slot_of_row`), or in the batched format the rows e * C + i themselves. LEN is the length of a dot product,
N the number of output columns: (H, I) in the first GEMM, (I, H) in the second.

Row strides are constants: as arguments they would be known to be multiples of 16 or nothing, and a multiple of 8, which
is enough for loads of 16 bytes, would load 2 bytes at a time. shift_a and shift_c move each expert's rows that much
further than the one's before: 0 unless a batched buffer has another stride between experts than C rows.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_core.ops._kernels.activation import activate, gate_and_up


@triton.jit
def _swizzle(pid, tiles, blocks, GROUP: tl.constexpr):
    """(row tile, block of columns): GROUP row tiles share their blocks of weights in L2."""
    per_group = GROUP * blocks
    first = (pid // per_group) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    rest = pid % per_group
    return first + rest % size, rest // size


@triton.jit
def _weights_block(
    w,
    w_ptr,
    w_ok,
    expert,
    column,
    k,
    LEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BOX: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    MASK_N: tl.constexpr,
):
    """A [BK, WIDTH] block of weights. BOX: halves (1 or 2) that one tensor-map box takes."""
    if TMA == "k":
        block = tl.reshape(w.load([expert * BOX, column, k]), (WIDTH, BK)).T
    elif TMA == "n":
        block = tl.reshape(w.load([expert, k, column]), (BK, WIDTH))
    elif LEN % BK:
        block = tl.load(w_ptr, mask=(tl.arange(0, BK) < LEN - k)[:, None] & w_ok[None, :], other=0)
    elif MASK_N:
        block = tl.load(w_ptr, mask=w_ok[None, :], other=0)
    else:
        block = tl.load(w_ptr)
    return block


@triton.jit
def _rows(slot_of_row, row_0, row_end, M: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr, WEIGHTED: tl.constexpr):
    """M rows from row_0 on: (row, whether it is this expert's, its slot, the row of a that it reads)."""
    row = row_0 + tl.arange(0, M)
    row_ok = row < row_end
    slot = row
    if GATHER or WEIGHTED:
        slot = tl.load(slot_of_row + row, mask=row_ok, other=0)
    a_row = slot // K if GATHER else row
    return row, row_ok, slot, a_row


@triton.jit
def _a_block(a_map, a_ptr, row_0, row_ok, k, LEN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """A block of activations, BK long. Rows that aren't there are masked: 2 % of Qwen3-30B's step at T = 1024."""
    if TMA:
        block = a_map.load([row_0, k])
    elif LEN % BK:
        block = tl.load(a_ptr, mask=row_ok[:, None] & (tl.arange(0, BK) < LEN - k)[None, :], other=0)
    else:
        block = tl.load(a_ptr, mask=row_ok[:, None], other=0)
    return block


@triton.jit
def _write(
    acc, acc_2, bias, c, weights, expert, row, row_ok, slot, n, stride_c: tl.constexpr, N: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, UP_FIRST: tl.constexpr, DOUBLE: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, WEIGHTED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Router weight, bias and activation of a block's products, and its rows of c."""
    if WEIGHTED:
        scale = tl.load(weights + slot, mask=row_ok, other=0)[:, None]
        acc = acc * scale
        acc_2 = acc_2 * scale
    gate, up = acc, acc_2
    if DOUBLE:
        gate, up = gate_and_up(acc, BN, INTERLEAVED, False)
    if bias is not None:
        STEP: tl.constexpr = 2 if INTERLEAVED else 1
        b_ptr = bias + expert.to(tl.int64) * (2 * N if GATED else N) + n * STEP
        gate += tl.load(b_ptr, mask=n < N, other=0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(b_ptr + (1 if INTERLEAVED else N), mask=n < N, other=0).to(tl.float32)[None, :]
    if GATED and UP_FIRST:
        h = activate(up, gate, ACT, True, ALPHA, LIMIT)
    elif ACT is not None:
        h = activate(gate, up, ACT, GATED, ALPHA, LIMIT)
    else:
        h = gate
    tl.store(c + row.to(tl.int64)[:, None] * stride_c + n[None, :], h.to(c.dtype.element_ty),
             mask=row_ok[:, None] & (n < N)[None, :])  # fmt: skip


@triton.jit
def _tile(
    a, a_map, a_map_more, w, bias, c, slot_of_row, weights, stride_a: tl.constexpr, stride_c: tl.constexpr,
    shift_a: tl.constexpr, shift_c: tl.constexpr, expert, row_0, row_end, block,
    LEN: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WE: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, UP_FIRST: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr, PRECISION: tl.constexpr, TMA_A: tl.constexpr, TMA_W: tl.constexpr,
    BM: tl.constexpr, MORE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One [BM + MORE, BN] block of c. GATED: gate and up columns are multiplied and only their product is written.

    MORE: rows after the first BM, a product of their own with the same block of weights.
    """
    # Halves through pointers: two accumulators. Through a tensor map: its box takes the gate rows and the up rows, so
    # that one matrix instruction covers both, as with interleaved rows.
    PAIR: tl.constexpr = GATED and not INTERLEAVED and TMA_W == ""
    DOUBLE: tl.constexpr = GATED and not PAIR
    WIDTH: tl.constexpr = 2 * BN if DOUBLE else BN
    ROWS: tl.constexpr = 2 * N if INTERLEAVED else N
    tl.static_assert(not (PAIR and MORE))
    kk = tl.arange(0, BK)
    if shift_a:
        a += expert.to(tl.int64) * shift_a
    if shift_c:
        c += expert.to(tl.int64) * shift_c
    row, row_ok, slot, a_row = _rows(slot_of_row, row_0, row_end, BM, K, GATHER, WEIGHTED)
    a_ptr = a
    if not TMA_A:
        a_ptr = a + a_row.to(tl.int64)[:, None] * stride_a + kk[None, :]
    a_ptr_more = a
    row_more, row_ok_more, slot_more = row, row_ok, slot
    if MORE:
        row_more, row_ok_more, slot_more, a_row = _rows(slot_of_row, row_0 + BM, row_end, MORE, K, GATHER, WEIGHTED)
        if not TMA_A:
            a_ptr_more = a + a_row.to(tl.int64)[:, None] * stride_a + kk[None, :]
    column = block * (2 * BN if INTERLEAVED else BN)
    w_row = column + tl.arange(0, WIDTH)
    w_ok = w_row < ROWS
    MASK_N: tl.constexpr = ROWS % (2 * BN if INTERLEAVED else BN) != 0
    w_ptr = w
    if TMA_W == "":
        # Rows past the end are masked; their address must still be inside the tensor's 64-bit range only.
        w_ptr = w + expert.to(tl.int64) * WE + w_row.to(tl.int64)[None, :] * WN + kk[:, None] * WK
    acc = tl.zeros((BM, WIDTH), tl.float32)
    acc_2 = acc
    acc_more = tl.zeros((MORE if MORE else 1, WIDTH), tl.float32)
    for k in tl.range(0, LEN, BK, num_stages=STAGES):
        a_block = _a_block(a_map, a_ptr, row_0, row_ok, k, LEN, BK, TMA_A)
        w_block = _weights_block(w, w_ptr, w_ok, expert, column, k, LEN, WIDTH, 2 if DOUBLE and not INTERLEAVED else 1,
                                 BK, TMA_W, MASK_N)  # fmt: skip
        acc = tl.dot(a_block, w_block, acc, input_precision=PRECISION)
        if MORE:
            a_block = _a_block(a_map_more, a_ptr_more, row_0 + BM, row_ok_more, k, LEN, BK, TMA_A)
            acc_more = tl.dot(a_block, w_block, acc_more, input_precision=PRECISION)
        if PAIR:
            w_block = _weights_block(w, w_ptr + N * WN, w_ok, expert, column, k, LEN, WIDTH, 1, BK, TMA_W, MASK_N)
            acc_2 = tl.dot(a_block, w_block, acc_2, input_precision=PRECISION)
        if not TMA_A:
            a_ptr += BK
            if MORE:
                a_ptr_more += BK
        if TMA_W == "":
            w_ptr += BK * WK
    n = block * BN + tl.arange(0, BN)
    _write(acc, acc_2, bias, c, weights, expert, row, row_ok, slot, n, stride_c, N, ACT, GATED, INTERLEAVED, UP_FIRST,
           DOUBLE, ALPHA, LIMIT, WEIGHTED, BN)  # fmt: skip
    if MORE:
        _write(acc_more, acc_more, bias, c, weights, expert, row_more, row_ok_more, slot_more, n, stride_c, N, ACT,
               GATED, INTERLEAVED, UP_FIRST, DOUBLE, ALPHA, LIMIT, WEIGHTED, BN)  # fmt: skip


@triton.jit(do_not_specialize=["max_tiles"])
def grouped_gemm_kernel(
    a, a_map, a_map_small, w, bias, c, slot_of_row, row_end, tile_expert, tile_row, weights, num_tiles, max_tiles,
    stride_a: tl.constexpr, stride_c: tl.constexpr, shift_a: tl.constexpr, shift_c: tl.constexpr,
    LEN: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WE: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, UP_FIRST: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr, PRECISION: tl.constexpr, TMA_A: tl.constexpr, TMA_W: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BM_SMALL: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, GROUP: tl.constexpr, TALL: tl.constexpr, PERSISTENT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """c = activation(a @ w[e].T + bias[e]) per expert.

    SPLIT of this kernel's tiles make one of the list's. BM_SMALL < BM: an expert's last tile takes the small height if
    its rows fit; TALL: one program multiplies it together with the tile before it, whose weights it needs too.
    PERSISTENT: the programs walk the tiles; num_tiles is then read from the device if it is there.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    blocks: tl.constexpr = (N + BN - 1) // BN
    tiles = max_tiles * SPLIT
    if num_tiles is not None:
        tiles = tl.load(num_tiles) * SPLIT
    first = tl.program_id(0)
    end = tiles * blocks if PERSISTENT else tl.minimum(first + 1, tiles * blocks)
    step = tl.num_programs(0)
    for pid in tl.range(first, end, step):
        tile, block = _swizzle(pid, tiles, blocks, GROUP)
        expert = tl.load(tile_expert + tile // SPLIT)
        if expert >= 0:
            row_0 = tl.load(tile_row + tile // SPLIT) + tile % SPLIT * BM
            last = tl.load(row_end + expert)
            merged = False
            if TALL:
                # The tile before it in the list, if it is the same expert's, takes a short one along.
                merged = (last - row_0 <= BM_SMALL) & (tile > 0)
                if merged:
                    merged = tl.load(tile_expert + tile - 1) == expert
            if SPLIT > 1 and row_0 >= last:
                pass
            elif merged:
                pass
            elif BM_SMALL < BM and last - row_0 <= BM_SMALL:
                _tile(a, a_map_small, a_map_small, w, bias, c, slot_of_row, weights, stride_a, stride_c, shift_a,
                      shift_c, expert, row_0, last, block, LEN, N, K, WE, WN, WK, ACT, GATED, INTERLEAVED, UP_FIRST,
                      ALPHA, LIMIT, GATHER, WEIGHTED, PRECISION, TMA_A, TMA_W, BM_SMALL, 0, BN, BK,
                      STAGES)  # fmt: skip
            elif TALL and (last - row_0 > BM) & (last - row_0 <= BM + BM_SMALL):
                _tile(a, a_map, a_map_small, w, bias, c, slot_of_row, weights, stride_a, stride_c, shift_a,
                      shift_c, expert, row_0, last, block, LEN, N, K, WE, WN, WK, ACT, GATED, INTERLEAVED, UP_FIRST,
                      ALPHA, LIMIT, GATHER, WEIGHTED, PRECISION, TMA_A, TMA_W, BM, BM_SMALL, BN, BK,
                      STAGES)  # fmt: skip
            else:
                _tile(a, a_map, a_map, w, bias, c, slot_of_row, weights, stride_a, stride_c, shift_a,
                      shift_c, expert, row_0, last, block, LEN, N, K, WE, WN, WK, ACT, GATED, INTERLEAVED, UP_FIRST,
                      ALPHA, LIMIT, GATHER, WEIGHTED, PRECISION, TMA_A, TMA_W, BM, 0, BN, BK,
                      STAGES)  # fmt: skip
