"""Both GEMMs for many rows and e4m3 weights: one program per (row tile, block of columns), each tile of one expert.

Rows and tiles as in `grouped.py`. LEN is the length of a dot product, N the number of output columns: (H, I) in the
first GEMM, (I, H) in the second. WEIGHT as in `fp8_slots.py`. A_SCALE: the scales that rows come with. None: none,
the rows are in the model dtype. "group": [rows, LEN / 128], "row": [rows], "expert": `in_1`, `in_2`, by the expert.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_core.ops._kernels.activation import activate
from moe_core.ops._kernels.fp8_quantize import magnitude, scale_of, to_e4m3
from moe_core.ops._kernels.grouped import _swizzle


@triton.jit
def _block(
    w, w_ptr, n_ok, expert, column, k, LEN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MAPS: tl.constexpr
):  # fmt: skip
    """A [BK, BN] block of weights, through the tensor map `w` or from the pointers `w_ptr`."""
    if MAPS:
        block = tl.reshape(w.load([expert, column, k]), (BN, BK)).T
    else:
        ok = n_ok[None, :] & (tl.arange(0, BK) < LEN - k)[:, None]
        block = tl.load(w_ptr + k, mask=ok, other=0.0)
    return block


@triton.jit
def _product(
    a, a_map, a_rows, row_0, row_ok, a_scale, w_1, w_2, w_off, n_ok, s_1, s_2, expert, column, stride_a: tl.constexpr,
    LEN: tl.constexpr, PAIR: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, TMA_A: tl.constexpr,
    MAPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile's rows times BN columns of one or two matrices: float32 sums, under the scales of groups and blocks."""
    kk = tl.arange(0, BK)
    a_ptr = a + a_rows[:, None] * stride_a + kk[None, :]
    p_1 = w_1
    p_2 = w_2
    if not MAPS:
        p_1 = w_1 + w_off
        p_2 = w_2 + w_off
    acc_1 = tl.zeros((BM, BN), tl.float32)
    acc_2 = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, LEN, BK, num_stages=STAGES):
        if TMA_A:
            rows = a_map.load([row_0, k])
        elif LEN % BK:
            rows = tl.load(a_ptr + k, mask=row_ok[:, None] & (kk < LEN - k)[None, :], other=0.0)
        else:
            # Rows that are not there are not read either: all programs would read the same one, at the same time.
            rows = tl.load(a_ptr + k, mask=row_ok[:, None], other=0.0)
        block_1 = _block(w_1, p_1, n_ok, expert, column, k, LEN, BN, BK, MAPS)
        if PAIR:
            block_2 = _block(w_2, p_2, n_ok, expert, column, k, LEN, BN, BK, MAPS)
        if BLOCKS:
            scale_1 = tl.load(s_1 + k // 128)
            if GROUPS:
                scale = tl.load(a_scale + k // 128)
                acc_1 += tl.dot(rows, block_1.to(rows.dtype)) * (scale * scale_1)[:, None]
                if PAIR:
                    acc_2 += tl.dot(rows, block_2.to(rows.dtype)) * (scale * tl.load(s_2 + k // 128))[:, None]
            else:
                acc_1 += tl.dot(rows, block_1.to(rows.dtype)) * scale_1
                if PAIR:
                    acc_2 += tl.dot(rows, block_2.to(rows.dtype)) * tl.load(s_2 + k // 128)
        else:
            # Not accumulated by the matrix unit: for e4m3 it keeps fewer bits than float32 between products.
            acc_1 += tl.dot(rows, block_1.to(rows.dtype))
            if PAIR:
                acc_2 += tl.dot(rows, block_2.to(rows.dtype))
    return acc_1, acc_2


@triton.jit
def _scaled(acc, scale, s_ptr, n, n_ok, SN: tl.constexpr, WEIGHT: tl.constexpr):
    """A finished sum under the scales of its rows and of its columns (WEIGHT "tensor" or "channel")."""
    own = n * SN if WEIGHT == "channel" else n * 0
    return acc * scale[:, None] * tl.load(s_ptr + own, mask=n_ok, other=0.0)[None, :]


@triton.jit
def _tile(
    a, a_map, a_up, a_up_map, a_scale, w_1, w_2, s_1, s_2, in_1, in_2, b_1, b_2, c, c_scale, in_next, slot_of_row,
    expert, row_0, row_end, block, stride_a: tl.constexpr, stride_as: tl.constexpr, stride_c: tl.constexpr,
    LEN: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WE: tl.constexpr, WN: tl.constexpr,
    SE: tl.constexpr, SN: tl.constexpr, BIE: tl.constexpr, BIN: tl.constexpr, IE: tl.constexpr, IE2: tl.constexpr,
    WEIGHT: tl.constexpr, A_SCALE: tl.constexpr, OUT: tl.constexpr, POWER_OF_TWO: tl.constexpr, DTYPE: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, GATHER: tl.constexpr,
    TMA_A: tl.constexpr, MAPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] block of c."""
    row = row_0 + tl.arange(0, BM)
    row_ok = row < row_end
    if GATHER:
        a_rows = (tl.load(slot_of_row + row, mask=row_ok, other=0) // K).to(tl.int64)
    else:
        a_rows = tl.where(row_ok, row, row_0).to(tl.int64)
    e = expert.to(tl.int64)
    column = block * BN
    n = column + tl.arange(0, BN)
    n_ok = n < N
    w_off = e * WE + n.to(tl.int64)[None, :] * WN + tl.arange(0, BK)[:, None]
    s_1 += e * SE
    s_2 += e * SE
    if WEIGHT == "block":
        s_1 += column // 128 * SN
        s_2 += column // 128 * SN
    scale = a_scale
    if A_SCALE == "group" or A_SCALE == "row":
        scale = a_scale + a_rows * stride_as
    gate, up = _product(
        a, a_map, a_rows, row_0, row_ok, scale, w_1, w_2, w_off, n_ok, s_1, s_2, expert, column, stride_a,
        LEN, GATED, WEIGHT == "block", A_SCALE == "group", TMA_A, MAPS, BM, BN, BK, STAGES,
    )  # fmt: skip
    if GATED and a_up is not None:
        # The up half was given another input scale: rare, so its sum is simply made again.
        if tl.load(in_1 + e * IE) != tl.load(in_2 + e * IE):
            up, _ = _product(
                a_up, a_up_map, a_rows, row_0, row_ok, scale, w_2, w_2, w_off, n_ok, s_2, s_2, expert, column, stride_a,
                LEN, False, False, False, TMA_A, MAPS, BM, BN, BK, STAGES,
            )  # fmt: skip
    if WEIGHT != "block":
        scale_1 = tl.full((BM,), 1.0, tl.float32)
        scale_2 = scale_1
        if A_SCALE == "row":
            scale_1 = tl.load(scale)
            scale_2 = scale_1
        elif A_SCALE == "expert":
            scale_1 = scale_1 * tl.load(in_1 + e * IE)
            if GATED:
                scale_2 = scale_2 * tl.load(in_2 + e * IE)
        gate = _scaled(gate, scale_1, s_1, n, n_ok, SN, WEIGHT)
        if GATED:
            up = _scaled(up, scale_2, s_2, n, n_ok, SN, WEIGHT)
    if b_1 is not None:
        gate += tl.load(b_1 + e * BIE + n * BIN, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(b_2 + e * BIE + n * BIN, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    h = gate
    if ACT is not None:
        h = activate(gate, up, ACT, GATED, ALPHA, LIMIT)
    h = h.to(DTYPE)
    if OUT == "group":
        tl.static_assert(BN == 128)
        h = tl.where(n_ok[None, :], h.to(tl.float32), 0.0)
        s = scale_of(tl.max(magnitude(h), 1), POWER_OF_TWO)
        h = to_e4m3(h, s[:, None], tl.div_rn(1.0, s)[:, None], False)
        tl.store(c_scale + row.to(tl.int64) * ((N + 127) // 128) + block, s, mask=row_ok)
    elif OUT == "expert":
        s_next = tl.load(in_next + e * IE2)
        h = to_e4m3(h.to(tl.float32), s_next, tl.div_rn(1.0, s_next), True)
    tl.store(c + row.to(tl.int64)[:, None] * stride_c + n[None, :], h, mask=row_ok[:, None] & n_ok[None, :])


@triton.jit(do_not_specialize=["max_tiles"])
def fp8_gemm_kernel(
    a, a_map, a_map_small, a_up, a_up_map, a_up_map_small, a_scale, w_1, w_2, s_1, s_2, in_1, in_2, b_1, b_2,
    c, c_scale, in_next, slot_of_row, row_end, tile_expert, tile_row, num_tiles, max_tiles,
    stride_a: tl.constexpr, stride_as: tl.constexpr, stride_c: tl.constexpr,
    LEN: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WE: tl.constexpr, WN: tl.constexpr,
    SE: tl.constexpr, SN: tl.constexpr, BIE: tl.constexpr, BIN: tl.constexpr, IE: tl.constexpr, IE2: tl.constexpr,
    WEIGHT: tl.constexpr, A_SCALE: tl.constexpr, OUT: tl.constexpr, POWER_OF_TWO: tl.constexpr, DTYPE: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, GATHER: tl.constexpr,
    TMA_A: tl.constexpr, MAPS: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BM_SMALL: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr, PERSISTENT: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """c = activation(a @ w[e].T + bias[e]) per expert; GATED: of the columns of w_1 (gate) and w_2 (up).

    OUT: how c is quantized. None: not. "group": c_scale [rows, N / 128]; "expert": by `in_next`. SPLIT of this
    kernel's tiles make one of the list's. BM_SMALL < BM: an expert's last tile takes the small height if its rows fit.
    PERSISTENT: the programs walk the tiles; num_tiles is then read from the device if it is there. EARLY: the next
    kernel's programs may come beside this one's, not only after them.
    """
    if PDL:
        if EARLY:
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
            if SPLIT > 1 and row_0 >= last:
                pass
            elif BM_SMALL < BM and last - row_0 <= BM_SMALL:
                _tile(a, a_map_small, a_up, a_up_map_small, a_scale, w_1, w_2, s_1, s_2, in_1, in_2, b_1, b_2,
                      c, c_scale, in_next, slot_of_row, expert, row_0, last, block, stride_a, stride_as, stride_c,
                      LEN, N, K, WE, WN, SE, SN, BIE, BIN, IE, IE2, WEIGHT, A_SCALE, OUT, POWER_OF_TWO, DTYPE,
                      ACT, GATED, ALPHA, LIMIT, GATHER, TMA_A, MAPS, BM_SMALL, BN, BK, STAGES)  # fmt: skip
            else:
                _tile(a, a_map, a_up, a_up_map, a_scale, w_1, w_2, s_1, s_2, in_1, in_2, b_1, b_2,
                      c, c_scale, in_next, slot_of_row, expert, row_0, last, block, stride_a, stride_as, stride_c,
                      LEN, N, K, WE, WN, SE, SN, BIE, BIN, IE, IE2, WEIGHT, A_SCALE, OUT, POWER_OF_TWO, DTYPE,
                      ACT, GATED, ALPHA, LIMIT, GATHER, TMA_A, MAPS, BM, BN, BK, STAGES)  # fmt: skip
    if PDL and not EARLY:
        gdc_launch_dependents()
