"""Rows of activations for `fp8_stream.py`: quantized on their way to the matrix unit (Gluon, Hopper).

The arithmetic is that of `fp8_quantize.py`; names and numbers are as in `fp8_stream.py`, which shares its work out by
what stands here first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language import PropagateNan

from moe_core.ops._kernels.dependent import wait_for_kernel_before

BK = gl.constexpr(128)
STEP = gl.constexpr(2 * BK)  # columns of two buffers: their products are under way together
BM = gl.constexpr(64)  # rows of weights in one product
TOKENS = gl.constexpr(8)  # rows of activations
QUANTIZERS = gl.constexpr(3)  # warps; with two of them a step takes 1 to 7 % longer
KEEP_NAN = gl.constexpr(PropagateNan.ALL)


@gluon.jit
def expert_of(experts, unit):
    """A unit's expert, from shared memory."""
    return gl.max(experts.index(unit).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def share(units, STEPS: gl.constexpr, BLOCKS: gl.constexpr, UP: gl.constexpr):
    """This program's steps, from and to, of all items' in turn; an item, unit and block of columns, has STEPS.

    Only sums after which nothing but a sum comes may be cut: those of the down kernel.
    """
    GRAIN: gl.constexpr = STEPS if UP else 1
    pieces = units * BLOCKS * (STEPS // GRAIN)
    programs = gl.maximum(gl.minimum(gl.num_programs(0), pieces), 1)
    program = gl.minimum(gl.program_id(0), programs)
    return pieces * program // programs * GRAIN, gl.minimum(pieces * (program + 1) // programs, pieces) * GRAIN


@gluon.jit
def place(item, units, BLOCKS: gl.constexpr, UP: gl.constexpr):
    """(unit, block of columns) of an item."""
    if UP:
        return item // BLOCKS, item % BLOCKS
    else:
        return item % units, item // units


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b, propagate_nan=KEEP_NAN)


@gluon.jit
def largest(x, AXIS: gl.constexpr):
    """The largest magnitude, NaN if there is one."""
    return gl.reduce(gl.abs(x), AXIS, _larger)


@gluon.jit
def _scale_of(amax, POWER_OF_TWO: gl.constexpr):
    """As in `fp8_quantize.py`."""
    scale = gl.div_rn(gl.maximum(amax, 1e-10), gl.full(amax.shape, 448.0, gl.float32, amax.type.layout))
    if POWER_OF_TWO:
        bits = (scale.to(gl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = bits.to(gl.float32, bitcast=True)
    return gl.where(amax < float("inf"), scale, float("nan"))


@gluon.jit
def _to_e4m3(x, scale, STATIC: gl.constexpr):
    """x / scale `[rows]` in e4m3, rounded correctly, as in `fp8_quantize.py`; what is too large saturates.

    STATIC: the scale is not made from x, so x / scale may overflow on the way, and Inf must become NaN by itself.
    """
    inverse = gl.div_rn(gl.full(scale.shape, 1.0, gl.float32, scale.type.layout), scale)[:, None]
    rough = x * inverse
    if STATIC:
        rough = gl.minimum(gl.maximum(rough, -512.0), 512.0)
    nothing = gl.zeros_like(x)
    quotient = gl.fma(gl.fma(-rough, scale[:, None] + nothing, x), inverse + nothing, rough)
    if STATIC:
        quotient = gl.fma(x, nothing, quotient)
    return quotient.to(gl.float8e4nv)


@gluon.jit
def row_scales_of(
    values, num_tokens, stride: gl.constexpr, COLUMNS: gl.constexpr, BLOCK: gl.constexpr, LAYOUT: gl.constexpr
):
    """Scales `[TOKENS]` of whole rows, of which `values` has all elements, or the largest ones of parts."""
    token = gl.arange(0, TOKENS, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, LAYOUT))
    there = (token < num_tokens)[:, None]
    at = values + token.to(gl.int64)[:, None] * stride + column[None, :]
    amax = gl.zeros((TOKENS,), gl.float32, gl.SliceLayout(1, LAYOUT))
    for first in range(0, COLUMNS, BLOCK):
        value = gl.load(
            at + first, mask=there & (column < COLUMNS - first)[None, :], other=0.0, cache_modifier=".cg"
        )  # fmt: skip
        amax = _larger(amax, largest(value.to(gl.float32), 1))
    return _scale_of(amax, False)


@gluon.jit
def _read(
    rows, a_scale, s_1, s_2, in_1, in_2, experts, units, first, num_tokens,
    LEN: gl.constexpr, N: gl.constexpr, SE: gl.constexpr, SN: gl.constexpr, stride_a: gl.constexpr,
    stride_as: gl.constexpr, stride_in: gl.constexpr, UP: gl.constexpr, QUANT: gl.constexpr, WEIGHT: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """(rows, their scales if given, two scales that the expert has) of the `first`th BK columns of all items'.

    An expert's scales are those of both blocks of weights, or of both halves' input.
    """
    STEPS: gl.constexpr = (LEN + STEP - 1) // STEP
    GROUPS: gl.constexpr = (LEN + BK - 1) // BK
    WIDTH: gl.constexpr = BM if UP else 2 * BM
    BLOCKS: gl.constexpr = (N + WIDTH - 1) // WIDTH
    unit, block = place(first // (2 * STEPS), units, BLOCKS, UP)
    k = first % (2 * STEPS)
    token = gl.arange(0, TOKENS, gl.SliceLayout(1, LAYOUT))
    row = (token if UP else unit * num_tokens + token).to(gl.int64)
    column = k * BK + gl.arange(0, BK, gl.SliceLayout(0, LAYOUT))
    there = token < num_tokens
    # Rows of act past the first-level cache: they come from other multiprocessors.
    value = gl.load(
        rows + row[:, None] * stride_a + column[None, :], mask=there[:, None] & (column < LEN)[None, :], other=0.0,
        cache_modifier="" if UP else ".cg",
    )  # fmt: skip
    # Past the last group the products are 0, whatever the scales.
    group = gl.minimum(k, GROUPS - 1)
    scale = gl.zeros((TOKENS,), gl.float32, gl.SliceLayout(1, LAYOUT))
    if QUANT == "given":
        scale = gl.load(a_scale + row * stride_as + (group if WEIGHT == "block" else 0), mask=there, other=0.0)
    own_1 = 1.0
    own_2 = 1.0
    if WEIGHT == "block":
        own = expert_of(experts, unit).to(gl.int64) * SE + block * WIDTH // BK * SN + group
        own_1 = gl.load(s_1 + own)
        own_2 = gl.load(s_2 + own)
    elif QUANT == "static":
        own = expert_of(experts, unit) * stride_in
        own_1 = gl.load(in_1 + own)
        own_2 = gl.load(in_2 + own)
    return value, scale, own_1, own_2


@gluon.jit
def quantize(
    rows, a_scale, s_1, s_2, in_1, in_2, amax, a_bufs, scale_bufs, row_scales, scaled, full, empty, experts, units,
    num_tokens,
    PART: gl.constexpr, LEN: gl.constexpr, N: gl.constexpr, SE: gl.constexpr, SN: gl.constexpr, stride_a: gl.constexpr,
    stride_as: gl.constexpr, stride_in: gl.constexpr, UP: gl.constexpr, QUANT: gl.constexpr, WEIGHT: gl.constexpr,
    POWER_OF_TWO: gl.constexpr,
):  # fmt: skip
    """One warp of QUANTIZERS, which take buffers in turns: rows in e4m3, as the matrix unit reads them, and scales.

    The next turn's rows are asked for before this one's are looked at.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 32], [8, 4], [1, 1], [1, 0])
    OF_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    BUFFERS: gl.constexpr = scale_bufs.type.shape[0] // 2
    STEPS: gl.constexpr = (LEN + STEP - 1) // STEP
    WIDTH: gl.constexpr = BM if UP else 2 * BM
    BLOCKS: gl.constexpr = (N + WIDTH - 1) // WIDTH
    begin, end = share(units, STEPS, BLOCKS, UP)
    if not UP:
        wait_for_kernel_before()
    # Where there is nothing to do, what is read ahead is still to be somewhere.
    last = gl.maximum(2 * end - 1, 0)
    some = gl.maximum(units, 1)
    row_scale = gl.zeros((TOKENS,), gl.float32, OF_ROW)
    unit_before = units
    ahead = _read(rows, a_scale, s_1, s_2, in_1, in_2, experts, some, gl.minimum(2 * begin + PART, last), num_tokens,
                  LEN, N, SE, SN, stride_a, stride_as, stride_in, UP, QUANT, WEIGHT, LAYOUT)  # fmt: skip
    if QUANT == "row" and UP:
        mbarrier.wait(scaled, 0)
        row_scale = row_scales.load(OF_ROW)
    for done in range(PART, 2 * (end - begin), QUANTIZERS):
        value, scale, own_1, own_2 = ahead
        ahead = _read(rows, a_scale, s_1, s_2, in_1, in_2, experts, some,
                      gl.minimum(2 * begin + done + QUANTIZERS, last), num_tokens,
                      LEN, N, SE, SN, stride_a, stride_as, stride_in, UP, QUANT, WEIGHT, LAYOUT)  # fmt: skip
        if QUANT == "static":
            scale = gl.full((TOKENS,), own_1, gl.float32, OF_ROW)
        elif QUANT == "row":
            if not UP:
                unit, _ = place((2 * begin + done) // (2 * STEPS), units, BLOCKS, UP)
                if unit != unit_before:
                    COLUMNS: gl.constexpr = (LEN + BM - 1) // BM
                    PARTS: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, 1], [1, 0])
                    row_scale = gl.convert_layout(
                        row_scales_of(
                            amax + unit * num_tokens * COLUMNS, num_tokens, COLUMNS, COLUMNS,
                            32 if COLUMNS <= 32 else 64, PARTS,
                        ), OF_ROW, assert_trivial=True,
                    )  # fmt: skip
                    unit_before = unit
            scale = row_scale
        codes = value
        if QUANT != "given":
            value = value.to(gl.float32)
            if QUANT == "group":
                scale = _scale_of(largest(value, 1), POWER_OF_TWO)
            if not (QUANT == "static" and UP):
                codes = _to_e4m3(value, scale, QUANT == "static")
        buffer = done % BUFFERS
        mbarrier.wait(empty.index(buffer), ((done // BUFFERS) & 1) ^ 1)
        if QUANT == "static" and UP:
            # Once more under the scale of up's input, should it be another.
            for half in range(gl.where(own_1 == own_2, 1, 2)):
                scale = gl.full((TOKENS,), gl.where(half == 0, own_1, own_2), gl.float32, OF_ROW)
                a_bufs.index(half * BUFFERS + buffer).store(_to_e4m3(value, scale, True))
        else:
            a_bufs.index(buffer).store(codes)
        if WEIGHT == "block":
            scale_bufs.index(2 * buffer).store(scale * own_1)
            scale_bufs.index(2 * buffer + 1).store(scale * own_2)
        elif QUANT != "static":
            scale_bufs.index(2 * buffer).store(scale)
        fence_async_shared()
        mbarrier.arrive(full.index(buffer), count=1)
