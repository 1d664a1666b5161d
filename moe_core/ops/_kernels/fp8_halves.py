"""The FP8 GEMMs with loading warps where tiles are few (Gluon, Hopper): each group of warps takes half of every tile.

A program with one tile or two is done when their products are. In `fp8_specialized.py` one group makes those of a tile
of 64 rows with both blocks of columns; here each group makes those with one, at the same time, and gate and up meet in
shared memory. For e4m3 in blocks of 128 columns; else, and in the meaning of all names, as there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_core.ops._kernels.dependent import let_next_kernel_come, wait_for_kernel_before
from moe_core.ops._kernels.fp8_specialized import (
    BK,
    BN,
    REGISTERS_WITH_MAPS,
    REGISTERS_WITH_ROWS,
    ROWS,
    _count,
    _find,
    _load_maps,
    _load_rows,
    _power_of_two,
    _store,
    _write_act,
    _write_tables,
)


@gluon.jit
def _product(
    a_bufs, bufs, rows_full, full, empty, step, a_scale, w_scale, never,
    LEN: gl.constexpr, GATHER: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """[64, 128] sums of one block; scales are asked for a step ahead."""
    STAGES: gl.constexpr = a_bufs.type.shape[0]
    STEPS: gl.constexpr = (LEN + BK - 1) // BK
    acc = gl.zeros((ROWS, BN), dtype=gl.float32, layout=LAYOUT)
    d = gl.zeros((ROWS, BN), dtype=gl.float32, layout=LAYOUT)
    scale, scale_w = gl.load(a_scale), gl.load(w_scale)
    for k in range(STEPS):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        mbarrier.wait(full.index(stage), phase)
        if GATHER:
            mbarrier.wait(rows_full.index(stage), phase)
            fence_async_shared()
        d = warpgroup_mma(
            a_bufs.index(stage), bufs.index(stage).permute((1, 0)), d, use_acc=never, is_async=True
        )  # fmt: skip
        row = (scale * scale_w)[:, None]
        ahead = gl.minimum(k + 1, STEPS - 1)
        scale, scale_w = gl.load(a_scale + ahead), gl.load(w_scale + ahead)
        d = warpgroup_mma_wait(num_outstanding=0, deps=(d,))
        mbarrier.arrive(empty.index(stage), count=1)
        acc += d * row
        step += 1
    return acc


@gluon.jit
def _multiply(
    c, c_scale, a_scale, w_scale, a_bufs, bufs, rows_full, full, empty, ups, ups_full, ups_empty, tables, slot_of_row,
    stride_as: gl.constexpr, stride_c: gl.constexpr, LEN: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
    SE: gl.constexpr, SN: gl.constexpr, PART: gl.constexpr, PAIR: gl.constexpr, OUT: gl.constexpr,
    POWER_OF_TWO: gl.constexpr, DTYPE: gl.constexpr, GATHER: gl.constexpr, GROUP: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Block PART of all of this program's tiles; of a pair the first group writes what both have made."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32])
    STEPS: gl.constexpr = (LEN + BK - 1) // BK
    WIDTH: gl.constexpr = BN if PAIR else 2 * BN
    blocks = (N + WIDTH - 1) // WIDTH
    tiles = _count(tables)
    if EARLY:
        wait_for_kernel_before()
    turn = 0
    for pid in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        expert, row_0, last, block = _find(tables, tiles, pid, blocks, ROWS, GROUP)
        row = row_0 + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        row = gl.where(row < last, row, row_0)
        if GATHER:
            row = gl.load(slot_of_row + row) // K
        column = block if PAIR else gl.minimum(block * 2 + PART, (N + 127) // 128 - 1)
        acc = _product(
            a_bufs, bufs, rows_full, full, empty, turn * STEPS, a_scale + row.to(gl.int64) * stride_as,
            w_scale + expert.to(gl.int64) * SE + column * SN, last < 0, LEN, GATHER, LAYOUT,
        )  # fmt: skip
        if not PAIR:
            _store(acc, c, row_0, last, block * WIDTH + PART * BN, stride_c, N)
        elif PART == 1:
            mbarrier.wait(ups_empty, (turn & 1) ^ 1)
            ups.store(acc)
            mbarrier.arrive(ups_full, count=1)
        else:
            mbarrier.wait(ups_full, turn & 1)
            up = ups.load(LAYOUT)
            mbarrier.arrive(ups_empty, count=1)
            _write_act(acc, up, c, c_scale, row_0, last, block, stride_c, N, OUT, POWER_OF_TWO, DTYPE)
        turn += 1


@gluon.jit
def fp8_specialized_halves_kernel(
    a, w_1, w_2, c, c_scale, a_scale, s_1, s_2, slot_of_row, row_end,
    stride_a: gl.constexpr, stride_as: gl.constexpr, stride_c: gl.constexpr,
    E: gl.constexpr, LEN: gl.constexpr, N: gl.constexpr, K: gl.constexpr, W_ROWS: gl.constexpr, FIRST_1: gl.constexpr,
    FIRST_2: gl.constexpr, SE: gl.constexpr, SN: gl.constexpr, PAIR: gl.constexpr, WEIGHT: gl.constexpr,
    A_SCALE: gl.constexpr, OUT: gl.constexpr, POWER_OF_TWO: gl.constexpr, DTYPE: gl.constexpr, GATHER: gl.constexpr,
    BM: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, EARLY: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `fp8_specialized_kernel`."""
    gl.static_assert(WEIGHT == "block" and A_SCALE == "group" and BM == ROWS)
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BK], gl.float8e4nv)
    a_bufs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, ROWS, BK], a_layout)
    bufs_1 = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BN, BK], w_1.layout)
    bufs_2 = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BN, BK], w_2.layout)
    # Where the 8 rows that a warp writes at a time lie in other banks.
    ups = gl.allocate_shared_memory(gl.float32, [ROWS if PAIR else 1, BN], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    rows_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ups_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    SIZE: gl.constexpr = _power_of_two(max(E, 128))
    tables = gl.allocate_shared_memory(gl.int32, [2, SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if EARLY:
        if GATHER:
            wait_for_kernel_before()
        let_next_kernel_come()
    _write_tables(tables, row_end, E, BM)
    for i in gl.static_range(STAGES):
        mbarrier.init(rows_full.index(i), count=128)
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(ups_bars.index(i), count=1)
    ups_full, ups_empty = ups_bars.index(0), ups_bars.index(1)
    if GATHER:
        gl.warp_specialize([
            (_multiply, (c, c_scale, a_scale, s_1, a_bufs, bufs_1, rows_full, full, empty, ups, ups_full, ups_empty,
                         tables, slot_of_row, stride_as, stride_c, LEN, N, K, SE, SN, 0, PAIR, OUT, POWER_OF_TWO,
                         DTYPE, GATHER, GROUP, False)),
            (_multiply, (c, c_scale, a_scale, s_2, a_bufs, bufs_2, rows_full, full, empty, ups, ups_full, ups_empty,
                         tables, slot_of_row, stride_as, stride_c, LEN, N, K, SE, SN, 1, PAIR, OUT, POWER_OF_TWO,
                         DTYPE, GATHER, GROUP, False)),
            (_load_rows, (a, w_1, w_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, tables, slot_of_row,
                          stride_a, LEN, N, W_ROWS, FIRST_1, FIRST_2, PAIR, K, GROUP)),
        ], [4, 4], REGISTERS_WITH_ROWS)  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (c, c_scale, a_scale, s_1, a_bufs, bufs_1, rows_full, full, empty, ups, ups_full, ups_empty,
                         tables, slot_of_row, stride_as, stride_c, LEN, N, K, SE, SN, 0, PAIR, OUT, POWER_OF_TWO,
                         DTYPE, GATHER, GROUP, EARLY)),
            (_multiply, (c, c_scale, a_scale, s_2, a_bufs, bufs_2, rows_full, full, empty, ups, ups_full, ups_empty,
                         tables, slot_of_row, stride_as, stride_c, LEN, N, K, SE, SN, 1, PAIR, OUT, POWER_OF_TWO,
                         DTYPE, GATHER, GROUP, EARLY)),
            (_load_maps, (a, w_1, w_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, tables, slot_of_row,
                          stride_a, LEN, N, W_ROWS, FIRST_1, FIRST_2, PAIR, K, GROUP, EARLY)),
        ], [4, 1], REGISTERS_WITH_MAPS)  # fmt: skip
