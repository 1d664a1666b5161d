"""Decode with few tokens and e4m3 weights: every (token, choice) slot reads its own expert, no sort, two kernels.

Activations are quantized in registers, by the numbers of the format, on their way into float32 products.
T tokens · H hidden · I intermediate · E_l local experts · K top-k; slot s = t * K + k.

QUANT: what happens to a GEMM's input. None: nothing. "group": groups of 128, "row": whole rows, scales from the data.
"static": the expert's scale. "given": it is e4m3 already, and comes with scales of groups (XG = 128) or rows (XG = 0).
WEIGHT: what shares a scale. "block": 128 x 128, "tensor": everything, "channel": a row.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_core.ops._kernels.activation import activate
from moe_core.ops._kernels.fp8_quantize import magnitude, row_scale, scale_of, to_e4m3


@triton.jit
def _requantized(v, scale, QUANT: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Values `v [ROWS, BK]` (float32) as the format sees them; `scale [ROWS]` where the whole row has one."""
    ROWS: tl.constexpr = v.shape[0]
    BK: tl.constexpr = v.shape[1]
    if QUANT == "group":
        groups = tl.reshape(v, (ROWS, BK // 128, 128))
        s = scale_of(tl.max(magnitude(groups), 2), POWER_OF_TWO)[:, :, None]
        q = to_e4m3(groups, s, tl.div_rn(1.0, s), False)
        v = tl.reshape(q.to(tl.float32) * s, (ROWS, BK))
    elif QUANT is not None:
        q = to_e4m3(v, scale[:, None], tl.div_rn(1.0, scale)[:, None], QUANT == "static")
        v = q.to(tl.float32) * scale[:, None]
    return v


@triton.jit
def _by_blocks(v, s_ptr, k, LEN: tl.constexpr):
    """`v [ROWS, BK]` times the weight scales of its groups of 128; `s_ptr [ROWS]`: their first."""
    ROWS: tl.constexpr = v.shape[0]
    BG: tl.constexpr = v.shape[1] // 128
    GROUPS: tl.constexpr = (LEN + 127) // 128
    g = k // 128 + tl.arange(0, BG)
    s = tl.load(s_ptr[:, None] + g[None, :], mask=(g < GROUPS)[None, :], other=0.0)
    return tl.reshape(tl.reshape(v, (ROWS, BG, 128)) * s[:, :, None], (ROWS, BG * 128))


@triton.jit
def _weights(w_ptr, k, LEN: tl.constexpr, BK: tl.constexpr, ok):
    """A block of w from column k on: the last dim of `w_ptr`."""
    col = tl.arange(0, BK)
    if len(w_ptr.shape) == 2:
        col_ok = (col < LEN - k)[None, :]
    else:
        col_ok = (col < LEN - k)[None, None, :]
    if LEN % BK:
        ok = ok & col_ok
    return tl.load(w_ptr + k, mask=ok, other=0.0, eviction_policy="evict_first")


@triton.jit
def _input(x, x_scale, k, H: tl.constexpr, BK: tl.constexpr, QUANT: tl.constexpr, XG: tl.constexpr):
    """`x[k : k + BK]` of one row, as float32 [1, BK]."""
    col = k + tl.arange(0, BK)
    v = tl.load(x + col, mask=col < H, other=0.0).to(tl.float32)
    if QUANT == "given":
        if XG:
            GROUPS: tl.constexpr = (H + 127) // 128
            g = k // 128 + tl.arange(0, BK // 128)
            s = tl.load(x_scale + g, mask=g < GROUPS, other=0.0)
            v = tl.reshape(tl.reshape(v, (BK // 128, 128)) * s[:, None], (BK,))
        else:
            v = v * tl.load(x_scale)
    return v[None, :]


@triton.jit
def fp8_slots_up_kernel(
    x, x_scale, ids, num_rows, w_gate, w_up, s_gate, s_up, in_gate, in_up, b_gate, b_up, act,
    stride_x: tl.constexpr, stride_xs: tl.constexpr,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, WE: tl.constexpr, WN: tl.constexpr,
    SE: tl.constexpr, SN: tl.constexpr, BIE: tl.constexpr, BIN: tl.constexpr, IE: tl.constexpr,
    WEIGHT: tl.constexpr, QUANT: tl.constexpr, XG: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """act[s, n] = activation(x[t] @ w13[e].T) for the BN columns of program 0's block and slot program 1."""
    block = tl.program_id(0)
    slot = tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = (slot // K).to(tl.int64)
    e = tl.load(ids + slot).to(tl.int64)
    if num_rows is not None:
        e = tl.where(token < tl.load(num_rows), e, -1)
    if e >= 0:
        n = block * BN + tl.arange(0, BN)
        n_ok = n < I
        w_off = e * WE + n.to(tl.int64)[:, None] * WN + tl.arange(0, BK)[None, :]
        x_row = x + token * stride_x
        xs_row = x_scale
        if QUANT == "given":
            xs_row = x_scale + token * stride_xs
        next_gate = _weights(w_gate + w_off, 0, H, BK, n_ok[:, None])
        next_up = next_gate
        if GATED:
            next_up = _weights(w_up + w_off, 0, H, BK, n_ok[:, None])
        row = tl.zeros((1,), tl.int32)
        scale = tl.zeros((1,), tl.float32)
        scale_up = scale
        if QUANT == "row":
            scale = row_scale(x_row + row, row == 0, H, BK, 1, POWER_OF_TWO)
        elif QUANT == "static":
            scale = tl.load(in_gate + e * IE + row)
            if GATED:
                scale_up = tl.load(in_up + e * IE + row)
        block_row = (block * BN) // 128 * SN
        acc = tl.zeros((BN, BK), tl.float32)
        acc_up = tl.zeros((BN, BK), tl.float32)
        REQUANT: tl.constexpr = None if QUANT == "given" else QUANT
        for k in tl.static_range(0, H, BK):
            gate_w, up_w = next_gate, next_up
            if k + BK < H:
                next_gate = _weights(w_gate + w_off, k + BK, H, BK, n_ok[:, None])
                if GATED:
                    next_up = _weights(w_up + w_off, k + BK, H, BK, n_ok[:, None])
            plain = _input(x_row, xs_row, k, H, BK, QUANT, XG)
            v = _requantized(plain, scale, REQUANT, POWER_OF_TWO)
            v_up = v
            if QUANT == "static" and GATED:
                if tl.sum(scale) != tl.sum(scale_up):
                    v_up = _requantized(plain, scale_up, REQUANT, POWER_OF_TWO)
            if WEIGHT == "block":
                v = _by_blocks(v, s_gate + e * SE + block_row + row, k, H)
                if GATED:
                    v_up = _by_blocks(v_up, s_up + e * SE + block_row + row, k, H)
            acc += gate_w.to(tl.float32) * v
            if GATED:
                acc_up += up_w.to(tl.float32) * v_up
        gate = tl.sum(acc, 1)
        up = tl.sum(acc_up, 1)
        if WEIGHT != "block":
            own = n * SN if WEIGHT == "channel" else n * 0
            gate = gate * tl.load(s_gate + e * SE + own, mask=n_ok, other=0.0)
            if GATED:
                up = up * tl.load(s_up + e * SE + own, mask=n_ok, other=0.0)
        if b_gate is not None:
            gate += tl.load(b_gate + e * BIE + n * BIN, mask=n_ok, other=0.0).to(tl.float32)
            if GATED:
                up += tl.load(b_up + e * BIE + n * BIN, mask=n_ok, other=0.0).to(tl.float32)
        h = activate(gate, up, ACT, GATED, ALPHA, LIMIT)
        tl.store(act + slot.to(tl.int64) * I + n, h.to(act.dtype.element_ty), mask=n_ok)


@triton.jit
def fp8_slots_down_kernel(
    act, ids, weights, num_rows, w2, s2, in2, bias2, out, stride_out: tl.constexpr,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, WE: tl.constexpr, WN: tl.constexpr,
    SE: tl.constexpr, SN: tl.constexpr, IE: tl.constexpr,
    WEIGHT: tl.constexpr, QUANT: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t, n] = sum over k of weight * (act[s] @ w2[e].T + bias2[e]); all K experts of a token in one program."""
    token = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_ok = n < H
    k = tl.arange(0, KP)
    slot = token * K + k
    e = tl.load(ids + slot, mask=k < K, other=-1).to(tl.int64)
    if num_rows is not None:
        e = tl.where(token < tl.load(num_rows), e, -1)
    used = e >= 0
    e = tl.where(used, e, 0)
    weight = tl.where(used, tl.load(weights + slot, mask=k < K, other=0.0), 0.0)
    w_ptr = w2 + e[:, None, None] * WE + n.to(tl.int64)[None, :, None] * WN + tl.arange(0, BK)[None, None, :]
    w_ok = used[:, None, None] & n_ok[None, :, None]
    s_ptr = s2 + e * SE
    if WEIGHT == "block":
        s_ptr += tl.program_id(0) * BN // 128 * SN
    if UNROLL:
        next_w = _weights(w_ptr, 0, I, BK, w_ok)
    scale = tl.zeros((KP,), tl.float32)
    if QUANT == "static":
        scale = tl.load(in2 + e * IE)
    if PDL:
        gdc_wait()
    a_row = act + slot.to(tl.int64) * I
    if QUANT == "row":
        scale = row_scale(a_row, used, I, BK, KP, POWER_OF_TWO)
    acc = tl.zeros((KP, BN, BK), tl.float32)
    if UNROLL:
        for i in tl.static_range(0, I, BK):
            w = next_w
            if i + BK < I:
                next_w = _weights(w_ptr, i + BK, I, BK, w_ok)
            a = _act(a_row, used, s_ptr, scale, i, I, BK, WEIGHT, QUANT, POWER_OF_TWO)
            acc += w.to(tl.float32) * a[:, None, :]
    else:
        for i in tl.range(0, I, BK, loop_unroll_factor=4):
            w = _weights(w_ptr, i, I, BK, w_ok)
            a = _act(a_row, used, s_ptr, scale, i, I, BK, WEIGHT, QUANT, POWER_OF_TWO)
            acc += w.to(tl.float32) * a[:, None, :]
    y = tl.sum(acc, 2)
    if WEIGHT == "tensor":
        y = y * tl.load(s_ptr)[:, None]
    elif WEIGHT == "channel":
        y = y * tl.load(s_ptr[:, None] + n[None, :] * SN, mask=used[:, None] & n_ok[None, :], other=0.0)
    if bias2 is not None:
        y += tl.load(bias2 + e[:, None] * H + n[None, :], mask=used[:, None] & n_ok[None, :], other=0.0).to(tl.float32)
    # An unused slot's products may be NaN (its scale is not its own), and its weight may be too.
    y = tl.sum(tl.where(used[:, None], y * weight[:, None], 0.0), 0)
    tl.store(out + token.to(tl.int64) * stride_out + n, y.to(out.dtype.element_ty), mask=n_ok)


@triton.jit
def _act(
    a_row, used, s_ptr, scale, i, I: tl.constexpr, BK: tl.constexpr,
    WEIGHT: tl.constexpr, QUANT: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """Columns i to i + BK of the rows between the GEMMs, quantized, under the weights' block scales: [KP, BK]."""
    col = i + tl.arange(0, BK)
    a = tl.load(a_row[:, None] + col[None, :], mask=used[:, None] & (col < I)[None, :], other=0.0).to(tl.float32)
    a = _requantized(a, scale, QUANT, POWER_OF_TWO)
    if WEIGHT == "block":
        a = _by_blocks(a, s_ptr, i, I)
    return a
