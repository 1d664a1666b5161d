"""Decode with few tokens: every (token, choice) slot reads its own expert, no sort, two kernels.

T tokens · H hidden · I intermediate · E_l local experts · K top-k; slot s = t * K + k.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_core.ops._kernels.activation import activate, gate_and_up


@triton.jit
def _partial_dot(
    acc, w_ptr, x_ptr, row_ok, k, BK: tl.constexpr, LEN: tl.constexpr, WK: tl.constexpr, MASK_ROWS: tl.constexpr
):
    """acc[r, :] += w[r, k + :] * x[k + :]; the sum over the last dim is left to the caller, once, at the end."""
    col = tl.arange(0, BK)
    if LEN < BK:
        x = tl.load(x_ptr + k + col, mask=col < LEN, other=0)
        w = tl.load(w_ptr + k * WK, mask=row_ok[:, None] & (col < LEN)[None, :], other=0, eviction_policy="evict_first")
    else:
        x = tl.load(x_ptr + k + col)
        if MASK_ROWS:
            w = tl.load(w_ptr + k * WK, mask=row_ok[:, None], other=0, eviction_policy="evict_first")
        else:
            w = tl.load(w_ptr + k * WK, eviction_policy="evict_first")
    return acc + w.to(tl.float32) * x.to(tl.float32)[None, :]


@triton.jit
def slots_up_kernel(
    x, ids, weights, num_rows, w13, bias13, act, stride_x: tl.constexpr,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr,
    WE: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, UP_FIRST: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """act[s, n] = activation(x[t] @ w13[e].T) for the BN columns of program 0's block and slot program 1."""
    block = tl.program_id(0)
    slot = tl.program_id(1)
    if PDL:
        # x, ids and weights may come from the kernel just before: nothing is read ahead of the wait. The next kernel
        # is released after it, so that it may read ids and weights without a wait of its own.
        gdc_wait()
        gdc_launch_dependents()
    token = slot // K
    e = tl.load(ids + slot).to(tl.int64)
    if num_rows is not None:
        e = tl.where(token < tl.load(num_rows), e, -1)
    if e >= 0:
        R: tl.constexpr = 2 * BN if GATED else BN
        r = tl.arange(0, R)
        n = block * BN + tl.arange(0, BN)
        if INTERLEAVED:
            row = 2 * block * BN + r
            row_ok = row < 2 * I
        else:
            row = (r // BN) * I + block * BN + r % BN
            row_ok = block * BN + r % BN < I
        MASK_ROWS: tl.constexpr = I % BN != 0
        x_ptr = x + token.to(tl.int64) * stride_x
        w_ptr = w13 + e * WE + row.to(tl.int64)[:, None] * WN + tl.arange(0, BK)[None, :] * WK
        acc = tl.zeros((R, BK), tl.float32)
        TAIL: tl.constexpr = H % BK
        if UNROLL:
            for k in tl.static_range(0, H - TAIL, BK):
                acc = _partial_dot(acc, w_ptr, x_ptr, row_ok, k, BK, BK, WK, MASK_ROWS)
        else:
            for k in tl.range(0, H - TAIL, BK, loop_unroll_factor=4):
                acc = _partial_dot(acc, w_ptr, x_ptr, row_ok, k, BK, BK, WK, MASK_ROWS)
        if TAIL:
            acc = _partial_dot(acc, w_ptr, x_ptr, row_ok, H - TAIL, BK, TAIL, WK, MASK_ROWS)
        h = tl.sum(acc, 1)
        if WEIGHT_ON_INPUT:
            h = h * tl.load(weights + slot)
        if bias13 is not None:
            h += tl.load(bias13 + e * (2 * I if GATED else I) + row, mask=row_ok, other=0).to(tl.float32)
        if GATED:
            gate, up = gate_and_up(tl.reshape(h, (1, R)), BN, INTERLEAVED, UP_FIRST)
            h = tl.reshape(activate(gate, up, ACT, True, ALPHA, LIMIT), (BN,))
        else:
            h = activate(h, h, ACT, False, ALPHA, LIMIT)
        tl.store(act + slot.to(tl.int64) * I + n, h.to(act.dtype.element_ty), mask=n < I)


@triton.jit
def _load_w2(w_ptr, row_ok, i, I: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr):
    if I % BK:
        row_ok = row_ok & (tl.arange(0, BK)[None, None, :] + i < I)
    return tl.load(w_ptr + i * WK, mask=row_ok, other=0, eviction_policy="evict_first")


@triton.jit
def _add_chunk(acc, w, a_ptr, a_ok, i, I: tl.constexpr, BK: tl.constexpr):
    if I % BK:
        a_ok = a_ok & (tl.arange(0, BK)[None, None, :] + i < I)
    a = tl.load(a_ptr + i, mask=a_ok, other=0)
    return acc + w.to(tl.float32) * a.to(tl.float32)


@triton.jit
def slots_down_kernel(
    act, ids, weights, num_rows, w2, bias2, out, stride_out: tl.constexpr,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    WE: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PRELOAD: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t, n] = sum over k of weight * (act[s] @ w2[e].T + bias2[e]); all K experts of a token in one program.

    PRELOAD chunks (0 to 4) of w2 are requested before the wait for the kernel that writes `act`.
    """
    token = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, KP)
    slot = token * K + k
    e = tl.load(ids + slot, mask=k < K, other=-1).to(tl.int64)
    if num_rows is not None:
        e = tl.where(token < tl.load(num_rows), e, -1)
    used = e >= 0
    e = tl.where(used, e, 0)
    weight = tl.full((KP,), 1.0, tl.float32)
    if not WEIGHT_ON_INPUT:
        weight = tl.load(weights + slot, mask=k < K, other=0)
    weight = tl.where(used, weight, 0.0)
    rows = e[:, None] * WE + n.to(tl.int64)[None, :] * WN
    if H % BN:
        row_ok = (used[:, None] & (n < H)[None, :])[:, :, None]
    else:
        row_ok = used[:, None, None]
    w_ptr = w2 + rows[:, :, None] + tl.arange(0, BK)[None, None, :] * WK
    a_ptr = act + (slot.to(tl.int64) * I)[:, None, None] + tl.arange(0, BK)[None, None, :]
    a_ok = used[:, None, None]
    if PRELOAD > 0:
        w_0 = _load_w2(w_ptr, row_ok, 0, I, BK, WK)
    if PRELOAD > 1:
        w_1 = _load_w2(w_ptr, row_ok, BK, I, BK, WK)
    if PRELOAD > 2:
        w_2 = _load_w2(w_ptr, row_ok, 2 * BK, I, BK, WK)
    if PRELOAD > 3:
        w_3 = _load_w2(w_ptr, row_ok, 3 * BK, I, BK, WK)
    if PDL:
        gdc_wait()
    acc = tl.zeros((KP, BN, BK), tl.float32)
    if PRELOAD > 0:
        acc = _add_chunk(acc, w_0, a_ptr, a_ok, 0, I, BK)
    if PRELOAD > 1:
        acc = _add_chunk(acc, w_1, a_ptr, a_ok, BK, I, BK)
    if PRELOAD > 2:
        acc = _add_chunk(acc, w_2, a_ptr, a_ok, 2 * BK, I, BK)
    if PRELOAD > 3:
        acc = _add_chunk(acc, w_3, a_ptr, a_ok, 3 * BK, I, BK)
    if UNROLL:
        for i in tl.static_range(PRELOAD * BK, I, BK):
            acc = _add_chunk(acc, _load_w2(w_ptr, row_ok, i, I, BK, WK), a_ptr, a_ok, i, I, BK)
    else:
        for i in tl.range(PRELOAD * BK, I, BK, loop_unroll_factor=4):
            acc = _add_chunk(acc, _load_w2(w_ptr, row_ok, i, I, BK, WK), a_ptr, a_ok, i, I, BK)
    y = tl.sum(acc, 2)
    if bias2 is not None:
        b_ptr = bias2 + e[:, None] * H + n[None, :]
        y += tl.load(b_ptr, mask=used[:, None] & (n < H)[None, :], other=0).to(tl.float32)
    # A slot without an expert: 0 * (sum of masked zeros), so nothing unwritten reaches the output.
    y = tl.sum(y * weight[:, None], 0)
    o_ptr = out + token.to(tl.int64) * stride_out + n
    tl.store(o_ptr, y.to(out.dtype.element_ty), mask=n < H)
