"""Both FP8 GEMMs with loading warps and two groups of four that multiply, 64 rows of a tile each (Gluon, Hopper).

A group adds the product of 128 columns, under its scales, to float32 sums: meanwhile the matrix unit works for the
other group. Two blocks of 128 columns share the rows that were loaded: gate and up, or two neighbours of w2.

Not for the interpreter; its sibling there is `fp8_grouped.py`, with rows, tiles, LEN, N and WEIGHT as there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

BK = gl.constexpr(128)
BN = gl.constexpr(128)
HALF = gl.constexpr(64)  # rows of one group of warps
ROW_LOADER_REGISTERS = gl.constexpr(40)
MAP_LOADER_REGISTERS = gl.constexpr(24)
GROUP_REGISTERS = gl.constexpr(232)


@gluon.jit
def _swizzle(pid, tiles, blocks, GROUP: gl.constexpr):
    """(row tile, pair of blocks): GROUP row tiles share their blocks of weights in L2."""
    per_group = GROUP * blocks
    first = (pid // per_group) * GROUP
    size = gl.minimum(tiles - first, GROUP)
    rest = pid % per_group
    return first + rest % size, rest // size


@gluon.jit
def _load_maps(
    a, w_1, w_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, slot_of_row, row_end, tile_expert, tile_row, tiles,
    stride_a: gl.constexpr, LEN: gl.constexpr, N: gl.constexpr, W_ROWS: gl.constexpr, FIRST_1: gl.constexpr,
    FIRST_2: gl.constexpr, PAIR: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One warp: rows and weights of all of this program's tiles by tensor maps, as fast as buffers are emptied."""
    STAGES: gl.constexpr = a_bufs.type.shape[0]
    WIDTH: gl.constexpr = BN if PAIR else 2 * BN
    blocks = (N + WIDTH - 1) // WIDTH
    step = 0
    for pid in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        tile, block = _swizzle(pid, tiles, blocks, GROUP)
        expert = gl.load(tile_expert + tile)
        if expert >= 0:
            row = gl.load(tile_row + tile)
            column = expert * W_ROWS + block * WIDTH
            for k in range(0, LEN, BK):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(stage), a.block_type.nbytes + 2 * w_1.block_type.nbytes)
                tma.async_copy_global_to_shared(a, [row, k], full.index(stage), a_bufs.index(stage))
                tma.async_copy_global_to_shared(w_1, [column + FIRST_1, k], full.index(stage), bufs_1.index(stage))
                tma.async_copy_global_to_shared(w_2, [column + FIRST_2, k], full.index(stage), bufs_2.index(stage))
                step += 1


@gluon.jit
def _load_rows(
    a, w_1, w_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, slot_of_row, row_end, tile_expert, tile_row, tiles,
    stride_a: gl.constexpr, LEN: gl.constexpr, N: gl.constexpr, W_ROWS: gl.constexpr, FIRST_1: gl.constexpr,
    FIRST_2: gl.constexpr, PAIR: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Four warps: the same where rows are gathered from the tokens' own."""
    STAGES: gl.constexpr = a_bufs.type.shape[0]
    BM: gl.constexpr = a_bufs.type.shape[1]
    WIDTH: gl.constexpr = BN if PAIR else 2 * BN
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    blocks = (N + WIDTH - 1) // WIDTH
    columns = gl.arange(0, BK, gl.SliceLayout(0, LAYOUT))
    step = 0
    for pid in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        tile, block = _swizzle(pid, tiles, blocks, GROUP)
        expert = gl.load(tile_expert + tile)
        if expert >= 0:
            row = gl.load(tile_row + tile) + gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))
            # Rows that are not there are not read either: all programs would read the same one, at the same time.
            row_ok = row < gl.load(row_end + expert)
            token = gl.load(slot_of_row + row, mask=row_ok, other=0) // K
            rows = a + token.to(gl.int64)[:, None] * stride_a + columns[None, :]
            column = expert * W_ROWS + block * WIDTH
            for k in range(0, LEN, BK):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(stage), 2 * w_1.block_type.nbytes)
                tma.async_copy_global_to_shared(w_1, [column + FIRST_1, k], full.index(stage), bufs_1.index(stage))
                tma.async_copy_global_to_shared(w_2, [column + FIRST_2, k], full.index(stage), bufs_2.index(stage))
                inside = row_ok[:, None] & (columns < LEN - k)[None, :]
                async_copy.async_copy_global_to_shared(a_bufs.index(stage), rows + k, mask=inside)
                async_copy.mbarrier_arrive(rows_full.index(stage), increment_count=False)
                step += 1


@gluon.jit
def _product(
    a_bufs, bufs_1, bufs_2, rows_full, full, empty, step, a_scale, s_1, s_2, never,
    PART: gl.constexpr, LEN: gl.constexpr, BLOCKS: gl.constexpr, GATHER: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """[64, 128] sums of both blocks; a buffer is given back when both products of its columns are there.

    `never` is False, but the assembler must not know: it gives a product that adds to nothing new registers.
    Scales (BLOCKS) are asked for a step ahead.
    """
    STAGES: gl.constexpr = a_bufs.type.shape[0]
    STEPS: gl.constexpr = (LEN + BK - 1) // BK
    acc_1 = gl.zeros((HALF, BN), dtype=gl.float32, layout=LAYOUT)
    acc_2 = gl.zeros((HALF, BN), dtype=gl.float32, layout=LAYOUT)
    # One product at a time in the same registers: with two, the sums would not fit beside them.
    d = gl.zeros((HALF, BN), dtype=gl.float32, layout=LAYOUT)
    if BLOCKS:
        scale, scale_1, scale_2 = gl.load(a_scale), gl.load(s_1), gl.load(s_2)
    for k in range(STEPS):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        mbarrier.wait(full.index(stage), phase)
        if GATHER:
            mbarrier.wait(rows_full.index(stage), phase)
            fence_async_shared()
        a = a_bufs.index(stage).slice(PART * HALF, HALF)
        d = warpgroup_mma(a, bufs_1.index(stage).permute((1, 0)), d, use_acc=never, is_async=True)
        if BLOCKS:
            row_1 = (scale * scale_1)[:, None]
            row_2 = (scale * scale_2)[:, None]
            ahead = gl.minimum(k + 1, STEPS - 1)
            scale, scale_1, scale_2 = gl.load(a_scale + ahead), gl.load(s_1 + ahead), gl.load(s_2 + ahead)
        d = warpgroup_mma_wait(num_outstanding=0, deps=(d,))
        if BLOCKS:
            acc_1 += d * row_1
        else:
            acc_1 += d
        d = warpgroup_mma(a, bufs_2.index(stage).permute((1, 0)), d, use_acc=never, is_async=True)
        d = warpgroup_mma_wait(num_outstanding=0, deps=(d,))
        mbarrier.arrive(empty.index(stage), count=1)
        if BLOCKS:
            acc_2 += d * row_2
        else:
            acc_2 += d
        step += 1
    return acc_1, acc_2


@gluon.jit
def _store(h, c, row_0, last, column, stride_c: gl.constexpr, N: gl.constexpr):
    """Rows in pieces of 16 bytes a thread; rows of other experts are left alone."""
    PIECE: gl.constexpr = 128 // c.dtype.element_ty.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, PIECE], [32 * PIECE // BN, BN // PIECE], [4, 1], [1, 0])
    out = gl.convert_layout(h.to(c.dtype.element_ty), LAYOUT)
    row = row_0 + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
    n = column + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    gl.store(c + row.to(gl.int64)[:, None] * stride_c + n[None, :], out, mask=(row < last)[:, None] & (n < N)[None, :])


@gluon.jit
def _quotient(x, scale):
    """x / scale, rounded correctly as in `fp8_quantize.py`."""
    inverse = gl.div_rn(gl.full(scale.shape, 1.0, gl.float32, scale.type.layout), scale)
    rough = x * inverse[:, None]
    return gl.fma(gl.fma(-rough, scale[:, None] + gl.zeros_like(x), x), inverse[:, None] + gl.zeros_like(x), rough)


@gluon.jit
def _write_act(
    gate, up, c, c_scale, row_0, last, block, stride_c: gl.constexpr, N: gl.constexpr, OUT: gl.constexpr,
    POWER_OF_TWO: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """silu(gate) · up, rounded to the model dtype, and quantized by groups of 128 columns where OUT says so."""
    h = (gate / (1 + gl.exp(-gate)) * up).to(DTYPE)
    if OUT == "group":
        LAYOUT: gl.constexpr = gate.type.layout
        n = block * BN + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
        x = gl.where((n < N)[None, :], h.to(gl.float32), 0.0)
        amax = gl.max(gl.where(x == x, gl.abs(x), float("inf")), 1)
        scale = gl.div_rn(gl.maximum(amax, 1e-10), gl.full(amax.shape, 448.0, gl.float32, amax.type.layout))
        if POWER_OF_TWO:
            bits = (scale.to(gl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
            scale = bits.to(gl.float32, bitcast=True)
        scale = gl.where(amax < float("inf"), scale, float("nan"))
        row = row_0 + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
        gl.store(c_scale + row.to(gl.int64) * ((N + 127) // 128) + block, scale, mask=row < last)
        _store(_quotient(x, scale), c, row_0, last, block * BN, stride_c, N)
    else:
        _store(h, c, row_0, last, block * BN, stride_c, N)


@gluon.jit
def _multiply(
    c, c_scale, a_scale, s_1, s_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, slot_of_row, row_end, tile_expert,
    tile_row, tiles,
    stride_as: gl.constexpr, stride_c: gl.constexpr, LEN: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
    SE: gl.constexpr, SN: gl.constexpr, PART: gl.constexpr, PAIR: gl.constexpr, WEIGHT: gl.constexpr,
    A_SCALE: gl.constexpr, OUT: gl.constexpr, POWER_OF_TWO: gl.constexpr, DTYPE: gl.constexpr, GATHER: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """64 rows of all of this program's tiles; where there are none, their buffers are only given back."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32])
    STAGES: gl.constexpr = a_bufs.type.shape[0]
    WIDTH: gl.constexpr = BN if PAIR else 2 * BN
    blocks = (N + WIDTH - 1) // WIDTH
    step = 0
    for pid in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        tile, block = _swizzle(pid, tiles, blocks, GROUP)
        expert = gl.load(tile_expert + tile)
        if expert >= 0:
            row_0 = gl.load(tile_row + tile) + PART * HALF
            last = gl.load(row_end + expert)
            if row_0 < last:
                row = row_0 + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
                row = gl.where(row < last, row, row_0)
                if GATHER:
                    row = gl.load(slot_of_row + row) // K
                e = expert.to(gl.int64)
                scales = a_scale + (e if A_SCALE == "expert" else row.to(gl.int64)) * stride_as
                p_1, p_2 = s_1 + e * SE, s_2 + e * SE
                n = block * WIDTH + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
                if WEIGHT == "block":
                    p_1 += block * WIDTH // 128 * SN
                    p_2 += (block * WIDTH // 128 if PAIR else gl.minimum(block * 2 + 1, (N + 127) // 128 - 1)) * SN
                acc_1, acc_2 = _product(
                    a_bufs, bufs_1, bufs_2, rows_full, full, empty, step, scales, p_1, p_2, tiles < 0,
                    PART, LEN, WEIGHT == "block", GATHER, LAYOUT,
                )  # fmt: skip
                if WEIGHT != "block":
                    rows_scale = gl.load(scales) + gl.zeros((HALF,), gl.float32, gl.SliceLayout(1, LAYOUT))
                    own = n * SN if WEIGHT == "channel" else n * 0
                    next_own = own if PAIR or WEIGHT != "channel" else own + BN * SN
                    next_n = n if PAIR else n + BN
                    acc_1 = acc_1 * rows_scale[:, None] * gl.load(p_1 + own, mask=n < N, other=0.0)[None, :]
                    acc_2 = acc_2 * rows_scale[:, None] * gl.load(p_2 + next_own, mask=next_n < N, other=0.0)[None, :]
                if PAIR:
                    _write_act(acc_1, acc_2, c, c_scale, row_0, last, block, stride_c, N, OUT, POWER_OF_TWO, DTYPE)
                else:
                    _store(acc_1, c, row_0, last, block * WIDTH, stride_c, N)
                    _store(acc_2, c, row_0, last, block * WIDTH + BN, stride_c, N)
                step += (LEN + BK - 1) // BK
            else:
                for _ in range(0, LEN, BK):
                    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
                    mbarrier.arrive(empty.index(step % STAGES), count=1)
                    step += 1


@gluon.jit(do_not_specialize=["tiles"])
def fp8_specialized_kernel(
    a, w_1, w_2, c, c_scale, a_scale, s_1, s_2, slot_of_row, row_end, tile_expert, tile_row, tiles,
    stride_a: gl.constexpr, stride_as: gl.constexpr, stride_c: gl.constexpr,
    LEN: gl.constexpr, N: gl.constexpr, K: gl.constexpr, W_ROWS: gl.constexpr, FIRST_1: gl.constexpr,
    FIRST_2: gl.constexpr, SE: gl.constexpr, SN: gl.constexpr, PAIR: gl.constexpr, WEIGHT: gl.constexpr,
    A_SCALE: gl.constexpr, OUT: gl.constexpr, POWER_OF_TWO: gl.constexpr, DTYPE: gl.constexpr, GATHER: gl.constexpr,
    BM: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """c = a @ w[e].T for the row tiles of `align_kernel`, or silu(a @ gate[e].T) · (a @ up[e].T) (PAIR).

    w_1, w_2: tensor maps of [E_l * W_ROWS, LEN]; FIRST_1, FIRST_2: where their blocks stand. Programs walk the tiles.
    """
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], gl.float8e4nv)
    a_bufs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BM, BK], a_layout)
    bufs_1 = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BN, BK], w_1.layout)
    bufs_2 = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BN, BK], w_2.layout)
    rows_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(rows_full.index(i), count=128)
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    if GATHER:
        gl.warp_specialize([
            (_multiply, (c, c_scale, a_scale, s_1, s_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, slot_of_row,
                         row_end, tile_expert, tile_row, tiles, stride_as, stride_c, LEN, N, K, SE, SN, 0, PAIR, WEIGHT,
                         A_SCALE, OUT, POWER_OF_TWO, DTYPE, GATHER, GROUP)),
            (_multiply, (c, c_scale, a_scale, s_1, s_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, slot_of_row,
                         row_end, tile_expert, tile_row, tiles, stride_as, stride_c, LEN, N, K, SE, SN, 1, PAIR, WEIGHT,
                         A_SCALE, OUT, POWER_OF_TWO, DTYPE, GATHER, GROUP)),
            (_load_rows, (a, w_1, w_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, slot_of_row, row_end,
                          tile_expert, tile_row, tiles, stride_a, LEN, N, W_ROWS, FIRST_1, FIRST_2, PAIR, K, GROUP)),
        ], [4, 4], [GROUP_REGISTERS, ROW_LOADER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (c, c_scale, a_scale, s_1, s_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, slot_of_row,
                         row_end, tile_expert, tile_row, tiles, stride_as, stride_c, LEN, N, K, SE, SN, 0, PAIR, WEIGHT,
                         A_SCALE, OUT, POWER_OF_TWO, DTYPE, GATHER, GROUP)),
            (_multiply, (c, c_scale, a_scale, s_1, s_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, slot_of_row,
                         row_end, tile_expert, tile_row, tiles, stride_as, stride_c, LEN, N, K, SE, SN, 1, PAIR, WEIGHT,
                         A_SCALE, OUT, POWER_OF_TWO, DTYPE, GATHER, GROUP)),
            (_load_maps, (a, w_1, w_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, slot_of_row, row_end,
                          tile_expert, tile_row, tiles, stride_a, LEN, N, W_ROWS, FIRST_1, FIRST_2, PAIR, K, GROUP)),
        ], [4, 1], [GROUP_REGISTERS, MAP_LOADER_REGISTERS])  # fmt: skip
