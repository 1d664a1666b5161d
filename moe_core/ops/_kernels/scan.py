"""Decode with some tokens: one program per (block of columns, expert) finds its own rows among all ids, no sort.

BY_SLOT: one program per (block of columns, slot) instead, and the last of a token's K programs to arrive sums its K
rows: two kernels. It serves few tokens where the weights' output columns are contiguous, because a matrix product
through shared memory then reads whole lines, which a dot product per output row can't.

T tokens · H hidden · I intermediate · E_l local experts · K top-k; slot s = t * K + k.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_core.ops._kernels.activation import activate, gate_and_up


@triton.jit
def _my_slots(ids, num_rows, num_slots, expert, K: tl.constexpr, SLOTS: tl.constexpr):
    """Which of the SLOTS slots chose `expert`: (hit, rank of each hit, number of hits), in slot order."""
    slot = tl.arange(0, SLOTS)
    if num_rows is not None:
        num_slots = tl.minimum(num_slots, tl.load(num_rows) * K)
    hit = tl.load(ids + slot, mask=slot < num_slots, other=-1) == expert
    rank = tl.cumsum(hit.to(tl.int32), 0) - 1
    return hit, rank, tl.sum(hit.to(tl.int32), 0)


@triton.jit
def _rows_of_program(ids, num_rows, num_slots, K: tl.constexpr, SLOTS: tl.constexpr, BY_SLOT: tl.constexpr):
    """(expert, hit, rank, number of rows) of this program; `hit` and `rank` as of `_my_slots`."""
    if BY_SLOT:
        slot = tl.program_id(1)
        expert = tl.load(ids + slot)
        if num_rows is not None:
            expert = tl.where(slot // K < tl.load(num_rows), expert, -1)
        hit = tl.arange(0, SLOTS) == slot
        rank = tl.zeros((SLOTS,), tl.int32)
        count = (expert >= 0).to(tl.int32)
    else:
        expert = tl.program_id(1)
        hit, rank, count = _my_slots(ids, num_rows, num_slots, expert, K, SLOTS)
    return expert.to(tl.int64), hit, rank, count


@triton.jit
def _sum_if_last(
    y,
    ids,
    weights,
    out,
    arrivals,
    stride_out,
    block,
    n,
    H: tl.constexpr,
    K: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    num_rows=None,
):
    """The last of a token's K programs for these columns writes their weighted sum, in slot order whoever is last;
    zeros from `num_rows` on."""
    token = tl.program_id(1) // K
    valid = True
    if num_rows is not None:
        valid = token < tl.load(num_rows)
    # Every warp's rows must be out before the count says so.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals + token * BLOCKS + block, 1, sem="acq_rel")
    if arrived == K - 1:
        acc = tl.zeros(n.shape, tl.float32)
        for k in tl.static_range(K):
            used = (tl.load(ids + token * K + k) >= 0) & valid
            weight = 1.0
            if not WEIGHT_ON_INPUT:
                weight = tl.load(weights + token * K + k)
            row = y + (token * K + k).to(tl.int64) * H + n
            # Past the first-level cache: the row may come from another multiprocessor.
            v = tl.load(row, mask=(n < H) & used, other=0, cache_modifier=".cg").to(tl.float32)
            acc += tl.where(used, weight * v, 0.0)
        tl.store(out + token.to(tl.int64) * stride_out + n, acc.to(out.dtype.element_ty), mask=n < H)


@triton.jit
def _slots_of_rows(hit, rank, first, BM: tl.constexpr, SLOTS: tl.constexpr):
    """Slots of the hits numbered first .. first + BM (0 past the last)."""
    row = first + tl.arange(0, BM)
    chosen = (rank[None, :] == row[:, None]) & hit[None, :]
    return tl.sum(tl.where(chosen, tl.arange(0, SLOTS)[None, :], 0), 1)


@triton.jit
def _load_rows(a_ptr, a_ok, k, LEN: tl.constexpr, BK: tl.constexpr):
    """A [BM, BK] block of activations; `k` is where it starts."""
    if LEN % BK:
        a_ok = a_ok[:, None] & (tl.arange(0, BK) < LEN - k)[None, :]
    else:
        a_ok = a_ok[:, None]
    return tl.load(a_ptr, mask=a_ok, other=0)


@triton.jit
def _load_weights(w_ptr, w_ok, k, LEN: tl.constexpr, BK: tl.constexpr, MASK_N: tl.constexpr):
    """A [BK, BN] block of weights."""
    if LEN % BK:
        w = tl.load(w_ptr, mask=(tl.arange(0, BK) < LEN - k)[:, None] & w_ok[None, :], other=0)
    elif MASK_N:
        w = tl.load(w_ptr, mask=w_ok[None, :], other=0)
    else:
        w = tl.load(w_ptr)
    return w


@triton.jit(do_not_specialize=["num_slots"])
def scan_up_kernel(
    x, ids, weights, num_rows, w13, bias13, act, arrivals, num_slots, stride_x: tl.constexpr,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
    WE: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, UP_FIRST: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    BY_SLOT: tl.constexpr, ARRIVALS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """act[s, n] = activation(x[t] @ w13[e].T) for program 0's block of BN columns and program 1's expert or slot."""
    block = tl.program_id(0)
    if PDL:
        gdc_wait()
        if not BY_SLOT:
            gdc_launch_dependents()
    expert64, hit, rank, count = _rows_of_program(ids, num_rows, num_slots, K, SLOTS, BY_SLOT)
    if BY_SLOT:
        # The down kernel counts arrivals per token and block; nobody else can have cleared the counters.
        if block == 0 and tl.program_id(1) % K == 0:
            for i in range(0, ARRIVALS, 64):
                at = i + tl.arange(0, 64)
                first_counter = tl.program_id(1) // K * ARRIVALS
                tl.store(arrivals + first_counter + at, tl.zeros((64,), tl.int32), mask=at < ARRIVALS)
    # Halves: gate and up are two accumulators. Interleaved: one of twice the width, split at the end.
    PAIR: tl.constexpr = GATED and not INTERLEAVED
    WIDTH: tl.constexpr = 2 * BN if INTERLEAVED else BN
    ROWS: tl.constexpr = 2 * I if INTERLEAVED else I
    row = block * WIDTH + tl.arange(0, WIDTH)
    row_ok = row < ROWS
    MASK_N: tl.constexpr = ROWS % WIDTH != 0
    n = block * BN + tl.arange(0, BN)
    kk = tl.arange(0, BK)
    w_base = w13 + expert64 * WE + row.to(tl.int64)[None, :] * WN + kk[:, None] * WK
    for first in range(0, count, BM):
        slot = _slots_of_rows(hit, rank, first, BM, SLOTS)
        a_ok = first + tl.arange(0, BM) < count
        a_ptr = x + (slot // K).to(tl.int64)[:, None] * stride_x + kk[None, :]
        w_ptr = w_base
        acc = tl.zeros((BM, WIDTH), tl.float32)
        acc_2 = tl.zeros((BM, WIDTH), tl.float32)
        for k in tl.range(0, H, BK, num_stages=STAGES):
            a = _load_rows(a_ptr, a_ok, k, H, BK)
            acc = tl.dot(a, _load_weights(w_ptr, row_ok, k, H, BK, MASK_N), acc, input_precision=PRECISION)
            if PAIR:
                w_2 = _load_weights(w_ptr + I * WN, row_ok, k, H, BK, MASK_N)
                acc_2 = tl.dot(a, w_2, acc_2, input_precision=PRECISION)
            a_ptr += BK
            w_ptr += BK * WK
        if WEIGHT_ON_INPUT:
            scale = tl.load(weights + slot, mask=a_ok, other=0)[:, None]
            acc = acc * scale
            acc_2 = acc_2 * scale
        if bias13 is not None:
            b_ptr = bias13 + expert64 * (2 * I if GATED else I) + row
            acc += tl.load(b_ptr, mask=row_ok, other=0).to(tl.float32)[None, :]
            if PAIR:
                acc_2 += tl.load(b_ptr + I, mask=row_ok, other=0).to(tl.float32)[None, :]
        if INTERLEAVED:
            gate, up = gate_and_up(acc, BN, True, UP_FIRST)
        elif UP_FIRST:
            gate, up = acc_2, acc
        else:
            gate, up = acc, acc_2
        h = activate(gate, up, ACT, GATED, ALPHA, LIMIT)
        o_ptr = act + slot.to(tl.int64)[:, None] * I + n[None, :]
        tl.store(o_ptr, h.to(act.dtype.element_ty), mask=a_ok[:, None] & (n < I)[None, :])
    if PDL and BY_SLOT:
        # Not earlier: waiting programs would hold the shared memory that this kernel's own still need.
        gdc_launch_dependents()


@triton.jit(do_not_specialize=["num_slots"])
def scan_down_kernel(
    act, ids, weights, num_rows, w2, bias2, y, out, arrivals, num_slots, stride_out: tl.constexpr,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
    WE: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    BY_SLOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[s, n] = act[s] @ w2[e].T + bias2[e], unweighted, for program 0's BN columns and program 1's expert or slot."""
    block = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
    expert64, hit, rank, count = _rows_of_program(ids, num_rows, num_slots, K, SLOTS, BY_SLOT)
    if PDL:
        # Also by programs without rows: the next kernel's wait must cover the one that wrote `act`.
        gdc_wait()
    n = block * BN + tl.arange(0, BN)
    n_ok = n < H
    kk = tl.arange(0, BK)
    w_base = w2 + expert64 * WE + n.to(tl.int64)[None, :] * WN + kk[:, None] * WK
    for first in range(0, count, BM):
        slot = _slots_of_rows(hit, rank, first, BM, SLOTS)
        a_ok = first + tl.arange(0, BM) < count
        a_ptr = act + slot.to(tl.int64)[:, None] * I + kk[None, :]
        w_ptr = w_base
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, I, BK, num_stages=STAGES):
            a = _load_rows(a_ptr, a_ok, k, I, BK)
            acc = tl.dot(a, _load_weights(w_ptr, n_ok, k, I, BK, H % BN != 0), acc, input_precision=PRECISION)
            a_ptr += BK
            w_ptr += BK * WK
        if bias2 is not None:
            acc += tl.load(bias2 + expert64 * H + n, mask=n_ok, other=0).to(tl.float32)[None, :]
        o_ptr = y + slot.to(tl.int64)[:, None] * H + n[None, :]
        tl.store(o_ptr, acc.to(y.dtype.element_ty), mask=a_ok[:, None] & n_ok[None, :])
    if BY_SLOT:
        _sum_if_last(
            y, ids, weights, out, arrivals, stride_out, block, n, H, K, WEIGHT_ON_INPUT, (H + BN - 1) // BN, num_rows
        )
