"""Both GEMMs for up to 8 tokens with e4m3 weights, as one stream of weights each (Gluon, Hopper).

One warp of a program asks for blocks of weights as far ahead as shared memory goes, for the down GEMM also while the up
GEMM is still at work. Others quantize the rows that go with them, in turns, and four multiply. Weights are the left
side of `wgmma`; its 8 columns are the step's tokens, all of them, so that rows are neither sorted nor gathered.

The U distinct experts are units; row u * T + t of act is unit u's for token t. The up kernel's programs share (unit, 64
columns of gate and of up). The down kernel's share all units' steps for every 128 columns, cut anywhere, and sum the
experts in registers; the last of those that share columns adds their parts up, in their order.

Not for the interpreter; its sibling there is `fp8_scan.py`, with WEIGHT, QUANT and strides as there. H hidden ·
I intermediate · K top-k; slot s = t * K + k. LEN is the length of the dot products, N the number of their columns.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_core.ops._kernels.dependent import let_next_kernel_come, wait_for_kernel_before
from moe_core.ops._kernels.fp8_stream_rows import (
    BK,
    BM,
    QUANTIZERS,
    STEP,
    TOKENS,
    expert_of,
    largest,
    place,
    quantize,
    row_scales_of,
    share,
)

PART = gl.constexpr(2 * BM * TOKENS)  # sums of one program and block of columns
TOGETHER = gl.constexpr(8)  # parts that are asked for at once: the last program waits for them at the step's very end
OTHER_REGISTERS = gl.constexpr(120)  # of a warp that does not multiply


@gluon.jit
def _multiplying_warps():
    """Wait for all four of them."""
    gl.inline_asm_elementwise(
        "bar.sync 0, 128; mov.u32 $0, 0;", "=r,~{memory}", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def _distinct(ids, num_slots, SLOTS: gl.constexpr):
    """(expert of each unit [SLOTS], U): the experts that were chosen, in the order of their first slots."""
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [SLOTS // 32, SLOTS // gl.num_warps()], [32, 1], [1, gl.num_warps()], [0, 1]
    )
    i = gl.arange(0, SLOTS, gl.SliceLayout(1, LAYOUT))
    j = gl.arange(0, SLOTS, gl.SliceLayout(0, LAYOUT))
    id_i = gl.load(ids + i, mask=i < num_slots, other=-1).to(gl.int32)
    id_j = gl.load(ids + j, mask=j < num_slots, other=-1).to(gl.int32)
    same = id_i[:, None] == id_j[None, :]
    first_i = (gl.sum((same & (j[None, :] < i[:, None])).to(gl.int32), 1) == 0) & (id_i >= 0)
    first_j = (gl.sum((same & (i[:, None] < j[None, :])).to(gl.int32), 0) == 0) & (id_j >= 0)
    unit_i = gl.sum((first_j[None, :] & (j[None, :] < i[:, None])).to(gl.int32), 1)
    experts = gl.sum(gl.where((unit_i[:, None] == j[None, :]) & first_i[:, None], id_i[:, None], 0), 0)
    return experts, gl.sum(first_i.to(gl.int32), 0)


@gluon.jit
def _load(
    w, bufs_1, bufs_2, full, empty, experts, units,
    LEN: gl.constexpr, N: gl.constexpr, W_ROWS: gl.constexpr, FIRST: gl.constexpr, SECOND: gl.constexpr,
    UP: gl.constexpr,
):  # fmt: skip
    """One warp: weights, as fast as buffers are emptied."""
    BUFFERS: gl.constexpr = bufs_1.type.shape[0]
    STEPS: gl.constexpr = (LEN + STEP - 1) // STEP
    WIDTH: gl.constexpr = BM if UP else 2 * BM
    BLOCKS: gl.constexpr = (N + WIDTH - 1) // WIDTH
    begin, end = share(units, STEPS, BLOCKS, UP)
    done = 0
    for item in range(begin // STEPS, (end + STEPS - 1) // STEPS):
        unit, block = place(item, units, BLOCKS, UP)
        row = expert_of(experts, unit) * W_ROWS + block * WIDTH + FIRST
        for k in range(2 * gl.maximum(begin - item * STEPS, 0), 2 * gl.minimum(end - item * STEPS, STEPS)):
            buffer = done % BUFFERS
            mbarrier.wait(empty.index(buffer), ((done // BUFFERS) & 1) ^ 1)
            mbarrier.expect(full.index(buffer), 2 * w.block_type.nbytes)
            tma.async_copy_global_to_shared(w, [row, k * BK], full.index(buffer), bufs_1.index(buffer))
            tma.async_copy_global_to_shared(w, [row + SECOND, k * BK], full.index(buffer), bufs_2.index(buffer))
            done += 1


@gluon.jit
def _token_weights(expert, ids, weights, num_slots, token, K: gl.constexpr):
    """(which tokens chose the expert, the sum of their weights for it); other slots' weights are not used."""
    hit = token < 0
    weight = gl.zeros_like(token).to(gl.float32)
    for k in gl.static_range(K):
        slot = token * K + k
        chosen = gl.load(ids + slot, mask=slot < num_slots, other=-1).to(gl.int32) == expert
        hit = hit | chosen
        weight += gl.load(weights + slot, mask=chosen, other=0.0)
    return hit, weight


@gluon.jit
def _products(a_bufs, bufs_1, bufs_2, full, buffer, again, phase, LAYOUT: gl.constexpr):
    """[BM, TOKENS] of both blocks of weights in a buffer, under way; the second one's rows are `again` further."""
    mbarrier.wait(full.index(buffer), phase)
    rows = a_bufs.index(buffer).permute((1, 0))
    rows_2 = a_bufs.index(buffer + again).permute((1, 0))
    nothing = gl.zeros((BM, TOKENS), gl.float32, LAYOUT)
    d_1 = warpgroup_mma(bufs_1.index(buffer), rows, nothing, use_acc=False, is_async=True)
    d_2 = warpgroup_mma(bufs_2.index(buffer), rows_2, nothing, use_acc=False, is_async=True)
    return d_1, d_2


@gluon.jit
def _write(sum_1, sum_2, out, block, num_tokens, N: gl.constexpr, stride_out: gl.constexpr):
    """Two neighbouring blocks of BM columns of `out`."""
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, sum_1.type.layout))
    n = block * (2 * BM) + gl.arange(0, BM, gl.SliceLayout(1, sum_1.type.layout))
    to = out + token.to(gl.int64)[None, :] * stride_out + n[:, None]
    there = (token < num_tokens)[None, :]
    gl.store(to, sum_1.to(out.dtype.element_ty), mask=(n < N)[:, None] & there)
    gl.store(to + BM, sum_2.to(out.dtype.element_ty), mask=(n + BM < N)[:, None] & there)


@gluon.jit
def _finish(
    sum_1, sum_2, out, parts, arrivals, block, units, num_tokens,
    STEPS: gl.constexpr, BLOCKS: gl.constexpr, N: gl.constexpr, stride_out: gl.constexpr,
):  # fmt: skip
    """Writes a block of `out`, or this program's part of it, and the whole if all others' parts are there."""
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, sum_1.type.layout))
    row = gl.arange(0, BM, gl.SliceLayout(1, sum_1.type.layout))
    at = row[:, None] * TOKENS + token[None, :]
    pieces = units * BLOCKS * STEPS
    programs = gl.minimum(gl.num_programs(0), pieces)
    # The programs with the first and the last of the block's steps; a program's parts of two blocks are neighbours.
    low = ((block * units * STEPS + 1) * programs - 1) // pieces
    high = ((block + 1) * units * STEPS * programs - 1) // pieces
    whole = low == high
    if not whole:
        part = parts + (gl.program_id(0) + block) * PART + at
        gl.store(part, sum_1)
        gl.store(part + PART // 2, sum_2)
        # Every warp's part must be out before the count says so.
        _multiplying_warps()
        whole = gl.atomic_add(arrivals + block, 1, sem="acq_rel") == high - low
        if whole:
            sum_1 = gl.zeros_like(sum_1)
            sum_2 = gl.zeros_like(sum_2)
            for first in range(low, high + 1, TOGETHER):
                for i in gl.static_range(TOGETHER):
                    part = parts + (first + i + block) * PART + at
                    there = (at >= 0) & (first + i <= high)
                    # Past the first-level cache: they come from other multiprocessors.
                    sum_1 += gl.load(part, mask=there, other=0.0, cache_modifier=".cg")
                    sum_2 += gl.load(part + PART // 2, mask=there, other=0.0, cache_modifier=".cg")
    if whole:
        _write(sum_1, sum_2, out, block, num_tokens, N, stride_out)


@gluon.jit
def _multiply(
    rows, c, s_1, s_2, in_1, in_2, ids, weights, parts, arrivals, amax, a_bufs, bufs_1, bufs_2, scale_bufs, row_scales,
    scaled, full, empty, experts, units, num_slots, num_tokens,
    LEN: gl.constexpr, N: gl.constexpr, K: gl.constexpr, SE: gl.constexpr, SN: gl.constexpr, stride_a: gl.constexpr,
    stride_in: gl.constexpr, stride_c: gl.constexpr, UP: gl.constexpr, QUANT: gl.constexpr, WEIGHT: gl.constexpr,
    AMAX: gl.constexpr,
):  # fmt: skip
    """Four warps. A sum of BK columns goes to float32 sums; its buffer is given back before."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 32])
    OF_TOKEN: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    BUFFERS: gl.constexpr = bufs_1.type.shape[0]
    STEPS: gl.constexpr = (LEN + STEP - 1) // STEP
    WIDTH: gl.constexpr = BM if UP else 2 * BM
    BLOCKS: gl.constexpr = (N + WIDTH - 1) // WIDTH
    begin, end = share(units, STEPS, BLOCKS, UP)
    items = (end + STEPS - 1) // STEPS
    if not UP:
        wait_for_kernel_before()
    let_next_kernel_come()
    if UP and QUANT == "row":
        OF_X: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
        row_scales.store(row_scales_of(rows, num_tokens, stride_a, LEN, 2048, OF_X))
        mbarrier.arrive(scaled, count=1)
    token = gl.arange(0, TOKENS, OF_TOKEN)
    sum_1 = gl.zeros((BM, TOKENS), gl.float32, LAYOUT)
    sum_2 = gl.zeros((BM, TOKENS), gl.float32, LAYOUT)
    scale = gl.zeros((TOKENS,), gl.float32, OF_TOKEN)
    buffer = 0
    phase = 0
    again = 0
    for item in range(begin // STEPS, items):
        unit, block = place(item, units, BLOCKS, UP)
        expert = expert_of(experts, unit)
        n = block * WIDTH + gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))
        hit, weight = _token_weights(expert, ids, weights, num_slots, token, K)
        if WEIGHT != "block":
            own = expert.to(gl.int64) * SE + n * SN
            n_2 = n if UP else n + BM
            own_1 = gl.load(s_1 + own, mask=n < N, other=0.0)[:, None]
            own_2 = gl.load(s_2 + own + (n_2 - n) * SN, mask=n_2 < N, other=0.0)[:, None]
        if QUANT == "static":
            scale_1 = gl.load(in_1 + expert * stride_in)
            scale_2 = scale_1
            if UP:
                scale_2 = gl.load(in_2 + expert * stride_in)
                again = gl.where(scale_1 == scale_2, 0, BUFFERS)
        acc_1 = gl.zeros((BM, TOKENS), gl.float32, LAYOUT)
        acc_2 = gl.zeros((BM, TOKENS), gl.float32, LAYOUT)
        for _ in range(gl.maximum(begin - item * STEPS, 0), gl.minimum(end - item * STEPS, STEPS)):
            d_1, d_2 = _products(a_bufs, bufs_1, bufs_2, full, buffer, again, phase, LAYOUT)
            e_1, e_2 = _products(a_bufs, bufs_1, bufs_2, full, buffer + 1, again, phase, LAYOUT)
            if WEIGHT == "block":
                d_factor_1 = scale_bufs.index(2 * buffer).load(OF_TOKEN)[None, :]
                d_factor_2 = scale_bufs.index(2 * buffer + 1).load(OF_TOKEN)[None, :]
                e_factor_1 = scale_bufs.index(2 * buffer + 2).load(OF_TOKEN)[None, :]
                e_factor_2 = scale_bufs.index(2 * buffer + 3).load(OF_TOKEN)[None, :]
            elif QUANT != "static":
                scale = scale_bufs.index(2 * buffer).load(OF_TOKEN)  # whole rows', the same every time
            d_1, d_2 = warpgroup_mma_wait(num_outstanding=2, deps=(d_1, d_2))
            mbarrier.arrive(empty.index(buffer), count=1)
            if WEIGHT == "block":
                d_1 *= d_factor_1
                d_2 *= d_factor_2
            acc_1 += d_1
            acc_2 += d_2
            e_1, e_2 = warpgroup_mma_wait(num_outstanding=0, deps=(e_1, e_2))
            mbarrier.arrive(empty.index(buffer + 1), count=1)
            if WEIGHT == "block":
                e_1 *= e_factor_1
                e_2 *= e_factor_2
            acc_1 += e_1
            acc_2 += e_2
            buffer += 2
            phase = gl.where(buffer == BUFFERS, phase ^ 1, phase)
            buffer = gl.where(buffer == BUFFERS, 0, buffer)
        if QUANT == "static":
            acc_1 = acc_1 * scale_1 * own_1
            acc_2 = acc_2 * scale_2 * own_2
        elif WEIGHT != "block":
            acc_1 = acc_1 * scale[None, :] * own_1
            acc_2 = acc_2 * scale[None, :] * own_2
        if UP:
            row = unit * num_tokens + token
            h = (acc_1 / (1 + gl.exp(-acc_1)) * acc_2).to(c.dtype.element_ty)
            gl.store(c + row.to(gl.int64)[None, :] * stride_c + n[:, None], h, mask=(n < N)[:, None] & hit[None, :])
            if AMAX:
                h = gl.where((n < N)[:, None], h.to(gl.float32), 0.0)
                gl.store(amax + row * BLOCKS + block, largest(h, 0), mask=hit)
        else:
            # Tokens of other experts were multiplied by whatever their rows hold.
            sum_1 += gl.where(hit[None, :], acc_1 * weight[None, :], 0.0)
            sum_2 += gl.where(hit[None, :], acc_2 * weight[None, :], 0.0)
            if (unit == units - 1) | (item == items - 1):
                _finish(sum_1, sum_2, c, parts, arrivals, block, units, num_tokens, STEPS, BLOCKS, N, stride_c)
                sum_1 = gl.zeros_like(sum_1)
                sum_2 = gl.zeros_like(sum_2)
    if not UP:
        if units == 0:
            for block in range(gl.program_id(0), BLOCKS, gl.num_programs(0)):
                _write(sum_1, sum_2, c, block, num_tokens, N, stride_c)


@gluon.jit(do_not_specialize=["num_slots", "num_tokens"])
def fp8_stream_kernel(
    rows, w, c, a_scale, s_1, s_2, in_1, in_2, ids, weights, num_rows, scratch, num_slots, num_tokens,
    stride_a: gl.constexpr, stride_as: gl.constexpr, stride_c: gl.constexpr, LEN: gl.constexpr, N: gl.constexpr,
    K: gl.constexpr, SLOTS: gl.constexpr, W_ROWS: gl.constexpr, FIRST: gl.constexpr, SECOND: gl.constexpr,
    SE: gl.constexpr, SN: gl.constexpr, stride_in: gl.constexpr, UP: gl.constexpr, QUANT: gl.constexpr,
    WEIGHT: gl.constexpr, POWER_OF_TWO: gl.constexpr, AMAX: gl.constexpr, COUNTERS: gl.constexpr,
    PARTS_AT: gl.constexpr, AMAX_AT: gl.constexpr, BUFFERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """UP: act = silu(x @ gate.T) · (x @ up.T) of every unit's tokens; else out = Σ weight · (act @ w2.T).

    rows: [T, LEN] (UP) or [U * T, LEN], in the model dtype, or e4m3 with `a_scale` (QUANT "given"). w: tensor map of
    [E_l * W_ROWS, LEN]; a block of weights begins at FIRST, its other one SECOND rows later. The down kernel reads ids
    and num_rows before the up kernel is done: that one has waited for them.
    """
    arrivals = scratch.to(gl.pointer_type(gl.int32), bitcast=True)
    parts = scratch + PARTS_AT
    amax = scratch + AMAX_AT
    single: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    column: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, BK], gl.float8e4nv)
    A_BUFFERS: gl.constexpr = 2 * BUFFERS if QUANT == "static" and UP else BUFFERS
    a_bufs = gl.allocate_shared_memory(gl.float8e4nv, [A_BUFFERS, TOKENS, BK], a_layout)
    bufs_1 = gl.allocate_shared_memory(gl.float8e4nv, [BUFFERS, BM, BK], w.layout)
    bufs_2 = gl.allocate_shared_memory(gl.float8e4nv, [BUFFERS, BM, BK], w.layout)
    scale_bufs = gl.allocate_shared_memory(gl.float32, [2 * BUFFERS, TOKENS], single)
    row_scales = gl.allocate_shared_memory(gl.float32, [TOKENS], single)
    experts = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], single)
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    scaled = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(full.index(i), count=2)  # the tensor maps' bytes, and the rows in e4m3
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(scaled, count=1)
    if UP:
        wait_for_kernel_before()
    if num_rows is not None:
        num_slots = gl.minimum(num_slots, gl.load(num_rows) * K)
    found, units = _distinct(ids, num_slots, SLOTS)
    found = gl.convert_layout(found, gl.SliceLayout(1, gl.BlockedLayout([1, 1], [32, 1], [num_warps, 1], [0, 1])))
    experts._reinterpret(gl.int32, [SLOTS, 1], column).store(gl.expand_dims(found, 1))
    if UP:
        # The down kernel counts arrivals per block of columns; nobody else can have cleared the counters.
        for block in range(gl.program_id(0), COUNTERS, gl.num_programs(0)):
            gl.store(arrivals + block, 0)
    gl.static_assert(QUANTIZERS == 3)  # as many as stand here
    gl.warp_specialize([
        (_multiply, (rows, c, s_1, s_2, in_1, in_2, ids, weights, parts, arrivals, amax, a_bufs, bufs_1, bufs_2,
                     scale_bufs, row_scales, scaled, full, empty, experts, units, num_slots, num_tokens, LEN, N, K, SE,
                     SN, stride_a, stride_in, stride_c, UP, QUANT, WEIGHT, AMAX)),
        (_load, (w, bufs_1, bufs_2, full, empty, experts, units, LEN, N, W_ROWS, FIRST, SECOND, UP)),
        (quantize, (rows, a_scale, s_1, s_2, in_1, in_2, amax, a_bufs, scale_bufs, row_scales, scaled, full, empty,
                     experts, units, num_tokens, 0, LEN, N, SE, SN, stride_a, stride_as, stride_in, UP, QUANT, WEIGHT,
                     POWER_OF_TWO)),
        (quantize, (rows, a_scale, s_1, s_2, in_1, in_2, amax, a_bufs, scale_bufs, row_scales, scaled, full, empty,
                     experts, units, num_tokens, 1, LEN, N, SE, SN, stride_a, stride_as, stride_in, UP, QUANT, WEIGHT,
                     POWER_OF_TWO)),
        (quantize, (rows, a_scale, s_1, s_2, in_1, in_2, amax, a_bufs, scale_bufs, row_scales, scaled, full, empty,
                     experts, units, num_tokens, 2, LEN, N, SE, SN, stride_a, stride_as, stride_in, UP, QUANT, WEIGHT,
                     POWER_OF_TWO)),
    ], [1, 1, 1, 1], [OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
