"""The FP8 down GEMM where I is short (Gluon, Hopper): `alternating.py` for e4m3 in blocks, with the scales of both.

A block of w2 is 128 rows, in buffers of 128 columns; NB blocks make what a program takes of an expert at a time. Every
product of 128 columns gets its scales outside the matrix unit, which keeps fewer bits than float32 between products.

H hidden · I intermediate, at most 256 · E_l local experts · KB = ⌈I / 128⌉, 1 or 2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from moe_core.ops._kernels.alternating import LOADER_REGISTERS, ROWS, TURN_REGISTERS, _rows_of, _write
from moe_core.ops._kernels.dependent import let_next_kernel_come, wait_for_kernel_before

BLOCK = gl.constexpr(128)  # rows and columns of w2 that share a scale


@gluon.jit
def _load(
    act_map, w_map, a_bufs, w_bufs, bars, row_end, H: gl.constexpr, E: gl.constexpr, KB: gl.constexpr,
    NB: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Fills the buffers for all of this program's blocks of weights, as fast as they are emptied.

    EARLY: the first weights come while the kernel before still makes the rows.
    """
    A_STAGES: gl.constexpr = a_bufs.type.shape[0] // KB
    W_STAGES: gl.constexpr = w_bufs.type.shape[0] // (KB * NB)
    A_EMPTY: gl.constexpr = A_STAGES
    W_FULL: gl.constexpr = 2 * A_STAGES
    W_EMPTY: gl.constexpr = 2 * A_STAGES + W_STAGES
    WIDTH: gl.constexpr = NB * BLOCK
    PARTS: gl.constexpr = (H + WIDTH - 1) // WIDTH
    a_step = 0
    w_step = 0
    for item in range(gl.program_id(0), E * PARTS, gl.num_programs(0)):
        expert = item // PARTS
        start, end = _rows_of(row_end, expert)
        if start < end:
            w = w_step % W_STAGES
            mbarrier.wait(bars.index(W_EMPTY + w), ((w_step // W_STAGES) & 1) ^ 1)
            mbarrier.expect(bars.index(W_FULL + w), NB * KB * w_map.block_type.nbytes)
            row_w = expert * H + item % PARTS * WIDTH
            for j in gl.static_range(NB):
                for k in gl.static_range(KB):
                    buffer = w_bufs.index((w * NB + j) * KB + k)
                    tma.async_copy_global_to_shared(
                        w_map, [row_w + j * BLOCK, k * BLOCK], bars.index(W_FULL + w), buffer
                    )
            w_step += 1
            if EARLY:
                wait_for_kernel_before()
            for row in range(start, end, ROWS):
                a = a_step % A_STAGES
                mbarrier.wait(bars.index(A_EMPTY + a), ((a_step // A_STAGES) & 1) ^ 1)
                mbarrier.expect(bars.index(a), KB * act_map.block_type.nbytes)
                for k in gl.static_range(KB):
                    tma.async_copy_global_to_shared(act_map, [row, k * BLOCK], bars.index(a), a_bufs.index(a * KB + k))
                a_step += 1


@gluon.jit
def _product(a_bufs, w_bufs, a, w, scales_a, scales_w, KB: gl.constexpr, MMA: gl.constexpr):
    """[ROWS, BLOCK] sums of the buffers from `a` and `w` on; `scales_a`: of the first columns and of the last."""
    zero = gl.zeros((ROWS, BLOCK), dtype=gl.float32, layout=MMA)
    first = warpgroup_mma(a_bufs.index(a), w_bufs.index(w).permute((1, 0)), zero, use_acc=False, is_async=True)
    if KB == 2:
        second = warpgroup_mma(
            a_bufs.index(a + 1), w_bufs.index(w + 1).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        scale_1, scale_2 = scales_a[0] * gl.load(scales_w), scales_a[1] * gl.load(scales_w + 1)
        first, second = warpgroup_mma_wait(num_outstanding=0, deps=(first, second))
        return first * scale_1[:, None] + second * scale_2[:, None]
    else:
        scale_1 = scales_a[0] * gl.load(scales_w)
        first = warpgroup_mma_wait(num_outstanding=0, deps=(first,))
        return first * scale_1[:, None]


@gluon.jit
def _multiply(
    TURN: gl.constexpr, y, a_scale, w_scale, a_bufs, w_bufs, bars, row_end,
    H: gl.constexpr, E: gl.constexpr, KB: gl.constexpr, NB: gl.constexpr, SE: gl.constexpr, SN: gl.constexpr,
    LAYOUT: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Every second tile of 64 rows, counted over all of this program's blocks of weights."""
    A_STAGES: gl.constexpr = a_bufs.type.shape[0] // KB
    W_STAGES: gl.constexpr = w_bufs.type.shape[0] // (KB * NB)
    A_EMPTY: gl.constexpr = A_STAGES
    W_FULL: gl.constexpr = 2 * A_STAGES
    W_EMPTY: gl.constexpr = 2 * A_STAGES + W_STAGES
    WIDTH: gl.constexpr = NB * BLOCK
    PARTS: gl.constexpr = (H + WIDTH - 1) // WIDTH
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 32])
    a_step = 0
    w_step = 0
    if EARLY:
        wait_for_kernel_before()
    for item in range(gl.program_id(0), E * PARTS, gl.num_programs(0)):
        expert = item // PARTS
        block = item % PARTS * NB
        start, end = _rows_of(row_end, expert)
        if start < end:
            w = w_step % W_STAGES
            mbarrier.wait(bars.index(W_FULL + w), (w_step // W_STAGES) & 1)
            tiles = (end - start + ROWS - 1) // ROWS
            first = (a_step + TURN) & 1
            mbarrier.arrive(bars.index(W_EMPTY + w), count=1, pred=first >= tiles)
            for i in range(first, tiles, 2):
                a = (a_step + i) % A_STAGES
                row_0 = start + i * ROWS
                row = row_0 + gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
                own = a_scale + gl.where(row < end, row, row_0).to(gl.int64) * KB
                scales_a = (gl.load(own), gl.load(own + (KB - 1)))
                mbarrier.wait(bars.index(a), ((a_step + i) // A_STAGES) & 1)
                for j in gl.static_range(NB):
                    # What lies behind the last block of H is not written; its scales must only be somewhere.
                    at = gl.minimum(block + j, (H + BLOCK - 1) // BLOCK - 1)
                    scales_w = w_scale + expert.to(gl.int64) * SE + at * SN
                    acc = _product(a_bufs, w_bufs, a * KB, (w * NB + j) * KB, scales_a, scales_w, KB, MMA)
                    if j == NB - 1:
                        mbarrier.arrive(bars.index(A_EMPTY + a), count=1)
                        mbarrier.arrive(bars.index(W_EMPTY + w), count=1, pred=i + 2 >= tiles)
                    _write(acc, y, None, expert, row_0, end, (block + j) * BLOCK, H, BLOCK, LAYOUT)
            a_step += tiles
            w_step += 1


@gluon.jit
def fp8_alternating_down_kernel(
    act_map, w_map, a_scale, w_scale, y, row_end,
    H: gl.constexpr, E: gl.constexpr, KB: gl.constexpr, NB: gl.constexpr, SE: gl.constexpr, SN: gl.constexpr,
    W_STAGES: gl.constexpr, A_STAGES: gl.constexpr, LAYOUT: gl.constexpr, EARLY: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """y[r] = act[r] @ w2[e].T; a_scale [rows, KB], w_scale of w2; programs walk (expert, NB blocks of rows of w2).

    EARLY: programmatic launch; the kernel before has waited for `row_end` before it lets this one come.
    """
    if EARLY:
        let_next_kernel_come()
    a_bufs = gl.allocate_shared_memory(act_map.dtype, [A_STAGES * KB, ROWS, BLOCK], act_map.layout)
    w_bufs = gl.allocate_shared_memory(w_map.dtype, [W_STAGES * NB * KB, BLOCK, BLOCK], w_map.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2 * (A_STAGES + W_STAGES), 1], mbarrier.MBarrierLayout())
    # Full and empty, of rows and of weights. Both warpgroups must be done with a block of weights before it goes.
    for i in gl.static_range(2 * A_STAGES + W_STAGES):
        mbarrier.init(bars.index(i), count=1)
    for i in gl.static_range(W_STAGES):
        mbarrier.init(bars.index(2 * A_STAGES + W_STAGES + i), count=2)
    gl.warp_specialize(
        [
            (_multiply, (0, y, a_scale, w_scale, a_bufs, w_bufs, bars, row_end, H, E, KB, NB, SE, SN, LAYOUT, EARLY)),
            (_multiply, (1, y, a_scale, w_scale, a_bufs, w_bufs, bars, row_end, H, E, KB, NB, SE, SN, LAYOUT, EARLY)),
            (_load, (act_map, w_map, a_bufs, w_bufs, bars, row_end, H, E, KB, NB, EARLY)),
        ],
        [4, 1],
        [TURN_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
