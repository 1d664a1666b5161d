"""The down GEMM with one warp that loads and eight that multiply (Gluon, Hopper): loads run ahead across tiles.

Not for the interpreter; its sibling there is `grouped.py`, its twin `experts_step_torch`. Rows, tiles and LEN, N as in
`grouped.py`. H hidden · I intermediate · E_l local experts.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOADER_REGISTERS = gl.constexpr(24)  # the smallest that the hardware gives; the rest goes to the accumulators


@gluon.jit
def _swizzle(pid, tiles, blocks, GROUP: gl.constexpr):
    """(row tile, block of columns): GROUP row tiles share their blocks of weights in L2."""
    per_group = GROUP * blocks
    first = (pid // per_group) * GROUP
    size = gl.minimum(tiles - first, GROUP)
    rest = pid % per_group
    return first + rest % size, rest // size


@gluon.jit
def _load(
    a_map,
    w_map,
    a_bufs,
    w_bufs,
    full,
    empty,
    tile_expert,
    tile_row,
    tiles,
    LEN: gl.constexpr,
    N: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Fills the buffers with the blocks of all of this program's tiles, as fast as they are emptied."""
    STAGES: gl.constexpr = a_bufs.type.shape[0]
    blocks = (N + BN - 1) // BN
    step = 0
    for pid in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        tile, block = _swizzle(pid, tiles, blocks, GROUP)
        expert = gl.load(tile_expert + tile)
        if expert >= 0:
            row = gl.load(tile_row + tile)
            for k in range(0, LEN, BK):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(stage), a_map.block_type.nbytes + w_map.block_type.nbytes)
                tma.async_copy_global_to_shared(a_map, [row, k], full.index(stage), a_bufs.index(stage))
                tma.async_copy_global_to_shared(
                    w_map, [expert * N + block * BN, k], full.index(stage), w_bufs.index(stage)
                )
                step += 1


@gluon.jit
def _product(
    a_bufs,
    w_bufs,
    full,
    empty,
    step,
    LEN: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    ROWS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """One [ROWS, BN] product in float32; a buffer is given back when the next product has started."""
    STAGES: gl.constexpr = a_bufs.type.shape[0]
    acc = gl.zeros((ROWS, BN), dtype=gl.float32, layout=LAYOUT)
    for k in range(0, LEN, BK):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        a = a_bufs.index(stage)
        if ROWS < a_bufs.type.shape[1]:
            a = a.slice(0, ROWS)
        acc = warpgroup_mma(a, w_bufs.index(stage).permute((1, 0)), acc, use_acc=k > 0, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
        step += 1
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return acc


@gluon.jit
def _write(
    acc,
    c,
    bias,
    expert,
    row_0,
    last,
    column,
    N: gl.constexpr,
    ROWS: gl.constexpr,
    BN: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Rows in pieces of 16 bytes a thread; rows of other experts are left alone."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    if bias is not None:
        n = column + gl.arange(0, BN, gl.SliceLayout(0, acc.type.layout))
        acc += gl.load(bias + expert.to(gl.int64) * N + n, mask=n < N, other=0).to(gl.float32)[None, :]
    out = gl.convert_layout(acc.to(c.dtype.element_ty), LAYOUT)
    row = row_0 + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    n = column + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    gl.store(c + row.to(gl.int64)[:, None] * N + n[None, :], out, mask=(row < last)[:, None] & (n < N)[None, :])


@gluon.jit
def _multiply(
    c,
    bias,
    a_bufs,
    w_bufs,
    full,
    empty,
    row_end,
    tile_expert,
    tile_row,
    tiles,
    LEN: gl.constexpr,
    N: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """All of this program's tiles; an expert's last 64 rows or fewer take a product of half the height."""
    TALL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BN, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, WARPS // 4], instr_shape=[16, BN // (WARPS // 4), 16]
    )
    blocks = (N + BN - 1) // BN
    step = 0
    for pid in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        tile, block = _swizzle(pid, tiles, blocks, GROUP)
        expert = gl.load(tile_expert + tile)
        if expert >= 0:
            row_0 = gl.load(tile_row + tile)
            last = gl.load(row_end + expert)
            if last - row_0 <= 64:
                half = _product(a_bufs, w_bufs, full, empty, step, LEN, BN, BK, 64, HALF)
                _write(half, c, bias, expert, row_0, last, block * BN, N, 64, BN, WARPS)
            else:
                tall = _product(a_bufs, w_bufs, full, empty, step, LEN, BN, BK, BM, TALL)
                _write(tall, c, bias, expert, row_0, last, block * BN, N, BM, BN, WARPS)
            step += (LEN + BK - 1) // BK


@gluon.jit(do_not_specialize=["tiles"])
def specialized_down_kernel(
    a_map, w_map, bias, c, row_end, tile_expert, tile_row, tiles,
    LEN: gl.constexpr, N: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """c[r] = a[r] @ w[e].T + bias[e] for the row tiles of `align_kernel`; programs walk the tiles."""
    a_bufs = gl.allocate_shared_memory(a_map.dtype, [STAGES, BM, BK], a_map.layout)
    w_bufs = gl.allocate_shared_memory(w_map.dtype, [STAGES, BN, BK], w_map.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (_multiply, (c, bias, a_bufs, w_bufs, full, empty, row_end, tile_expert, tile_row, tiles,
                         LEN, N, BM, BN, BK, GROUP, num_warps)),
            (_load, (a_map, w_map, a_bufs, w_bufs, full, empty, tile_expert, tile_row, tiles, LEN, N, BN, BK, GROUP)),
        ],
        [1],
        [LOADER_REGISTERS],
    )  # fmt: skip
