"""NVFP4 experts for few tokens: every (token, choice) slot reads its own expert, no sort, two kernels (Gluon).

T tokens · H hidden · I intermediate · E_l local experts · K top-k; slot s = t * K + k. Warps, tiles and blocks as in
`nvfp4.py`. A product's right side takes 8 rows; here they are all the same.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_core.ops._kernels.dependent import let_next_kernel_come, wait_for_kernel_before
from moe_core.ops._kernels.nvfp4 import (
    UNDO,
    activated,
    load_columns,
    load_tiles,
    loads_stay_above,
    multiply_columns,
    multiply_tiles,
    result_pairs,
    row_tile,
    row_words,
    scales_of,
)


@gluon.jit
def nvfp4_slots_up_kernel(
    x, ids, weights, num_rows, w13, w13_scale, w13_global, w2_global, bias13, act, stride_x: gl.constexpr,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr,
    ACT: gl.constexpr, GATED: gl.constexpr, UP_FIRST: gl.constexpr, INTERLEAVED: gl.constexpr,
    ALPHA: gl.constexpr, LIMIT: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
    WR: gl.constexpr, WK: gl.constexpr, DEPTH: gl.constexpr, TOGETHER: gl.constexpr, PDL: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """act[s] = router weight * w2's global scale * activation(x[t] @ w13[e].T), for WR tiles of rows and one slot."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [num_warps, 1], [1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [num_warps, 1], [1, 0])
    TILES: gl.constexpr = H // 64
    BLOCKS: gl.constexpr = TILES // 4
    TAIL: gl.constexpr = TILES % 4
    STEPS: gl.constexpr = (BLOCKS + WK - 1) // WK
    MASKED: gl.constexpr = STEPS * WK > BLOCKS or STEPS % DEPTH > 0
    R: gl.constexpr = 2 * I if GATED else I
    slot = gl.program_id(1)
    if PDL:
        # ids and x may come from the kernel just before. The next one reads ids without a wait: not before this one's.
        wait_for_kernel_before()
        let_next_kernel_come()
    thread = gl.arange(0, 32 * num_warps, gl.SliceLayout(1, L))
    lane, warp = thread % 32, thread // 32
    first = warp % WK
    x_ptrs = (row_words(x, slot // K + lane * 0, lane % 4, stride_x),)
    AT_ONCE: gl.constexpr = TOGETHER and STEPS <= DEPTH
    columns = ()
    if AT_ONCE:
        # No need to know the expert for these.
        for d in gl.static_range(DEPTH):
            i = first + d * WK
            columns = columns + (load_columns(x_ptrs, i, 0, 4, i < BLOCKS, MASKED, 1),)  # type: ignore[assignment]
    expert = gl.load(ids + slot).to(gl.int32)
    if num_rows is not None:
        expert = gl.where(slot // K < gl.load(num_rows), expert, -1)
    if expert >= 0:
        weight = gl.load(weights + slot)
        scale, scale_2 = scales_of(w13_global, expert, True, GATED, UP_FIRST)
        after = gl.load(w2_global + expert).to(gl.float32)
        if WEIGHT_ON_INPUT:
            scale, scale_2 = scale * weight, scale_2 * weight
        else:
            after = after * weight
        w_ptr, s_ptr = row_tile(w13, w13_scale, expert, gl.program_id(0) * WR + warp // WK, lane, TILES, R)
        ring = ()
        for d in gl.static_range(DEPTH):
            i = first + d * WK
            ring = ring + (load_tiles(w_ptr, s_ptr, lane, i, i < BLOCKS, 4),)  # type: ignore[assignment]
        mine = first == BLOCKS % WK
        tail = load_tiles(w_ptr, s_ptr, lane, BLOCKS + first * 0, mine, TAIL)
        loads_stay_above()
        accs = (gl.zeros((32 * num_warps, 4), gl.float32, L),)
        for start in range(0, STEPS, DEPTH):
            new = ()
            for d in gl.static_range(DEPTH):
                i = first + (start + d) * WK
                if STEPS > DEPTH:
                    ahead = i + DEPTH * WK
                    new = new + (load_tiles(w_ptr, s_ptr, lane, ahead, ahead < BLOCKS, 4),)  # type: ignore[assignment]
                    if DEPTH > 1:
                        loads_stay_above()
                if AT_ONCE:
                    accs = multiply_columns(ring[d], columns[d], accs, 0, 4, 4, 1)
                else:
                    accs = multiply_tiles(ring[d], x_ptrs, i, accs, i < BLOCKS, MASKED, 4, 1, TOGETHER)
            if STEPS > DEPTH:
                ring = new
        accs = multiply_tiles(tail, x_ptrs, BLOCKS + first * 0, accs, mine, WK > 1, TAIL, 1, TOGETHER)
        low, high = result_pairs(accs[0], WR, WK, OUT)
        row = gl.arange(0, 32 * WR, gl.SliceLayout(1, OUT))
        of_pair = gl.arange(0, 2, gl.SliceLayout(0, OUT))
        tile = gl.program_id(0) * WR + row // 32
        column = (tile * (8 if GATED else 16) + row % 32 // 4)[:, None] + of_pair[None, :] * 0
        ok = ((tile < R // 16) & (row % 4 == 0))[:, None] & (of_pair[None, :] == 0)
        low, high = activated(
            low * scale, high * scale_2, expert, bias13, column, ok, I, ACT, GATED, UP_FIRST, INTERLEAVED, ALPHA, LIMIT
        )
        at = act + slot.to(gl.int64) * I + column
        gl.store(at, (low * after).to(act.dtype.element_ty), mask=ok)
        if not GATED:
            gl.store(at + 8, (high * after).to(act.dtype.element_ty), mask=ok)


@gluon.jit
def _load_choice(ids, valid, w2, w2_scale, token, tile, k, i, lane, I: gl.constexpr, H: gl.constexpr,
                 K: gl.constexpr, COUNT: gl.constexpr):  # fmt: skip
    """(tiles from 4 * i on of a token's choice k, whether there is one)."""
    expert = gl.load(ids + token * K + k, mask=k < K, other=-1).to(gl.int32)
    used = valid & (expert >= 0)
    w_ptr, s_ptr = row_tile(w2, w2_scale, gl.maximum(expert, 0), tile, lane, I // 64, H)
    return load_tiles(w_ptr, s_ptr, lane, i, used, COUNT), used


@gluon.jit
def nvfp4_slots_down_kernel(
    act, ids, weights, num_rows, w2, w2_scale, bias2, out, stride_out: gl.constexpr,
    H: gl.constexpr, I: gl.constexpr, K: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr,
    WR: gl.constexpr, WK: gl.constexpr, DEPTH: gl.constexpr, TOGETHER: gl.constexpr, PDL: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of act[s] @ w2[e].T + weight * bias2[e], for WR tiles of rows; `act` is weighted already.

    Zero from `num_rows` on."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [num_warps, 1], [1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [num_warps, 1], [1, 0])
    TILES: gl.constexpr = I // 64
    BLOCKS: gl.constexpr = TILES // 4
    TAIL: gl.constexpr = TILES % 4
    STEPS: gl.constexpr = (BLOCKS * K + WK - 1) // WK
    EACH: gl.constexpr = BLOCKS if BLOCKS > 0 else 1
    token = gl.program_id(1)
    if PDL:
        let_next_kernel_come()
    thread = gl.arange(0, 32 * num_warps, gl.SliceLayout(1, L))
    lane, warp = thread % 32, thread // 32
    first = warp % WK
    tile = gl.program_id(0) * WR + warp // WK
    valid = lane >= 0
    if num_rows is not None:
        valid = valid & (token < gl.load(num_rows))
    whole = valid & (lane < 32 * BLOCKS)  # a dot product of less than a block has its last tiles alone
    # The blocks of all choices, one after another, are dealt to the warps; the choices' last tiles then likewise. The
    # first weights are asked for before `act` is there.
    ring = ()
    for d in gl.static_range(DEPTH):
        at = first + d * WK
        ring = ring + (  # type: ignore[assignment]
            _load_choice(ids, whole, w2, w2_scale, token, tile, at // EACH, at % EACH, lane, I, H, K, 4),
        )  # fmt: skip
    tails = ()
    if TAIL > 0:
        for d in gl.static_range((K + WK - 1) // WK):
            tails = tails + (  # type: ignore[assignment]
                _load_choice(ids, valid, w2, w2_scale, token, tile, first + d * WK, BLOCKS + first * 0, lane, I, H, K,
                             TAIL),
            )  # fmt: skip
    if PDL:
        wait_for_kernel_before()
    accs = (gl.zeros((32 * num_warps, 4), gl.float32, L),)
    AT_ONCE: gl.constexpr = TOGETHER and STEPS <= DEPTH
    columns = ()
    if AT_ONCE:
        for d in gl.static_range(DEPTH):
            at = first + d * WK
            x_ptrs = (row_words(act, token * K + at // EACH, lane % 4, I),)
            columns = columns + (load_columns(x_ptrs, at % EACH, 0, 4, ring[d][1], True, 1),)  # type: ignore[assignment]
        loads_stay_above()
    for start in range(0, STEPS, DEPTH):
        new = ()
        for d in gl.static_range(DEPTH):
            at = first + (start + d) * WK
            if STEPS > DEPTH:
                ahead = at + DEPTH * WK
                new = new + (  # type: ignore[assignment]
                    _load_choice(ids, whole, w2, w2_scale, token, tile, ahead // EACH, ahead % EACH, lane, I, H, K, 4),
                )  # fmt: skip
                if DEPTH > 1:
                    loads_stay_above()
            if AT_ONCE:
                accs = multiply_columns(ring[d][0], columns[d], accs, 0, 4, 4, 1)
            else:
                x_ptrs = (row_words(act, token * K + at // EACH, lane % 4, I),)
                accs = multiply_tiles(ring[d][0], x_ptrs, at % EACH, accs, ring[d][1], True, 4, 1, TOGETHER)
        if STEPS > DEPTH:
            ring = new
    if TAIL > 0:
        for d in gl.static_range((K + WK - 1) // WK):
            x_ptrs = (row_words(act, token * K + first + d * WK, lane % 4, I),)
            accs = multiply_tiles(tails[d][0], x_ptrs, BLOCKS + first * 0, accs, tails[d][1], True, TAIL, 1, TOGETHER)
    low, high = result_pairs(accs[0], WR, WK, OUT)
    row = gl.arange(0, 32 * WR, gl.SliceLayout(1, OUT))
    of_pair = gl.arange(0, 2, gl.SliceLayout(0, OUT))
    tile = gl.program_id(0) * WR + row // 32
    column = (tile * 16 + row % 32 // 4)[:, None] + of_pair[None, :] * 0
    ok = ((tile < H // 16) & (row % 4 == 0))[:, None] & (of_pair[None, :] == 0)
    low, high = low * UNDO, high * UNDO
    if bias2 is not None:
        for k in gl.static_range(K):
            expert = gl.load(ids + token * K + k).to(gl.int32)
            if num_rows is not None:
                expert = gl.where(token < gl.load(num_rows), expert, -1)
            used = ok & (expert >= 0)
            weight = 1.0
            if not WEIGHT_ON_INPUT:
                weight = gl.where(expert >= 0, gl.load(weights + token * K + k), 0.0)
            at = bias2 + expert * H + column
            low += weight * gl.load(at, mask=used, other=0).to(gl.float32)
            high += weight * gl.load(at + 8, mask=used, other=0).to(gl.float32)
    at = out + token.to(gl.int64) * stride_out + column
    gl.store(at, low.to(out.dtype.element_ty), mask=ok)
    gl.store(at + 8, high.to(out.dtype.element_ty), mask=ok)
