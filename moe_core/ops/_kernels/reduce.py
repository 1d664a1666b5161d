"""The weighted sum over a token's K expert rows: each row is read once, in a fixed order.

T tokens · H hidden · K top-k; slot s = t * K + k.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def reduce_kernel(
    y, ids, weights, row_of_slot, num_rows, out, stride_out: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, BH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of weights[t, k] * y[row of slot t * K + k]; slots with id -1 are not read.

    Rows from `num_rows` on are zeros. Without `row_of_slot` the row is the slot.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # Tokens are grid dimension 0: dimension 1 ends at 65,535.
    token = tl.program_id(0)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    valid = True
    if num_rows is not None:
        valid = token < tl.load(num_rows)
    acc = tl.zeros((BH,), tl.float32)
    first = token.to(tl.int64) * K
    for k in tl.static_range(K):
        used = (tl.load(ids + first + k) >= 0) & valid
        weight = 1.0
        if not WEIGHT_ON_INPUT:
            weight = tl.load(weights + first + k)
        row = first + k
        if row_of_slot is not None:
            row = tl.load(row_of_slot + row, mask=used, other=0).to(tl.int64)
        v = tl.load(y + row * H + h, mask=(h < H) & used, other=0).to(tl.float32)
        # Not a product with weight 0: an unused slot's weight may be NaN.
        acc += tl.where(used, weight * v, 0.0)
    tl.store(out + token.to(tl.int64) * stride_out + h, acc.to(out.dtype.element_ty), mask=h < H)


@triton.jit
def reduce_few_kernel(
    y, ids, weights, row_of_slot, num_rows, out, stride_out: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, BH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same where most rows may not be there: zeros are written before the wait.

    The first kernel of the step has waited for whatever wrote `num_rows` or read `out`.
    """
    token = tl.program_id(0)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    if PDL:
        gdc_launch_dependents()
    first = token.to(tl.int64) * K
    target = out + token.to(tl.int64) * stride_out + h
    valid = token < tl.load(num_rows)
    if not valid:
        tl.store(target, tl.zeros((BH,), out.dtype.element_ty), mask=h < H)
    if PDL:
        gdc_wait()
    if valid:
        acc = tl.zeros((BH,), tl.float32)
        for k in tl.static_range(K):
            used = tl.load(ids + first + k) >= 0
            weight = tl.load(weights + first + k)
            row = tl.load(row_of_slot + first + k, mask=used, other=0).to(tl.int64)
            v = tl.load(y + row * H + h, mask=(h < H) & used, other=0).to(tl.float32)
            acc += tl.where(used, weight * v, 0.0)
        tl.store(target, acc.to(out.dtype.element_ty), mask=h < H)
