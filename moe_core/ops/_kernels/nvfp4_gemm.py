"""NVFP4 experts for many rows: grouped GEMMs whose weights become bfloat16 in registers (Gluon, Hopper).

128 rows of weights a program are the left side of wgmma, because that one may come from registers: the lane that loads
16 packed bytes holds what four products want of it, as in `nvfp4.py`. Rows of activations are the right side, through
shared memory. They must stand in the order in which the lanes hold the weights' columns, so `nvfp4_permute_kernel`
reorders x once, inside each 64 columns, and the up product writes `act` that way.

T tokens · H hidden · I intermediate · E_l local experts · K top-k; slot s = t * K + k. LEN is the length of the dot
products, R the rows of a weight matrix, N the columns of the result. Row tiles are those of `align_kernel`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_core.ops._kernels.activation import activate
from moe_core.ops._kernels.nvfp4 import expand, row_tile, scales_of

_KEEP = gl.constexpr("mov.b32 $0, $1;")
_KEEP_OPERANDS = gl.constexpr("=r,r,r")


@gluon.jit
def _left_side(words, scales, LAYOUT: gl.constexpr):
    """Codes `[256, 4]` and scales `[256]` of 8 tiles, one a warp, as bfloat16 `[128, 64]`; no value leaves its lane."""
    a0, a1, a2, a3 = expand(words, scales, 0)
    pairs = gl.join(gl.join(a0, a2), gl.join(a1, a3))
    pairs = gl.join(pairs, pairs)
    values = gl.inline_asm_elementwise(_KEEP, _KEEP_OPERANDS, [pairs], dtype=gl.bfloat16, is_pure=True, pack=2)
    values = gl.reshape(values, (8, 8, 4, 4, 2, 2, 2))  # warp, g, q, j, p, half, b
    values = gl.permute(values, (0, 5, 1, 3, 4, 2, 6))
    return gl.convert_layout(gl.reshape(values, (128, 64)), LAYOUT)


@gluon.jit
def _copy_step(x_ptr, w_ptr, s_ptr, x_buf, w_buf, s_buf, lane, k, TILES: gl.constexpr):
    """Asks for step k: 64 columns of the activation rows, a tile of codes and a word of scales for each warp."""
    async_copy.async_copy_global_to_shared(x_buf, x_ptr + 64 * k)
    async_copy.async_copy_global_to_shared(w_buf, w_ptr + 128 * k)
    if TILES % 2:
        # The scales of a last single tile are half words.
        s_ptr += gl.where(k == TILES - 1, lane // 2 - lane, 0)
    async_copy.async_copy_global_to_shared(s_buf, s_ptr + k // 2 * 32)


@gluon.jit
def _left_side_of(w_buf, s_buf, k, TILES: gl.constexpr, LAYOUT: gl.constexpr):
    """Step k's weights."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [8, 1], [1, 0])
    scales = s_buf.load(gl.SliceLayout(1, L))
    shift = 16 * (k % 2)
    if TILES % 2:
        lane = gl.arange(0, 256, gl.SliceLayout(1, L)) % 32
        shift = gl.where(k == TILES - 1, 16 * (lane % 2), shift)
    return _left_side(w_buf.load(L), scales >> shift, LAYOUT)


@gluon.jit
def _all_warps():
    """Wait for every warp of the program."""
    gl.inline_asm_elementwise(
        "bar.sync 0; mov.u32 $0, 0;", "=r,~{memory}", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def _product(
    x_ptr, w_ptr, s_ptr, x_bufs, w_bufs, s_bufs, lane, TILES: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`[128, BN]` float32; the next step's weights are read while a step's product runs."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BN, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    for k in gl.static_range(STAGES - 1):
        if k < TILES:
            _copy_step(
                x_ptr, w_ptr, s_ptr, x_bufs.index(k).slice(0, BN), w_bufs.index(k), s_bufs.index(k), lane, k, TILES
            )  # fmt: skip
        async_copy.commit_group()
    acc = gl.zeros((128, BN), gl.float32, ACC)
    async_copy.wait_group(STAGES - 2)
    left = _left_side_of(w_bufs.index(0), s_bufs.index(0), 0, TILES, LEFT)
    for k in range(TILES):
        # Steps k and k + 1 are there, and all warps are done with step k - 1, whose buffers are filled next: here the
        # compiler puts a barrier. Triton's own loops have no proxy fence between such copies and wgmma either.
        async_copy.wait_group(STAGES - 3)
        acc = warpgroup_mma(left, x_bufs.index(k % STAGES).slice(0, BN).permute((1, 0)), acc, is_async=True)
        ahead = k + STAGES - 1
        if ahead < TILES:
            stage = ahead % STAGES
            _copy_step(
                x_ptr, w_ptr, s_ptr, x_bufs.index(stage).slice(0, BN), w_bufs.index(stage), s_bufs.index(stage), lane,
                ahead, TILES,
            )  # fmt: skip
        async_copy.commit_group()
        stage = (k + 1) % STAGES
        following = _left_side_of(w_bufs.index(stage), s_bufs.index(stage), k + 1, TILES, LEFT)
        # The product reads `left` until here.
        acc, left, following = warpgroup_mma_wait(0, deps=(acc, left, following))
        left = following
    # What comes next may use these buffers' memory, and the other warps' last product still reads from it.
    _all_warps()
    return acc


@gluon.jit
def _for_lanes(h, COLUMNS: gl.constexpr, BN: gl.constexpr):
    """Columns of act `[BN, COLUMNS]` in the order in which the down product's lanes hold its weights' columns."""
    h = gl.permute(gl.reshape(h, (BN, COLUMNS // 64, 4, 4, 2, 2)), (0, 1, 3, 4, 2, 5))
    return gl.reshape(h, (BN, COLUMNS))


@gluon.jit
def _up_result(
    acc, weights, slot_of_row, scale, scale_2, bias, expert, row_0, last, block, I: gl.constexpr, BN: gl.constexpr,
    ACT: gl.constexpr, GATED: gl.constexpr, UP_FIRST: gl.constexpr, INTERLEAVED: gl.constexpr,
    ALPHA: gl.constexpr, LIMIT: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
):  # fmt: skip
    """act `[BN, 64]` (without a gate `[BN, 128]`), float32, columns in lane order."""
    WIDTH: gl.constexpr = 64 if GATED else 128
    if GATED:
        both = gl.permute(gl.reshape(acc, (8, 2, 8, BN)), (0, 2, 3, 1))
        gate, up = gl.split(both)
        gate, up = gl.reshape(gate, (64, BN)) * scale, gl.reshape(up, (64, BN)) * scale_2
    else:
        gate = acc * scale
        up = gate
    if WEIGHT_ON_INPUT:
        row = row_0 + gl.arange(0, BN, gl.SliceLayout(0, gate.type.layout))
        slot = gl.load(slot_of_row + gl.minimum(row, last - 1))
        weight = gl.load(weights + slot)[None, :]
        gate, up = gate * weight, up * weight
    if bias is not None:
        n = block * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(1, gate.type.layout))
        if GATED and INTERLEAVED:
            gate += gl.load(bias + expert * (2 * I) + 2 * n, mask=n < I, other=0).to(gl.float32)[:, None]
            up += gl.load(bias + expert * (2 * I) + 2 * n + 1, mask=n < I, other=0).to(gl.float32)[:, None]
        elif GATED:
            first = bias + expert * (2 * I) + n
            gate += gl.load(first + UP_FIRST * I, mask=n < I, other=0).to(gl.float32)[:, None]
            up += gl.load(first + (1 - UP_FIRST) * I, mask=n < I, other=0).to(gl.float32)[:, None]
        else:
            gate += gl.load(bias + expert * I + n, mask=n < I, other=0).to(gl.float32)[:, None]
    h = activate(gate, up, ACT, GATED, ALPHA, LIMIT)
    return _for_lanes(gl.permute(h, (1, 0)), WIDTH, BN)


@gluon.jit
def _tile(
    x, slot_of_row, weights, w_ptr, s_ptr, scale, scale_2, bias, c, x_bufs, w_bufs, s_bufs, lane, expert, row_0, last,
    block, stride_x: gl.constexpr, stride_c: gl.constexpr, LEN: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
    UP: gl.constexpr, GATHER: gl.constexpr, ACT: gl.constexpr, GATED: gl.constexpr, UP_FIRST: gl.constexpr,
    INTERLEAVED: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Rows row_0 to row_0 + BN of c (those before `last`), for one block of weight rows."""
    X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    row = gl.minimum(row_0 + gl.arange(0, BN, gl.SliceLayout(1, X)), last - 1)
    if GATHER:
        row = gl.load(slot_of_row + row) // K
    x_ptr = x + (row.to(gl.int64) * stride_x)[:, None] + gl.arange(0, 64, gl.SliceLayout(0, X))[None, :]
    acc = _product(x_ptr, w_ptr, s_ptr, x_bufs, w_bufs, s_bufs, lane, LEN // 64, BN, STAGES)
    WIDTH: gl.constexpr = 64 if UP and GATED else 128
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [8, 1], [1, 0])
    if UP:
        h = _up_result(
            acc, weights, slot_of_row, scale, scale_2, bias, expert, row_0, last, block, N, BN, ACT, GATED, UP_FIRST,
            INTERLEAVED, ALPHA, LIMIT, WEIGHT_ON_INPUT,
        )  # fmt: skip
    else:
        h = acc * scale
        if bias is not None:
            n = block * 128 + gl.arange(0, 128, gl.SliceLayout(1, acc.type.layout))
            h += gl.load(bias + expert * N + n, mask=n < N, other=0).to(gl.float32)[:, None]
        h = gl.permute(h, (1, 0))
    h = gl.convert_layout(h.to(c.dtype.element_ty), OUT)
    row = row_0 + gl.arange(0, BN, gl.SliceLayout(1, OUT))
    column = block * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, OUT))
    at = c + row.to(gl.int64)[:, None] * stride_c + column[None, :]
    gl.store(at, h, mask=(row < last)[:, None] & (column < N)[None, :])


@gluon.jit(do_not_specialize=["max_tiles"])
def nvfp4_gemm_kernel(
    x, slot_of_row, row_end, tile_expert, tile_row, weights, w, w_scale, w_global, bias, c, max_tiles,
    stride_x: gl.constexpr, stride_c: gl.constexpr,
    LEN: gl.constexpr, R: gl.constexpr, N: gl.constexpr, K: gl.constexpr, UP: gl.constexpr, GATHER: gl.constexpr,
    ACT: gl.constexpr, GATED: gl.constexpr, UP_FIRST: gl.constexpr, INTERLEAVED: gl.constexpr,
    ALPHA: gl.constexpr, LIMIT: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, SPLIT: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """c = activation(x rows @ w[e].T) per expert (the down product: without one), BN rows by 128 rows of weights.

    SPLIT of this kernel's tiles make one of the list's. An expert's last rows take a product of half or a quarter of
    the width where they fit.
    """
    X_BUF: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, 64], gl.bfloat16)
    FLAT_BUF: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    WORD_BUF: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    L: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [8, 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    blocks: gl.constexpr = (R + 127) // 128
    per_group: gl.constexpr = GROUP * blocks
    pid = gl.program_id(0)
    first = (pid // per_group) * GROUP
    size = gl.minimum(max_tiles * SPLIT - first, GROUP)
    tile = first + pid % per_group % size
    block = pid % per_group // size
    expert = gl.load(tile_expert + tile // SPLIT)
    row_0 = gl.load(tile_row + tile // SPLIT) + tile % SPLIT * BN
    last = 0
    if expert >= 0:
        last = gl.load(row_end + expert)
    if row_0 < last:
        x_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, 64], X_BUF)
        w_bufs = gl.allocate_shared_memory(gl.int32, [STAGES, 256, 4], WORD_BUF)
        s_bufs = gl.allocate_shared_memory(gl.int32, [STAGES, 256], FLAT_BUF)
        thread = gl.arange(0, 256, gl.SliceLayout(1, L))
        w_ptr, _ = row_tile(w, w_scale, expert, block * 8 + thread // 32, thread % 32, LEN // 64, R)
        thread = gl.arange(0, 256, FLAT)
        lane = thread % 32
        _, s_ptr = row_tile(w, w_scale, expert, block * 8 + thread // 32, lane, LEN // 64, R)
        s_ptr += lane
        scale, scale_2 = scales_of(w_global, expert, UP, GATED, UP_FIRST)
        if last - row_0 <= BN // 4:
            _tile(x, slot_of_row, weights, w_ptr, s_ptr, scale, scale_2, bias, c, x_bufs, w_bufs, s_bufs, lane, expert,
                  row_0, last, block, stride_x, stride_c, LEN, N, K, UP, GATHER, ACT, GATED, UP_FIRST, INTERLEAVED,
                  ALPHA, LIMIT, WEIGHT_ON_INPUT, BN // 4, STAGES)  # fmt: skip
        elif last - row_0 <= BN // 2:
            _tile(x, slot_of_row, weights, w_ptr, s_ptr, scale, scale_2, bias, c, x_bufs, w_bufs, s_bufs, lane, expert,
                  row_0, last, block, stride_x, stride_c, LEN, N, K, UP, GATHER, ACT, GATED, UP_FIRST, INTERLEAVED,
                  ALPHA, LIMIT, WEIGHT_ON_INPUT, BN // 2, STAGES)  # fmt: skip
        else:
            _tile(x, slot_of_row, weights, w_ptr, s_ptr, scale, scale_2, bias, c, x_bufs, w_bufs, s_bufs, lane, expert,
                  row_0, last, block, stride_x, stride_c, LEN, N, K, UP, GATHER, ACT, GATED, UP_FIRST, INTERLEAVED,
                  ALPHA, LIMIT, WEIGHT_ON_INPUT, BN, STAGES)  # fmt: skip
