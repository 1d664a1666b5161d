"""Both FP8 GEMMs with loading warps and two groups of four that multiply (Gluon, Hopper).

Of tiles of 128 rows each group takes 64: while it adds a product of 128 columns, under its scales, to float32 sums, the
matrix unit works for the other one. Tiles of 64 rows they take in turns: one group multiplies, the other one finishes
its tile and writes it. Two blocks of 128 columns share the rows that were loaded: gate and up, or two neighbours of w2.

Programs find the row tiles of all experts by themselves: the list of `align_kernel` holds numbers without rows, and
dealt out in turns it would give some programs up to half more tiles than others.

Not for the interpreter; its sibling there is `fp8_grouped.py`, with rows, LEN, N and WEIGHT as there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_core.ops._kernels.dependent import let_next_kernel_come, wait_for_kernel_before

BK = gl.constexpr(128)
BN = gl.constexpr(128)
ROWS = gl.constexpr(64)  # that a group of warps multiplies at a time
# Of each thread that multiplies and that loads; there are 64 Ki in all.
REGISTERS_WITH_ROWS = gl.constexpr((224, 56))
REGISTERS_WITH_MAPS = gl.constexpr((232, 24))


@gluon.constexpr_function
def _power_of_two(n):
    return 1 << (n - 1).bit_length()


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _write_tables(tables, row_end, E: gl.constexpr, BM: gl.constexpr):
    """tables[0]: the number of tiles of all experts up to each one; tables[1]: where its rows end."""
    SIZE: gl.constexpr = tables.type.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([SIZE // (32 * gl.num_warps())], [32], [gl.num_warps()], [0])
    e = gl.arange(0, SIZE, LAYOUT)
    end = gl.load(row_end + gl.minimum(e, E - 1))
    start = gl.where(e > 0, gl.load(row_end + gl.maximum(gl.minimum(e, E) - 1, 0)), 0)
    tables.index(0).store(gl.associative_scan((end - start + BM - 1) // BM, 0, _plus))
    tables.index(1).store(end)


@gluon.jit
def _count(tables):
    """Tiles of all experts."""
    SIZE: gl.constexpr = tables.type.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([SIZE // (32 * gl.num_warps())], [32], [gl.num_warps()], [0])
    return gl.max(tables.index(0).load(LAYOUT), 0)


@gluon.jit
def _find(tables, tiles, pid, blocks, BM: gl.constexpr, GROUP: gl.constexpr):
    """(expert, first row, the expert's end, pair of blocks) of turn `pid`; one behind the last is safe to look up.

    GROUP row tiles share their blocks of weights in L2.
    """
    SIZE: gl.constexpr = tables.type.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([SIZE // (32 * gl.num_warps())], [32], [gl.num_warps()], [0])
    per_group = GROUP * blocks
    first = pid // per_group * GROUP
    size = gl.maximum(gl.minimum(tiles - first, GROUP), 1)
    rest = pid % per_group
    tile = first + rest % size
    upto = tables.index(0).load(LAYOUT)
    end = tables.index(1).load(LAYOUT)
    before = upto <= tile
    expert = gl.sum(before.to(gl.int32), 0)
    row = gl.max(gl.where(before, end, 0), 0) + (tile - gl.max(gl.where(before, upto, 0), 0)) * BM
    return expert, row, gl.min(gl.where(before, gl.max(end, 0), end), 0), rest // size


@gluon.jit
def _load_maps(
    a, w_1, w_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, tables, slot_of_row,
    stride_a: gl.constexpr, LEN: gl.constexpr, N: gl.constexpr, W_ROWS: gl.constexpr, FIRST_1: gl.constexpr,
    FIRST_2: gl.constexpr, PAIR: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """One warp: rows and weights of all of this program's tiles by tensor maps, as fast as buffers are emptied.

    EARLY: the first weights come while the kernel before still makes the rows.
    """
    STAGES: gl.constexpr = a_bufs.type.shape[0]
    BM: gl.constexpr = a_bufs.type.shape[1]
    WIDTH: gl.constexpr = BN if PAIR else 2 * BN
    BYTES: gl.constexpr = a.block_type.nbytes + 2 * w_1.block_type.nbytes
    AHEAD: gl.constexpr = min(STAGES, (LEN + BK - 1) // BK)
    blocks = (N + WIDTH - 1) // WIDTH
    tiles = _count(tables)
    if EARLY and gl.program_id(0) < tiles * blocks:
        expert, row, _, block = _find(tables, tiles, gl.program_id(0), blocks, BM, GROUP)
        column = expert * W_ROWS + block * WIDTH
        for i in range(AHEAD):
            mbarrier.expect(full.index(i), BYTES)
            tma.async_copy_global_to_shared(w_1, [column + FIRST_1, i * BK], full.index(i), bufs_1.index(i))
            tma.async_copy_global_to_shared(w_2, [column + FIRST_2, i * BK], full.index(i), bufs_2.index(i))
        wait_for_kernel_before()
        for i in range(AHEAD):
            tma.async_copy_global_to_shared(a, [row, i * BK], full.index(i), a_bufs.index(i))
    step = 0
    for pid in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        expert, row, _, block = _find(tables, tiles, pid, blocks, BM, GROUP)
        column = expert * W_ROWS + block * WIDTH
        for k in range(0, LEN, BK):
            stage = step % STAGES
            if not EARLY or step >= AHEAD:
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(stage), BYTES)
                tma.async_copy_global_to_shared(a, [row, k], full.index(stage), a_bufs.index(stage))
                tma.async_copy_global_to_shared(w_1, [column + FIRST_1, k], full.index(stage), bufs_1.index(stage))
                tma.async_copy_global_to_shared(w_2, [column + FIRST_2, k], full.index(stage), bufs_2.index(stage))
            step += 1


@gluon.jit
def _load_rows(
    a, w_1, w_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, tables, slot_of_row,
    stride_a: gl.constexpr, LEN: gl.constexpr, N: gl.constexpr, W_ROWS: gl.constexpr, FIRST_1: gl.constexpr,
    FIRST_2: gl.constexpr, PAIR: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Four warps: the same where rows are gathered from the tokens' own; the next tile's are looked up ahead."""
    STAGES: gl.constexpr = a_bufs.type.shape[0]
    BM: gl.constexpr = a_bufs.type.shape[1]
    STEPS: gl.constexpr = (LEN + BK - 1) // BK
    WIDTH: gl.constexpr = BN if PAIR else 2 * BN
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    blocks = (N + WIDTH - 1) // WIDTH
    columns = gl.arange(0, BK, gl.SliceLayout(0, LAYOUT))
    in_tile = gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))
    tiles = _count(tables)
    expert, row, last, block = _find(tables, tiles, gl.program_id(0), blocks, BM, GROUP)
    # Rows that are not there are not read either: all programs would read the same one, at the same time.
    slot = gl.load(slot_of_row + row + in_tile, mask=row + in_tile < last, other=-1)
    next_expert, next_block, next_slot = expert, block, slot
    step = 0
    for pid in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        rows = a + (gl.maximum(slot, 0) // K).to(gl.int64)[:, None] * stride_a + columns[None, :]
        column = expert * W_ROWS + block * WIDTH
        for k in range(STEPS):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * w_1.block_type.nbytes)
            tma.async_copy_global_to_shared(w_1, [column + FIRST_1, k * BK], full.index(stage), bufs_1.index(stage))
            tma.async_copy_global_to_shared(w_2, [column + FIRST_2, k * BK], full.index(stage), bufs_2.index(stage))
            inside = (slot >= 0)[:, None] & (columns < LEN - k * BK)[None, :]
            async_copy.async_copy_global_to_shared(a_bufs.index(stage), rows + k * BK, mask=inside)
            async_copy.mbarrier_arrive(rows_full.index(stage), increment_count=False)
            step += 1
            if k == min(STAGES, STEPS) - 1:  # all buffers are full: time to spare
                next_expert, row, last, next_block = _find(tables, tiles, pid + gl.num_programs(0), blocks, BM, GROUP)
                next_slot = gl.load(slot_of_row + row + in_tile, mask=row + in_tile < last, other=-1)
        expert, block, slot = next_expert, next_block, next_slot


@gluon.jit
def _product(
    a_bufs, bufs_1, bufs_2, rows_full, full, empty, step, a_scale, s_1, s_2, never,
    PART: gl.constexpr, LEN: gl.constexpr, BLOCKS: gl.constexpr, GATHER: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """[64, 128] sums of both blocks; a buffer is given back when both products of its columns are there.

    `never` is False, but the assembler must not know: it gives a product that adds to nothing new registers.
    Scales (BLOCKS) are asked for a step ahead.
    """
    STAGES: gl.constexpr = a_bufs.type.shape[0]
    TURNS: gl.constexpr = a_bufs.type.shape[1] == ROWS
    STEPS: gl.constexpr = (LEN + BK - 1) // BK
    acc_1 = gl.zeros((ROWS, BN), dtype=gl.float32, layout=LAYOUT)
    acc_2 = gl.zeros((ROWS, BN), dtype=gl.float32, layout=LAYOUT)
    # One product at a time in the same registers: with two, the sums would not fit beside them.
    d = gl.zeros((ROWS, BN), dtype=gl.float32, layout=LAYOUT)
    if BLOCKS:
        scale, scale_1, scale_2 = gl.load(a_scale), gl.load(s_1), gl.load(s_2)
    for k in range(STEPS):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        mbarrier.wait(full.index(stage), phase)
        if GATHER:
            mbarrier.wait(rows_full.index(stage), phase)
            fence_async_shared()
        a = a_bufs.index(stage)
        if not TURNS:
            a = a.slice(PART * ROWS, ROWS)
        d = warpgroup_mma(a, bufs_1.index(stage).permute((1, 0)), d, use_acc=never, is_async=True)
        if BLOCKS:
            row_1 = (scale * scale_1)[:, None]
            row_2 = (scale * scale_2)[:, None]
            ahead = gl.minimum(k + 1, STEPS - 1)
            scale, scale_1, scale_2 = gl.load(a_scale + ahead), gl.load(s_1 + ahead), gl.load(s_2 + ahead)
        d = warpgroup_mma_wait(num_outstanding=0, deps=(d,))
        if BLOCKS:
            acc_1 += d * row_1
        else:
            acc_1 += d
        d = warpgroup_mma(a, bufs_2.index(stage).permute((1, 0)), d, use_acc=never, is_async=True)
        d = warpgroup_mma_wait(num_outstanding=0, deps=(d,))
        mbarrier.arrive(empty.index(stage), count=1)
        if BLOCKS:
            acc_2 += d * row_2
        else:
            acc_2 += d
        step += 1
    return acc_1, acc_2


@gluon.jit
def _store(h, c, row_0, last, column, stride_c: gl.constexpr, N: gl.constexpr):
    """Rows in pieces of 16 bytes a thread; rows of other experts are left alone."""
    PIECE: gl.constexpr = 128 // c.dtype.element_ty.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, PIECE], [32 * PIECE // BN, BN // PIECE], [4, 1], [1, 0])
    out = gl.convert_layout(h.to(c.dtype.element_ty), LAYOUT)
    row = row_0 + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    n = column + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    gl.store(c + row.to(gl.int64)[:, None] * stride_c + n[None, :], out, mask=(row < last)[:, None] & (n < N)[None, :])


@gluon.jit
def _quotient(x, scale):
    """x / scale, rounded correctly as in `fp8_quantize.py`."""
    inverse = gl.div_rn(gl.full(scale.shape, 1.0, gl.float32, scale.type.layout), scale)
    rough = x * inverse[:, None]
    return gl.fma(gl.fma(-rough, scale[:, None] + gl.zeros_like(x), x), inverse[:, None] + gl.zeros_like(x), rough)


@gluon.jit
def _write_act(
    gate, up, c, c_scale, row_0, last, block, stride_c: gl.constexpr, N: gl.constexpr, OUT: gl.constexpr,
    POWER_OF_TWO: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """silu(gate) · up, rounded to the model dtype, and quantized by groups of 128 columns where OUT says so."""
    h = (gate / (1 + gl.exp(-gate)) * up).to(DTYPE)
    if OUT == "group":
        LAYOUT: gl.constexpr = gate.type.layout
        n = block * BN + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
        x = gl.where((n < N)[None, :], h.to(gl.float32), 0.0)
        amax = gl.max(gl.where(x == x, gl.abs(x), float("inf")), 1)
        scale = gl.div_rn(gl.maximum(amax, 1e-10), gl.full(amax.shape, 448.0, gl.float32, amax.type.layout))
        if POWER_OF_TWO:
            bits = (scale.to(gl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
            scale = bits.to(gl.float32, bitcast=True)
        scale = gl.where(amax < float("inf"), scale, float("nan"))
        row = row_0 + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        gl.store(c_scale + row.to(gl.int64) * ((N + 127) // 128) + block, scale, mask=row < last)
        _store(_quotient(x, scale), c, row_0, last, block * BN, stride_c, N)
    else:
        _store(h, c, row_0, last, block * BN, stride_c, N)


@gluon.jit
def _tile(
    c, c_scale, a_scale, s_1, s_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, turns, slot_of_row,
    step, turn, expert, row_0, last, block,
    stride_as: gl.constexpr, stride_c: gl.constexpr, LEN: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
    SE: gl.constexpr, SN: gl.constexpr, PART: gl.constexpr, PAIR: gl.constexpr, WEIGHT: gl.constexpr,
    A_SCALE: gl.constexpr, OUT: gl.constexpr, POWER_OF_TWO: gl.constexpr, DTYPE: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """[64, 2 * 128] products from `row_0` on; `turn` counts this group's own."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32])
    TURNS: gl.constexpr = a_bufs.type.shape[1] == ROWS
    WIDTH: gl.constexpr = BN if PAIR else 2 * BN
    row = row_0 + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    row = gl.where(row < last, row, row_0)
    if GATHER:
        row = gl.load(slot_of_row + row) // K
    e = expert.to(gl.int64)
    scales = a_scale + (e if A_SCALE == "expert" else row.to(gl.int64)) * stride_as
    p_1, p_2 = s_1 + e * SE, s_2 + e * SE
    n = block * WIDTH + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    if WEIGHT == "block":
        p_1 += block * WIDTH // 128 * SN
        p_2 += (block * WIDTH // 128 if PAIR else gl.minimum(block * 2 + 1, (N + 127) // 128 - 1)) * SN
    if TURNS:
        # A barrier tells the last phase from the one before, not from earlier ones: no looking before one's turn.
        mbarrier.wait(turns.index(PART), (turn & 1) ^ (1 - PART))
    acc_1, acc_2 = _product(
        a_bufs, bufs_1, bufs_2, rows_full, full, empty, step, scales, p_1, p_2, last < 0,
        PART, LEN, WEIGHT == "block", GATHER, LAYOUT,
    )  # fmt: skip
    if TURNS:
        mbarrier.arrive(turns.index(1 - PART), count=1)
    if WEIGHT != "block":
        rows_scale = gl.load(scales) + gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, LAYOUT))
        own = n * SN if WEIGHT == "channel" else n * 0
        next_own = own if PAIR or WEIGHT != "channel" else own + BN * SN
        next_n = n if PAIR else n + BN
        acc_1 = acc_1 * rows_scale[:, None] * gl.load(p_1 + own, mask=n < N, other=0.0)[None, :]
        acc_2 = acc_2 * rows_scale[:, None] * gl.load(p_2 + next_own, mask=next_n < N, other=0.0)[None, :]
    if PAIR:
        _write_act(acc_1, acc_2, c, c_scale, row_0, last, block, stride_c, N, OUT, POWER_OF_TWO, DTYPE)
    else:
        _store(acc_1, c, row_0, last, block * WIDTH, stride_c, N)
        _store(acc_2, c, row_0, last, block * WIDTH + BN, stride_c, N)


@gluon.jit
def _multiply(
    c, c_scale, a_scale, s_1, s_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, turns, tables, slot_of_row,
    stride_as: gl.constexpr, stride_c: gl.constexpr, LEN: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
    SE: gl.constexpr, SN: gl.constexpr, PART: gl.constexpr, PAIR: gl.constexpr, WEIGHT: gl.constexpr,
    A_SCALE: gl.constexpr, OUT: gl.constexpr, POWER_OF_TWO: gl.constexpr, DTYPE: gl.constexpr, GATHER: gl.constexpr,
    GROUP: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """This group's share of all of this program's tiles: every second one, or 64 rows of each.

    Where there are none, buffers are only given back.
    """
    STAGES: gl.constexpr = a_bufs.type.shape[0]
    BM: gl.constexpr = a_bufs.type.shape[1]
    STEPS: gl.constexpr = (LEN + BK - 1) // BK
    WIDTH: gl.constexpr = BN if PAIR else 2 * BN
    blocks = (N + WIDTH - 1) // WIDTH
    tiles = _count(tables)
    if EARLY:
        wait_for_kernel_before()
    step = 0
    for pid in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        turn = step // STEPS
        if BM > ROWS or turn % 2 == PART:
            expert, row_0, last, block = _find(tables, tiles, pid, blocks, BM, GROUP)
            if BM > ROWS:
                row_0 += PART * ROWS
            if row_0 < last:
                _tile(c, c_scale, a_scale, s_1, s_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, turns, slot_of_row,
                      step, turn // 2, expert, row_0, last, block, stride_as, stride_c, LEN, N, K, SE, SN, PART, PAIR,
                      WEIGHT, A_SCALE, OUT, POWER_OF_TWO, DTYPE, GATHER)  # fmt: skip
            else:
                for i in range(STEPS):
                    mbarrier.wait(full.index((step + i) % STAGES), ((step + i) // STAGES) & 1)
                    mbarrier.arrive(empty.index((step + i) % STAGES), count=1)
        step += STEPS


@gluon.jit
def fp8_specialized_kernel(
    a, w_1, w_2, c, c_scale, a_scale, s_1, s_2, slot_of_row, row_end,
    stride_a: gl.constexpr, stride_as: gl.constexpr, stride_c: gl.constexpr,
    E: gl.constexpr, LEN: gl.constexpr, N: gl.constexpr, K: gl.constexpr, W_ROWS: gl.constexpr, FIRST_1: gl.constexpr,
    FIRST_2: gl.constexpr, SE: gl.constexpr, SN: gl.constexpr, PAIR: gl.constexpr, WEIGHT: gl.constexpr,
    A_SCALE: gl.constexpr, OUT: gl.constexpr, POWER_OF_TWO: gl.constexpr, DTYPE: gl.constexpr, GATHER: gl.constexpr,
    BM: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, EARLY: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """c = a @ w[e].T for each of E experts' rows, or silu(a @ gate[e].T) · (a @ up[e].T) (PAIR).

    w_1, w_2: tensor maps of [E * W_ROWS, LEN]; FIRST_1, FIRST_2: where their blocks stand. Programs walk the tiles.
    EARLY: programmatic launch. The kernel before a gathering one is `align_kernel`, or the quantizer of x, which ends
    behind it, and is waited for at once; other kernels before have waited for it before they let this one come, so
    tiles and weights are known then.
    """
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], gl.float8e4nv)
    a_bufs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BM, BK], a_layout)
    bufs_1 = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BN, BK], w_1.layout)
    bufs_2 = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BN, BK], w_2.layout)
    rows_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    # A table has at least an entry for each thread that looks things up.
    SIZE: gl.constexpr = _power_of_two(max(E, 128))
    tables = gl.allocate_shared_memory(gl.int32, [2, SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if EARLY:
        if GATHER:
            wait_for_kernel_before()
        let_next_kernel_come()
    _write_tables(tables, row_end, E, BM)
    for i in gl.static_range(STAGES):
        mbarrier.init(rows_full.index(i), count=128)
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=BM // ROWS)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    if GATHER:
        gl.warp_specialize([
            (_multiply, (c, c_scale, a_scale, s_1, s_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, turns,
                         tables, slot_of_row, stride_as, stride_c, LEN, N, K, SE, SN, 0, PAIR, WEIGHT,
                         A_SCALE, OUT, POWER_OF_TWO, DTYPE, GATHER, GROUP, False)),
            (_multiply, (c, c_scale, a_scale, s_1, s_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, turns,
                         tables, slot_of_row, stride_as, stride_c, LEN, N, K, SE, SN, 1, PAIR, WEIGHT,
                         A_SCALE, OUT, POWER_OF_TWO, DTYPE, GATHER, GROUP, False)),
            (_load_rows, (a, w_1, w_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, tables, slot_of_row,
                          stride_a, LEN, N, W_ROWS, FIRST_1, FIRST_2, PAIR, K, GROUP)),
        ], [4, 4], REGISTERS_WITH_ROWS)  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (c, c_scale, a_scale, s_1, s_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, turns,
                         tables, slot_of_row, stride_as, stride_c, LEN, N, K, SE, SN, 0, PAIR, WEIGHT,
                         A_SCALE, OUT, POWER_OF_TWO, DTYPE, GATHER, GROUP, EARLY)),
            (_multiply, (c, c_scale, a_scale, s_1, s_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, turns,
                         tables, slot_of_row, stride_as, stride_c, LEN, N, K, SE, SN, 1, PAIR, WEIGHT,
                         A_SCALE, OUT, POWER_OF_TWO, DTYPE, GATHER, GROUP, EARLY)),
            (_load_maps, (a, w_1, w_2, a_bufs, bufs_1, bufs_2, rows_full, full, empty, tables, slot_of_row,
                          stride_a, LEN, N, W_ROWS, FIRST_1, FIRST_2, PAIR, K, GROUP, EARLY)),
        ], [4, 1], REGISTERS_WITH_MAPS)  # fmt: skip


# Else the keys of the kernels that share these functions hang on which one a process compiles first: see `nvfp4.py`.
for _function in (_count, _find, _write_tables, _load_maps, _load_rows, _store, _write_act):
    _function.cache_key  # noqa: B018 - computed when it is asked for
