"""The NVFP4 down GEMM where I is short: `alternating.py`, its weights expanded into shared memory by four warps.

Each weight is expanded once for all rows of its expert. Rows of act are in their own order, and each already carries
the global scale of its expert's w2.

H hidden · I intermediate, a power of 2 · E_l local experts. TILES is I / 64.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from moe_core.ops._kernels.alternating import ROWS, _multiply, _rows_of
from moe_core.ops._kernels.nvfp4 import expand, load_tiles, row_tile

EXPANDER_REGISTERS = gl.constexpr(120)
TURN_REGISTERS = gl.constexpr(192)
CHUNK = gl.constexpr(64)  # rows of weights that four warps expand at a time

_KEEP = gl.constexpr("mov.b32 $0, $1;")
_KEEP_OPERANDS = gl.constexpr("=r,r,r")


@gluon.jit
def _values(words, scales, SHIFT: gl.constexpr):
    """Codes `[128, 4]` and scales `[128]` of 4 tiles, one a warp, as bfloat16 `[64, 64]`: 32 bytes of a row a lane."""
    a0, a1, a2, a3 = expand(words, scales, SHIFT)
    pairs = gl.join(gl.join(a0, a2), gl.join(a1, a3))
    pairs = gl.join(pairs, pairs)
    values = gl.inline_asm_elementwise(_KEEP, _KEEP_OPERANDS, [pairs], dtype=gl.bfloat16, is_pure=True, pack=2)
    values = gl.reshape(values, (4, 8, 4, 4, 2, 2, 2))  # warp, g, q, j, p, half, b
    return gl.reshape(gl.permute(values, (0, 5, 1, 2, 3, 4, 6)), (64, 64))


@gluon.jit
def _packed_block(w2, w2_scale, expert, block, H: gl.constexpr, TILES: gl.constexpr, BN: gl.constexpr):
    """This lane's codes and scales of BN rows of an expert's weights."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    thread = gl.arange(0, 128, gl.SliceLayout(1, L))
    lane = thread % 32
    loaded = ()
    for c in gl.static_range(BN // CHUNK):
        w_ptr, s_ptr = row_tile(w2, w2_scale, expert, block * (BN // 16) + 4 * c + thread // 32, lane, TILES, H)
        loaded = loaded + (load_tiles(w_ptr, s_ptr, lane, lane * 0, lane >= 0, TILES),)  # type: ignore[assignment]
    return loaded


@gluon.jit
def _expand(
    act_map, w2, w2_scale, a_bufs, w_bufs, bars, row_end, H: gl.constexpr, E: gl.constexpr, TILES: gl.constexpr,
    BN: gl.constexpr,
):  # fmt: skip
    """Expands this program's blocks of weights and feeds rows; the next block's codes are on their way meanwhile."""
    A_STAGES: gl.constexpr = a_bufs.type.shape[0]
    W_STAGES: gl.constexpr = w_bufs.type.shape[0]
    A_EMPTY: gl.constexpr = A_STAGES
    W_FULL: gl.constexpr = 2 * A_STAGES
    W_EMPTY: gl.constexpr = 2 * A_STAGES + W_STAGES
    BLOCKS: gl.constexpr = (H + BN - 1) // BN
    a_step = 0
    w_step = 0
    item = gl.program_id(0)
    packed = _packed_block(w2, w2_scale, item // BLOCKS, item % BLOCKS, H, TILES, BN)
    for item in range(gl.program_id(0), E * BLOCKS, gl.num_programs(0)):
        start, end = _rows_of(row_end, item // BLOCKS)
        if start < end:
            w = w_step % W_STAGES
            mbarrier.wait(bars.index(W_EMPTY + w), ((w_step // W_STAGES) & 1) ^ 1)
            for c in gl.static_range(BN // CHUNK):
                for b in gl.static_range(TILES):
                    part = w_bufs.index(w).slice(CHUNK * c, CHUNK).slice(64 * b, 64, dim=1)
                    part.store(_values(packed[c][b], packed[c][TILES + b // 2], 16 * (b % 2)))
            # The matrix unit reads by another way than threads write.
            fence_async_shared()
            mbarrier.arrive(bars.index(W_FULL + w), count=1)
            w_step += 1
        following = gl.minimum(item + gl.num_programs(0), E * BLOCKS - 1)
        packed = _packed_block(w2, w2_scale, following // BLOCKS, following % BLOCKS, H, TILES, BN)
        for row in range(start, end, ROWS):
            a = a_step % A_STAGES
            mbarrier.wait(bars.index(A_EMPTY + a), ((a_step // A_STAGES) & 1) ^ 1)
            mbarrier.expect(bars.index(a), act_map.block_type.nbytes)
            tma.async_copy_global_to_shared(act_map, [row, 0], bars.index(a), a_bufs.index(a))
            a_step += 1


@gluon.jit
def nvfp4_alternating_kernel(
    act_map, w2, w2_scale, bias, y, row_end,
    H: gl.constexpr, E: gl.constexpr, I: gl.constexpr, BN: gl.constexpr, W_STAGES: gl.constexpr,
    A_STAGES: gl.constexpr, LAYOUT: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """y[r] = act[r] @ w2[e].T + bias2[e]; programs walk (expert, block of BN columns)."""
    W: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, I], gl.bfloat16)
    a_bufs = gl.allocate_shared_memory(act_map.dtype, [A_STAGES, ROWS, I], act_map.layout)
    w_bufs = gl.allocate_shared_memory(gl.bfloat16, [W_STAGES, BN, I], W)
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
            (_expand, (act_map, w2, w2_scale, a_bufs, w_bufs, bars, row_end, H, E, I // 64, BN)),
        ],
        [4, 4],
        [TURN_REGISTERS, EXPANDER_REGISTERS],
    )  # fmt: skip
