"""Decode with e4m3 weights and some tokens: a program finds its expert's rows among all ids, or has a slot (BY_SLOT),
as in `scan.py`.

x and act are quantized before (QUANT, WEIGHT and XG as in `fp8_slots.py`), but for a static scale of act, which the up
kernel applies itself. A scale of groups is applied to the product of 128 columns, all others to the finished sum.
T tokens · H hidden · I intermediate · E_l local experts · K top-k; slot s = t * K + k.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_core.ops._kernels.activation import activate
from moe_core.ops._kernels.fp8_quantize import to_e4m3
from moe_core.ops._kernels.scan import _rows_of_program, _slots_of_rows, _sum_if_last


@triton.jit
def _block(w_ptr, n_ok, k, LEN: tl.constexpr, BK: tl.constexpr):
    """A [BK, BN] block of weights from column k on."""
    ok = n_ok[None, :]
    if LEN % BK:
        ok = ok & (tl.arange(0, BK) < LEN - k)[:, None]
    return tl.load(w_ptr + k, mask=ok, other=0.0)


@triton.jit
def _product(
    a_ptr, a_scale, a_ok, w_ptr, w_ptr_2, n_ok, s_ptr, s_ptr_2,
    LEN: tl.constexpr, PAIR: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows at `a_ptr [BM]` times columns at `w_ptr [BK, BN]` of one or two matrices: float32 sums.

    BLOCKS: the weights' scales, and GROUPS: the rows' scales, are those of 128 columns, and are applied here.
    """
    kk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    acc_2 = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, LEN, BK, num_stages=STAGES):
        a_mask = a_ok[:, None]
        if LEN % BK:
            a_mask = a_mask & (kk < LEN - k)[None, :]
        a = tl.load(a_ptr[:, None] + (k + kk)[None, :], mask=a_mask, other=0.0)
        w = _block(w_ptr, n_ok, k, LEN, BK)
        if PAIR:
            w_2 = _block(w_ptr_2, n_ok, k, LEN, BK)
        if BLOCKS:
            s = tl.full((BM,), 1.0, tl.float32)
            if GROUPS:
                s = tl.load(a_scale + k // 128, mask=a_ok, other=0.0)
            acc += tl.dot(a, w.to(a.dtype)) * (s * tl.load(s_ptr + k // 128))[:, None]
            if PAIR:
                acc_2 += tl.dot(a, w_2.to(a.dtype)) * (s * tl.load(s_ptr_2 + k // 128))[:, None]
        else:
            # Not accumulated by the matrix unit: for e4m3 it keeps fewer bits than float32 between products.
            acc += tl.dot(a, w.to(a.dtype))
            if PAIR:
                acc_2 += tl.dot(a, w_2.to(a.dtype))
    return acc, acc_2


@triton.jit
def _scaled(acc, a_scale, s_ptr, n, n_ok, SN: tl.constexpr, WEIGHT: tl.constexpr):
    """A finished sum under the scales of its rows and of its columns (WEIGHT "tensor" or "channel")."""
    own = n * SN if WEIGHT == "channel" else n * 0
    return acc * a_scale[:, None] * tl.load(s_ptr + own, mask=n_ok, other=0.0)[None, :]


@triton.jit(do_not_specialize=["num_slots"])
def fp8_scan_up_kernel(
    x, x_up, x_scale, ids, num_rows, w_gate, w_up, s_gate, s_up, in_gate, in_up, in2, b_gate, b_up, act, arrivals,
    num_slots, stride_x: tl.constexpr, stride_xs: tl.constexpr,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, WE: tl.constexpr, WN: tl.constexpr,
    SE: tl.constexpr, SN: tl.constexpr, BIE: tl.constexpr, BIN: tl.constexpr, IE: tl.constexpr, IE2: tl.constexpr,
    WEIGHT: tl.constexpr, QUANT: tl.constexpr, DTYPE: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, BY_SLOT: tl.constexpr,
    ARRIVALS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """act[s, n] = activation(x[t] @ w13[e].T) for program 0's block of BN columns and program 1's expert or slot.

    QUANT "static": x has a row for every slot, and act is quantized here. Else x has a row for every token.
    """
    block = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    e, hit, rank, count = _rows_of_program(ids, num_rows, num_slots, K, SLOTS, BY_SLOT)
    if BY_SLOT:
        # The down kernel counts arrivals per token and block; nobody else can have cleared the counters.
        if block == 0 and tl.program_id(1) % K == 0:
            for i in range(0, ARRIVALS, 64):
                at = i + tl.arange(0, 64)
                first_counter = tl.program_id(1) // K * ARRIVALS
                tl.store(arrivals + first_counter + at, tl.zeros((64,), tl.int32), mask=at < ARRIVALS)
    n = block * BN + tl.arange(0, BN)
    n_ok = n < I
    w_off = e * WE + n.to(tl.int64)[None, :] * WN + tl.arange(0, BK)[:, None]
    s_gate += e * SE
    s_up += e * SE
    if WEIGHT == "block":
        s_gate += block * BN // 128 * SN
        s_up += block * BN // 128 * SN
    for first in range(0, count, BM):
        slot = _slots_of_rows(hit, rank, first, BM, SLOTS)
        a_ok = first + tl.arange(0, BM) < count
        row = slot.to(tl.int64) if QUANT == "static" else (slot // K).to(tl.int64)
        xs = x_scale
        if QUANT == "group" or QUANT == "row":
            xs = x_scale + row * stride_xs
        gate, up = _product(
            x + row * stride_x, xs, a_ok, w_gate + w_off, w_up + w_off, n_ok, s_gate, s_up,
            H, GATED, WEIGHT == "block", QUANT == "group", BM, BN, BK, STAGES,
        )  # fmt: skip
        if QUANT == "static" and GATED:
            if tl.load(in_gate + e * IE) != tl.load(in_up + e * IE):
                up, _ = _product(
                    x_up + row * stride_x, xs, a_ok, w_up + w_off, w_up + w_off, n_ok, s_up, s_up,
                    H, False, False, False, BM, BN, BK, STAGES,
                )  # fmt: skip
        if WEIGHT != "block":
            xs_gate = tl.full((BM,), 1.0, tl.float32)
            xs_up = xs_gate
            if QUANT == "row":
                xs_gate = tl.load(xs, mask=a_ok, other=0.0)
                xs_up = xs_gate
            elif QUANT == "static":
                xs_gate = xs_gate * tl.load(in_gate + e * IE)
                if GATED:
                    xs_up = xs_up * tl.load(in_up + e * IE)
            gate = _scaled(gate, xs_gate, s_gate, n, n_ok, SN, WEIGHT)
            if GATED:
                up = _scaled(up, xs_up, s_up, n, n_ok, SN, WEIGHT)
        if b_gate is not None:
            gate += tl.load(b_gate + e * BIE + n * BIN, mask=n_ok, other=0.0).to(tl.float32)[None, :]
            if GATED:
                up += tl.load(b_up + e * BIE + n * BIN, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        h = activate(gate, up, ACT, GATED, ALPHA, LIMIT).to(DTYPE)
        if QUANT == "static":
            s2 = tl.load(in2 + e * IE2)
            h = to_e4m3(h.to(tl.float32), s2, tl.div_rn(1.0, s2), True)
        tl.store(act + slot.to(tl.int64)[:, None] * I + n[None, :], h, mask=a_ok[:, None] & n_ok[None, :])


@triton.jit(do_not_specialize=["num_slots"])
def fp8_scan_down_kernel(
    act, act_scale, ids, weights, num_rows, w2, s2, in2, bias2, y, out, arrivals, num_slots, stride_out: tl.constexpr,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, WE: tl.constexpr, WN: tl.constexpr,
    SE: tl.constexpr, SN: tl.constexpr, IE2: tl.constexpr, GROUPS: tl.constexpr,
    WEIGHT: tl.constexpr, QUANT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, BY_SLOT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y[s, n] = act[s] @ w2[e].T + bias2[e], unweighted, for program 0's BN columns and program 1's expert or slot.

    BY_SLOT: the last of a token's K programs to arrive also sums its rows into `out`.
    """
    block = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
    e, hit, rank, count = _rows_of_program(ids, num_rows, num_slots, K, SLOTS, BY_SLOT)
    if PDL:
        # Also by programs without rows: the next kernel's wait must cover the one that wrote `act`.
        gdc_wait()
    n = block * BN + tl.arange(0, BN)
    n_ok = n < H
    w_ptr = w2 + e * WE + n.to(tl.int64)[None, :] * WN + tl.arange(0, BK)[:, None]
    s2 += e * SE
    if WEIGHT == "block":
        s2 += block * BN // 128 * SN
    for first in range(0, count, BM):
        slot = _slots_of_rows(hit, rank, first, BM, SLOTS).to(tl.int64)
        a_ok = first + tl.arange(0, BM) < count
        scales = act_scale
        if QUANT == "group" or QUANT == "row":
            scales = act_scale + slot * GROUPS
        acc, _ = _product(
            act + slot * I, scales, a_ok, w_ptr, w_ptr, n_ok, s2, s2,
            I, False, WEIGHT == "block", QUANT == "group", BM, BN, BK, STAGES,
        )  # fmt: skip
        if WEIGHT != "block":
            a_scale = tl.full((BM,), 1.0, tl.float32)
            if QUANT == "row":
                a_scale = tl.load(scales, mask=a_ok, other=0.0)
            elif QUANT == "static":
                a_scale = a_scale * tl.load(in2 + e * IE2)
            acc = _scaled(acc, a_scale, s2, n, n_ok, SN, WEIGHT)
        if bias2 is not None:
            acc += tl.load(bias2 + e * H + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        tl.store(y + slot[:, None] * H + n[None, :], acc.to(y.dtype.element_ty), mask=a_ok[:, None] & n_ok[None, :])
    if BY_SLOT:
        _sum_if_last(y, ids, weights, out, arrivals, stride_out, block, n, H, K, False, (H + BN - 1) // BN, num_rows)
