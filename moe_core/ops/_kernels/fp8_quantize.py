"""Activations as e4m3: the arithmetic of `moe_core.formats`, as device functions and as kernels.

A scale is amax / 448 (amax at least 1e-10) of its group, rounded up to a power of two where the format says so; values
are divided by it, and a group that holds Inf or NaN gets the scale NaN. Rows are tokens, slots or the rows of the
batched format; LEN is their length, GS the length of a group.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def magnitude(x):
    """|x|, with Inf for NaN: a maximum would lose a NaN."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def scale_of(amax, POWER_OF_TWO: tl.constexpr):
    """The scale of a group from its largest magnitude, float32."""
    scale = tl.div_rn(tl.maximum(amax, 1e-10), 448.0)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(amax < float("inf"), scale, float("nan"))


@triton.jit
def to_e4m3(x, scale, inverse, STATIC: tl.constexpr):
    """x / scale in e4m3; `inverse` is 1 / scale, rounded.

    The quotient is rounded correctly, as by a division, because the residual of x * inverse is exact; many values
    share a divisor, and this way each costs three instructions. STATIC: the scale is not made from x, so x may be too
    large for it (finite values saturate) and Inf must become NaN by itself.
    """
    rough = x * inverse
    if STATIC:
        rough = tl.where(rough > 512.0, 512.0, tl.where(rough < -512.0, -512.0, rough))
    quotient = tl.fma(tl.fma(-rough, scale, x), inverse, rough)
    if STATIC:
        quotient = tl.where(quotient > 448.0, 448.0, tl.where(quotient < -448.0, -448.0, quotient))
        quotient = tl.where(tl.abs(x) < float("inf"), quotient, float("nan"))
    return quotient.to(tl.float8e4nv)


@triton.jit
def row_scale(x, row_ok, LEN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Scales [ROWS] of whole rows that start at the pointers `x [ROWS]`."""
    amax = tl.zeros((ROWS, BLOCK), tl.float32)
    for k in tl.range(0, LEN, BLOCK):
        col = k + tl.arange(0, BLOCK)
        v = tl.load(x[:, None] + col[None, :], mask=row_ok[:, None] & (col < LEN)[None, :], other=0.0)
        amax = tl.maximum(amax, magnitude(v.to(tl.float32)))
    return scale_of(tl.max(amax, 1), POWER_OF_TWO)


@triton.jit
def _row_is_used(row, row_end, capacity):
    """Of the batched format: row e * C + i holds data while it is below expert e's end."""
    return row < tl.load(row_end + row // capacity)


@triton.jit(do_not_specialize=["capacity"])
def quantize_kernel(
    x, q, scale, row_end, capacity, stride_x: tl.constexpr,
    LEN: tl.constexpr, GS: tl.constexpr, GROUPS: tl.constexpr, BG: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, PDL: tl.constexpr, WAIT_LAST: tl.constexpr,
):  # fmt: skip
    """q [rows, LEN] and scale [rows, GROUPS] of x, BG groups of a row in a program; with `row_end` used rows only.

    WAIT_LAST: the kernel before reads and writes nothing of this one's and has itself waited for those before, so the
    two run side by side; what comes next is then behind both.
    """
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        if not WAIT_LAST:
            gdc_wait()
        gdc_launch_dependents()
    used = True
    if row_end is not None:
        used = _row_is_used(row, row_end, capacity)
    if used:
        group = tl.program_id(1) * BG + tl.arange(0, BG)
        col = group[:, None] * GS + tl.arange(0, GS)[None, :]
        v = tl.load(x + row * stride_x + col, mask=col < LEN, other=0.0).to(tl.float32)
        s = scale_of(tl.max(magnitude(v), 1), POWER_OF_TWO)
        tl.store(q + row * LEN + col, to_e4m3(v, s[:, None], tl.div_rn(1.0, s)[:, None], False), mask=col < LEN)
        tl.store(scale + row * GROUPS + group, s, mask=group < GROUPS)
    if PDL and WAIT_LAST:
        gdc_wait()


@triton.jit(do_not_specialize=["capacity"])
def quantize_by_expert_kernel(
    x, ids, slot_of_row, row_end, q, q_up, scale, scale_up, num_rows, capacity, stride_x: tl.constexpr,
    LEN: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, GATHER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Row r of q: the input of one expert, under that expert's scale. Gate and up may have different ones: q_up.

    Rows are slots, slots in the order of `slot_of_row`, or (without ids) those of the batched format. GATHER: x has a
    row for every token; else its rows are q's.
    """
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if ids is None:
        expert = (row // capacity).to(tl.int32)
        used = _row_is_used(row, row_end, capacity)
        slot = row
    else:
        slot = row
        used = True
        if slot_of_row is not None:
            used = row < tl.load(row_end + (E - 1))
            slot = tl.load(slot_of_row + row, mask=used, other=0).to(tl.int64)
        elif num_rows is not None:
            used = row < tl.load(num_rows) * K
        expert = tl.load(ids + slot, mask=used, other=-1).to(tl.int32)
        used = expert >= 0
    source = slot // K if GATHER else row
    if used:
        col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(x + source * stride_x + col, mask=col < LEN, other=0.0).to(tl.float32)
        s = tl.load(scale + expert * SCALE_STRIDE)
        tl.store(q + row * LEN + col, to_e4m3(v, s, tl.div_rn(1.0, s), True), mask=col < LEN)
        if q_up is not None:
            s_up = tl.load(scale_up + expert * SCALE_STRIDE)
            if s_up != s:
                tl.store(q_up + row * LEN + col, to_e4m3(v, s_up, tl.div_rn(1.0, s_up), True), mask=col < LEN)


@triton.jit(do_not_specialize=["capacity"])
def expert_amax_kernel(
    x, slot_of_row, row_end, partial, capacity, stride_x: tl.constexpr,
    LEN: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr, PADDED: tl.constexpr,
    PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial [E, PARTS]: the largest magnitude among every PARTSth row of one expert's.

    PADDED: rows are numbered as in the batched format.
    """
    expert = tl.program_id(0)
    part = tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    end = tl.load(row_end + expert)
    if PADDED:
        start = expert * capacity
    else:
        start = tl.load(row_end + expert - 1, mask=expert > 0, other=0)
    amax = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(start + part, end, PARTS):
        source = row + tl.zeros((1,), tl.int64)
        if GATHER:
            source = tl.load(slot_of_row + source).to(tl.int64) // K
        for k in tl.static_range(0, LEN, BLOCK):
            col = k + tl.arange(0, BLOCK)
            v = tl.load(x + source * stride_x + col, mask=col < LEN, other=0.0)
            amax = tl.maximum(amax, magnitude(v.to(tl.float32)))
    tl.store(partial + expert * PARTS + part, tl.max(amax, 0))


@triton.jit
def expert_scale_kernel(partial, scale, PARTS: tl.constexpr, PDL: tl.constexpr):
    """scale [E] from `expert_amax_kernel`."""
    expert = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    amax = tl.max(tl.load(partial + expert * PARTS + tl.arange(0, PARTS)), 0)
    tl.store(scale + expert, scale_of(amax, False))
