"""The down GEMM where I is short (Gluon, Hopper): weights stay in shared memory, two warpgroups take turns.

With few steps per dot product writing a tile takes as long as multiplying it. A program takes [BN, I] weights of one
expert, one warp loads that expert's rows 64 at a time, and of two multiplying warpgroups one writes its rows while the
other one multiplies. Not for the interpreter; its sibling there is `grouped.py`, its twin `experts_step_torch`.

H hidden · I intermediate (padded to IP, a power of 2) · E_l local experts.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

ROWS = gl.constexpr(64)  # what one warpgroup multiplies at a time
LOADER_REGISTERS = gl.constexpr(24)  # the smallest that the hardware gives; the rest goes to the accumulators
TURN_REGISTERS = gl.constexpr(232)


@gluon.jit
def _rows_of(row_end, expert):
    """First and last row of an expert."""
    start = gl.load(row_end + gl.maximum(expert - 1, 0))
    return gl.where(expert > 0, start, 0), gl.load(row_end + expert)


@gluon.jit
def _load(act_map, w_map, a_bufs, w_bufs, bars, row_end, H: gl.constexpr, E: gl.constexpr, BN: gl.constexpr):
    """Fills the buffers for all of this program's blocks of weights, as fast as they are emptied."""
    A_STAGES: gl.constexpr = a_bufs.type.shape[0]
    W_STAGES: gl.constexpr = w_bufs.type.shape[0]
    A_EMPTY: gl.constexpr = A_STAGES
    W_FULL: gl.constexpr = 2 * A_STAGES
    W_EMPTY: gl.constexpr = 2 * A_STAGES + W_STAGES
    BLOCKS: gl.constexpr = (H + BN - 1) // BN
    a_step = 0
    w_step = 0
    for item in range(gl.program_id(0), E * BLOCKS, gl.num_programs(0)):
        expert = item // BLOCKS
        start, end = _rows_of(row_end, expert)
        if start < end:
            w = w_step % W_STAGES
            mbarrier.wait(bars.index(W_EMPTY + w), ((w_step // W_STAGES) & 1) ^ 1)
            mbarrier.expect(bars.index(W_FULL + w), w_map.block_type.nbytes)
            tma.async_copy_global_to_shared(
                w_map, [expert * H + item % BLOCKS * BN, 0], bars.index(W_FULL + w), w_bufs.index(w)
            )
            w_step += 1
            for row in range(start, end, ROWS):
                a = a_step % A_STAGES
                mbarrier.wait(bars.index(A_EMPTY + a), ((a_step // A_STAGES) & 1) ^ 1)
                mbarrier.expect(bars.index(a), act_map.block_type.nbytes)
                tma.async_copy_global_to_shared(act_map, [row, 0], bars.index(a), a_bufs.index(a))
                a_step += 1


@gluon.jit
def _write(acc, y, bias, expert, row_0, end, column, H: gl.constexpr, BN: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows in pieces of 16 bytes a thread; rows of other experts are left alone."""
    if bias is not None:
        n = column + gl.arange(0, BN, gl.SliceLayout(0, acc.type.layout))
        acc += gl.load(bias + expert.to(gl.int64) * H + n, mask=n < H, other=0).to(gl.float32)[None, :]
    out = gl.convert_layout(acc.to(y.dtype.element_ty), LAYOUT)
    row = row_0 + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    n = column + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    gl.store(y + row.to(gl.int64)[:, None] * H + n[None, :], out, mask=(row < end)[:, None] & (n < H)[None, :])


@gluon.jit
def _multiply(
    TURN: gl.constexpr, y, bias, a_bufs, w_bufs, bars, row_end,
    H: gl.constexpr, E: gl.constexpr, BN: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Every second tile of 64 rows, counted over all of this program's blocks of weights."""
    A_STAGES: gl.constexpr = a_bufs.type.shape[0]
    W_STAGES: gl.constexpr = w_bufs.type.shape[0]
    A_EMPTY: gl.constexpr = A_STAGES
    W_FULL: gl.constexpr = 2 * A_STAGES
    W_EMPTY: gl.constexpr = 2 * A_STAGES + W_STAGES
    BLOCKS: gl.constexpr = (H + BN - 1) // BN
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    a_step = 0
    w_step = 0
    for item in range(gl.program_id(0), E * BLOCKS, gl.num_programs(0)):
        expert = item // BLOCKS
        column = item % BLOCKS * BN
        start, end = _rows_of(row_end, expert)
        if start < end:
            w = w_step % W_STAGES
            mbarrier.wait(bars.index(W_FULL + w), (w_step // W_STAGES) & 1)
            tiles = (end - start + ROWS - 1) // ROWS
            first = (a_step + TURN) & 1
            mbarrier.arrive(bars.index(W_EMPTY + w), count=1, pred=first >= tiles)
            for i in range(first, tiles, 2):
                a = (a_step + i) % A_STAGES
                mbarrier.wait(bars.index(a), ((a_step + i) // A_STAGES) & 1)
                acc = gl.zeros((ROWS, BN), dtype=gl.float32, layout=MMA)
                acc = warpgroup_mma(a_bufs.index(a), w_bufs.index(w).permute((1, 0)), acc, use_acc=False, is_async=True)
                acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
                mbarrier.arrive(bars.index(A_EMPTY + a), count=1)
                mbarrier.arrive(bars.index(W_EMPTY + w), count=1, pred=i + 2 >= tiles)
                _write(acc, y, bias, expert, start + i * ROWS, end, column, H, BN, LAYOUT)
            a_step += tiles
            w_step += 1


@gluon.jit
def alternating_down_kernel(
    act_map, w_map, bias, y, row_end,
    H: gl.constexpr, E: gl.constexpr, IP: gl.constexpr, BN: gl.constexpr, W_STAGES: gl.constexpr,
    A_STAGES: gl.constexpr, LAYOUT: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """y[r] = act[r] @ w2[e].T + bias2[e]; programs walk (expert, block of BN columns)."""
    a_bufs = gl.allocate_shared_memory(act_map.dtype, [A_STAGES, ROWS, IP], act_map.layout)
    w_bufs = gl.allocate_shared_memory(w_map.dtype, [W_STAGES, BN, IP], w_map.layout)
    # One allocation: each begins at a border of 1 KiB, and there is none to spare.
    bars = gl.allocate_shared_memory(gl.int64, [2 * (A_STAGES + W_STAGES), 1], mbarrier.MBarrierLayout())
    # Full and empty, of rows and of weights. Both warpgroups must be done with a block of weights before it goes.
    for i in gl.static_range(2 * A_STAGES + W_STAGES):
        mbarrier.init(bars.index(i), count=1)
    for i in gl.static_range(W_STAGES):
        mbarrier.init(bars.index(2 * A_STAGES + W_STAGES + i), count=2)
    gl.warp_specialize(
        [
            (_multiply, (0, y, bias, a_bufs, w_bufs, bars, row_end, H, E, BN, LAYOUT)),
            (_multiply, (1, y, bias, a_bufs, w_bufs, bars, row_end, H, E, BN, LAYOUT)),
            (_load, (act_map, w_map, a_bufs, w_bufs, bars, row_end, H, E, BN)),
        ],
        [4, 1],
        [TURN_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
