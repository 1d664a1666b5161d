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
from moe_core.ops._kernels.dependent import let_next_kernel_come, wait_for_kernel_before
from moe_core.ops._kernels.nvfp4 import (
    UNDO,
    expand,
    row_tile,
    scales_of,
)
from moe_core.ops._nvfp4_launch import STEPS_PER_TURN

_KEEP = gl.constexpr("mov.b32 $0, $1;")
_KEEP_OPERANDS = gl.constexpr("=r,r,r")

UNROLLED = gl.constexpr(STEPS_PER_TURN)


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
def _step(
    acc, x_ptr, w_ptr, s_ptr, x_bufs, w_bufs, s_bufs, lane, k, STAGE: gl.constexpr, COPY: gl.constexpr,
    TILES: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    """(acc, weights): starts product k; product k - 1 may still run."""
    # Step k is there, and all warps are done with step k - 2, whose buffers are filled next: here the compiler puts a
    # barrier. Triton's own loops have no proxy fence between such copies and wgmma either.
    async_copy.wait_group(STAGES - 3)
    if COPY:
        ahead = k + STAGES - 2
        if ahead < TILES:
            stage: gl.constexpr = (STAGE + STAGES - 2) % STAGES
            _copy_step(
                x_ptr, w_ptr, s_ptr, x_bufs[stage].slice(0, BN), w_bufs[stage], s_bufs[stage], lane, ahead, TILES
            )  # fmt: skip
    async_copy.commit_group()
    left = _left_side_of(w_bufs[STAGE], s_bufs[STAGE], k, TILES, LEFT)
    acc = warpgroup_mma(left, x_bufs[STAGE].slice(0, BN).permute((1, 0)), acc, is_async=True)
    return acc, left


@gluon.jit
def _product(
    x_ptr, w_ptr, s_ptr, x_bufs, w_bufs, s_bufs, lane, TILES: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`[128, BN]` float32; the next step's weights are expanded while a step's product runs."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BN, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    for k in gl.static_range(STAGES - 2):
        if k < TILES:
            _copy_step(
                x_ptr, w_ptr, s_ptr, x_bufs[k].slice(0, BN), w_bufs[k], s_bufs[k], lane, k, TILES
            )  # fmt: skip
        async_copy.commit_group()
    acc = gl.zeros((128, BN), gl.float32, ACC)
    # No product may be under way where a loop starts again: the assembler would then wait for each one at once.
    WHOLE: gl.constexpr = TILES - TILES % UNROLLED if TILES >= 2 * UNROLLED else 0
    for start in range(0, WHOLE, UNROLLED):
        lefts = ()
        for i in gl.static_range(UNROLLED):
            if i > 1:
                acc, _ = warpgroup_mma_wait(1, deps=(acc, lefts[i - 2]))
            acc, left = _step(acc, x_ptr, w_ptr, s_ptr, x_bufs, w_bufs, s_bufs, lane, start + i, i % STAGES,
                              True, TILES, BN, STAGES, LEFT)  # fmt: skip
            lefts = lefts + (left,)  # type: ignore[assignment]
        acc = warpgroup_mma_wait(0, deps=(acc,))
    lefts = ()
    for i in gl.static_range(TILES - WHOLE):
        if i > 1:
            acc, _ = warpgroup_mma_wait(1, deps=(acc, lefts[i - 2]))
        acc, left = _step(acc, x_ptr, w_ptr, s_ptr, x_bufs, w_bufs, s_bufs, lane, WHOLE + i, i % STAGES,
                          WHOLE + i + STAGES - 2 < TILES, TILES, BN, STAGES, LEFT)  # fmt: skip
        lefts = lefts + (left,)  # type: ignore[assignment]
    acc = warpgroup_mma_wait(0, deps=(acc,))
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
    acc, weights, slot_of_row, scale, scale_2, after, bias, expert, row_0, last, block,
    I: gl.constexpr, BN: gl.constexpr, ACT: gl.constexpr, GATED: gl.constexpr, UP_FIRST: gl.constexpr,
    INTERLEAVED: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
):  # fmt: skip
    """act `[BN, 64]` (without a gate `[BN, 128]`), float32; columns in lane order if there is no `after`."""
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
    if after is None:
        return _for_lanes(gl.permute(h, (1, 0)), WIDTH, BN)
    else:
        return gl.permute(h * (gl.load(after + expert).to(gl.float32) * UNDO), (1, 0))


@gluon.jit
def _tile(
    x, slot_of_row, weights, w_ptr, s_ptr, scale, scale_2, after, bias, c, x_bufs, w_bufs, s_bufs, lane, expert, row_0,
    last, block, stride_x: gl.constexpr, stride_c: gl.constexpr, LEN: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
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
            acc, weights, slot_of_row, scale, scale_2, after, bias, expert, row_0, last, block, N, BN, ACT, GATED,
            UP_FIRST, INTERLEAVED, ALPHA, LIMIT, WEIGHT_ON_INPUT,
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


@gluon.jit
def _item(
    item, tiles, x, slot_of_row, row_end, tile_expert, tile_row, weights, w, w_scale, w_global, after, bias, c,
    stride_x: gl.constexpr, stride_c: gl.constexpr, shift_x: gl.constexpr, shift_c: gl.constexpr,
    LEN: gl.constexpr, R: gl.constexpr, N: gl.constexpr,
    K: gl.constexpr, UP: gl.constexpr, GATHER: gl.constexpr, ACT: gl.constexpr, GATED: gl.constexpr,
    UP_FIRST: gl.constexpr, INTERLEAVED: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    WEIGHT_ON_INPUT: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """One pair of a row tile and a block of 128 rows of weights, GROUP row tiles sharing their weights in L2."""
    X_BUF: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, 64], gl.bfloat16)
    FLAT_BUF: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    WORD_BUF: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    L: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [8, 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    per_group: gl.constexpr = GROUP * ((R + 127) // 128)
    first = (item // per_group) * GROUP
    size = gl.minimum(tiles - first, GROUP)
    tile = first + item % per_group % size
    block = item % per_group // size
    expert = gl.load(tile_expert + tile // SPLIT)
    row_0 = gl.load(tile_row + tile // SPLIT) + tile % SPLIT * BN
    last = 0
    if expert >= 0:
        last = gl.load(row_end + expert)
    if row_0 < last:
        if shift_x:
            x += expert.to(gl.int64) * shift_x
        if shift_c:
            c += expert.to(gl.int64) * shift_c
        x_bufs = ()
        w_bufs = ()
        s_bufs = ()
        for _ in gl.static_range(STAGES):
            # Not one allocation each: the compiler would put a barrier between any two uses of it.
            x_bufs = x_bufs + (gl.allocate_shared_memory(gl.bfloat16, [BN, 64], X_BUF),)  # type: ignore[assignment]
            w_bufs = w_bufs + (gl.allocate_shared_memory(gl.int32, [256, 4], WORD_BUF),)  # type: ignore[assignment]
            s_bufs = s_bufs + (gl.allocate_shared_memory(gl.int32, [256], FLAT_BUF),)  # type: ignore[assignment]
        thread = gl.arange(0, 256, gl.SliceLayout(1, L))
        w_ptr, _ = row_tile(w, w_scale, expert, block * 8 + thread // 32, thread % 32, LEN // 64, R)
        thread = gl.arange(0, 256, FLAT)
        lane = thread % 32
        _, s_ptr = row_tile(w, w_scale, expert, block * 8 + thread // 32, lane, LEN // 64, R)
        s_ptr += lane
        scale, scale_2 = scales_of(w_global, expert, UP, GATED, UP_FIRST)
        if last - row_0 <= BN // 4:
            _tile(x, slot_of_row, weights, w_ptr, s_ptr, scale, scale_2, after, bias, c, x_bufs, w_bufs, s_bufs, lane,
                  expert, row_0, last, block, stride_x, stride_c, LEN, N, K, UP, GATHER, ACT, GATED, UP_FIRST,
                  INTERLEAVED, ALPHA, LIMIT, WEIGHT_ON_INPUT, BN // 4, STAGES)  # fmt: skip
        elif last - row_0 <= BN // 2:
            _tile(x, slot_of_row, weights, w_ptr, s_ptr, scale, scale_2, after, bias, c, x_bufs, w_bufs, s_bufs, lane,
                  expert, row_0, last, block, stride_x, stride_c, LEN, N, K, UP, GATHER, ACT, GATED, UP_FIRST,
                  INTERLEAVED, ALPHA, LIMIT, WEIGHT_ON_INPUT, BN // 2, STAGES)  # fmt: skip
        else:
            _tile(x, slot_of_row, weights, w_ptr, s_ptr, scale, scale_2, after, bias, c, x_bufs, w_bufs, s_bufs, lane,
                  expert, row_0, last, block, stride_x, stride_c, LEN, N, K, UP, GATHER, ACT, GATED, UP_FIRST,
                  INTERLEAVED, ALPHA, LIMIT, WEIGHT_ON_INPUT, BN, STAGES)  # fmt: skip


@gluon.jit(do_not_specialize=["max_tiles"])
def nvfp4_gemm_kernel(
    x, slot_of_row, row_end, tile_expert, tile_row, num_tiles, weights, w, w_scale, w_global, after, bias, c, max_tiles,
    stride_x: gl.constexpr, stride_c: gl.constexpr, shift_x: gl.constexpr, shift_c: gl.constexpr,
    LEN: gl.constexpr, R: gl.constexpr, N: gl.constexpr, K: gl.constexpr, UP: gl.constexpr, GATHER: gl.constexpr,
    ACT: gl.constexpr, GATED: gl.constexpr, UP_FIRST: gl.constexpr, INTERLEAVED: gl.constexpr,
    ALPHA: gl.constexpr, LIMIT: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """c = activation(x rows @ w[e].T) per expert (the down product: without one), BN rows by 128 rows of weights.

    SPLIT of this kernel's tiles make one of the list's. An expert's last rows take a product of half or a quarter of
    the width where they fit. `after`: w2's global scales, if act is to carry them. shift_x and shift_c as in
    `grouped.py`. num_tiles: None, and one program a tile and block; or on the device, and the programs walk them.
    """
    if PDL:
        let_next_kernel_come()
        wait_for_kernel_before()
    if num_tiles is None:
        _item(gl.program_id(0), max_tiles * SPLIT, x, slot_of_row, row_end, tile_expert, tile_row, weights, w, w_scale,
              w_global, after, bias, c, stride_x, stride_c, shift_x, shift_c, LEN, R, N, K, UP, GATHER, ACT, GATED,
              UP_FIRST, INTERLEAVED, ALPHA, LIMIT, WEIGHT_ON_INPUT, BN, STAGES, GROUP, SPLIT)  # fmt: skip
    else:
        tiles = gl.load(num_tiles) * SPLIT
        for item in range(gl.program_id(0), tiles * ((R + 127) // 128), gl.num_programs(0)):
            _item(item, tiles, x, slot_of_row, row_end, tile_expert, tile_row, weights, w, w_scale, w_global, after,
                  bias, c, stride_x, stride_c, shift_x, shift_c, LEN, R, N, K, UP, GATHER, ACT, GATED, UP_FIRST,
                  INTERLEAVED, ALPHA, LIMIT, WEIGHT_ON_INPUT, BN, STAGES, GROUP, SPLIT)  # fmt: skip
