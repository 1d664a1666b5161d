"""Tokens to the ranks of their experts, and there, where experts want it so, to a place in each expert's rows.

Shape letters: T tokens on this rank · M the largest T · H hidden · P pitch of a row in elements · G groups of 128
columns · E_l local experts · C = W · M row capacity of an expert · K top-k · W ranks.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_core.ops.device import magnitude, scale_of, to_e4m3
from moe_symm.kernels.protocol import DYNAMIC, at, count, counts_of, lost, of_rank, other_rank, place, row_of, wait


@triton.jit
def _send_quantized(
    x, rows, scales, wanted, H: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, POWER_OF_TWO: tl.constexpr
):
    """A row in e4m3, with a scale for each GROUP columns, to `rows` and `scales`: the bits of `moe_core.formats`."""
    SCALES: tl.constexpr = BLOCK // GROUP
    for first in tl.static_range(0, H, BLOCK):
        group = first // GROUP + tl.arange(0, SCALES)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        value = tl.load(x + column, mask=column < H, other=0.0).to(tl.float32)
        scale = scale_of(tl.max(magnitude(value), 1), POWER_OF_TWO)
        code = to_e4m3(value, scale[:, None], tl.div_rn(1.0, scale)[:, None], False)
        if wanted:
            tl.store(rows + column, code.to(tl.uint8, bitcast=True), mask=column < H)
            tl.store(scales + group, scale, mask=group * GROUP < H)


@triton.jit
def _send(x, rows, wanted, H: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    for first in tl.static_range(0, H, BLOCK):
        value = tl.load(x + first + column, mask=first + column < H)
        if wanted:
            tl.store(rows + first + column, value, mask=first + column < H)


@triton.jit(do_not_specialize=DYNAMIC)
def dispatch(
    x,  # [T, H], contiguous
    ids,  # int32 or int64 [T, K], global ids or -1
    weights,  # float32 [T, K]
    peers,  # int64 [W], each rank's address of this lane
    base,  # this rank's
    status,  # address of an int32 in pinned host memory
    tokens,  # T
    rank,
    limit_ms,  # how long a wait may take
    W: tl.constexpr,
    WP: tl.constexpr,  # W and K rounded up to powers of two
    H: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    SHARE: tl.constexpr,
    MORE: tl.constexpr,
    LINEAR: tl.constexpr,
    UNITS: tl.constexpr,
    STAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale; 0: rows travel as they are
    POWER_OF_TWO: tl.constexpr,
    ROW_BYTES: tl.constexpr,  # from one row to the next
    SCALE_BYTES: tl.constexpr,
    WAITS: tl.constexpr,  # for the other ranks' tokens; else `arrive` or `expand` does
    DISPATCHED: tl.constexpr,  # offsets in a lane
    COUNTS: tl.constexpr,
    EPOCHS: tl.constexpr,
    FAULT: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    IDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    SCALES: tl.constexpr,
):
    """A program for each (token, rank) in turn."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    ranks = tl.arange(0, WP)
    there = ranks < W
    lanes = tl.load(peers + ranks, mask=there, other=0)
    gdc_wait()
    gdc_launch_dependents()
    epoch = tl.load(at(base + EPOCHS, tl.int32)) + 1
    dead = lost(base, FAULT)
    if program == 0:
        tl.store(at(base + EPOCHS, tl.int32) + 1, epoch)
        told = lanes + COUNTS + ((epoch & 1) * W + rank) * 4
        tl.store(told.to(tl.pointer_type(tl.int32)), tokens, mask=there)
    k = tl.arange(0, KP)
    for item in range(program, tokens * W, programs):
        token = item // W
        target = other_rank(item, token, rank, programs, W)
        chosen = tl.load(ids + token * K + k, mask=k < K, other=-1).to(tl.int32)
        weight = tl.load(weights + token * K + k, mask=k < K, other=0.0)
        owner, local = place(chosen, SHARE, MORE, LINEAR, W)
        here = owner == target
        lane = tl.load(peers + target)
        row = row_of(token, rank, W).to(tl.int64)
        wanted = tl.max(here.to(tl.int32)) > 0
        source = x + tl.cast(token, tl.int64) * H
        if GROUP > 0:
            codes = at(lane + ROWS + row * ROW_BYTES, tl.uint8)
            scales = at(lane + SCALES + row * SCALE_BYTES, tl.float32)
            _send_quantized(source, codes, scales, wanted, H, BLOCK, GROUP, POWER_OF_TWO)
        else:
            _send(source, at(lane + ROWS + row * ROW_BYTES, x.dtype.element_ty), wanted, H, BLOCK)
        if wanted:
            tl.store(at(lane + IDS, tl.int32) + row * K + k, tl.where(here, local, -1), mask=k < K)
            tl.store(at(lane + WEIGHTS, tl.float32) + row * K + k, tl.where(here, weight, 0.0), mask=k < K)
    active = tl.maximum(tl.minimum(tokens * W, programs), 1)
    if program < active:
        count(lanes + DISPATCHED + rank * 4, there, tl.where(program == 0, UNITS - active + 1, 1))
    if WAITS:
        if program == 0:
            wait(base, status, lanes + FAULT, ranks, DISPATCHED, epoch * UNITS, dead, limit_ms, rank, STAGE, W)
            tl.store(at(base + NUM_ROWS, tl.int32), tl.max(counts_of(base, epoch, ranks, COUNTS, W)) * W)


@triton.jit(do_not_specialize=DYNAMIC)
def arrive(
    peers,  # as for `dispatch`
    base,
    status,
    rank,
    limit_ms,
    W: tl.constexpr,
    WP: tl.constexpr,
    UNITS: tl.constexpr,
    STAGE: tl.constexpr,
    DISPATCHED: tl.constexpr,
    COUNTS: tl.constexpr,
    EPOCHS: tl.constexpr,
    FAULT: tl.constexpr,
    NUM_ROWS: tl.constexpr,
):
    """One program: wait for the other ranks' tokens."""
    ranks = tl.arange(0, WP)
    lanes = tl.load(peers + ranks, mask=ranks < W, other=0)
    gdc_wait()
    gdc_launch_dependents()
    epoch = tl.load(at(base + EPOCHS, tl.int32) + 1)
    wait(base, status, lanes + FAULT, ranks, DISPATCHED, epoch * UNITS, lost(base, FAULT), limit_ms, rank, STAGE, W)
    tl.store(at(base + NUM_ROWS, tl.int32), tl.max(counts_of(base, epoch, ranks, COUNTS, W)) * W)


@triton.jit
def _counts_before(ids, mine, end, FIRST: tl.constexpr, K: tl.constexpr, IDS: tl.constexpr, CHUNK: tl.constexpr):
    """How often `mine[FIRST]` and the next three stand among the first `end` of IDS ids: four counts of 16 bits."""
    index = tl.arange(0, CHUNK)
    packed = tl.zeros([CHUNK], tl.int64)
    if IDS <= CHUNK:  # one look
        there = tl.load(ids + index, mask=index < end, other=-1)
        for choice in tl.static_range(FIRST, min(FIRST + 4, K)):
            found = (there == tl.load(mine + choice)) & (index < end)
            packed += found.to(tl.int64) << (16 * (choice - FIRST))
    else:
        for first in range(0, end, CHUNK):
            there = tl.load(ids + first + index, mask=first + index < end, other=-1)
            for choice in tl.static_range(FIRST, min(FIRST + 4, K)):
                found = (there == tl.load(mine + choice)) & (first + index < end)
                packed += found.to(tl.int64) << (16 * (choice - FIRST))
    return tl.sum(packed)


@triton.jit
def _copy(source, out, H: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    for first in tl.static_range(0, H, BLOCK):
        value = tl.load(source + first + column, mask=first + column < H)
        tl.store(out + first + column, value, mask=first + column < H)


@triton.jit(do_not_specialize=DYNAMIC)
def expand(
    out,  # [E_l, C, H], contiguous: what the experts read; codes as uint8
    out_scale,  # float32 [E_l, C, G], or None
    tokens_per_expert,  # int32 [E_l]
    peers,  # as for `dispatch`
    base,
    status,
    rank,
    limit_ms,
    W: tl.constexpr,
    WP: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    UNITS: tl.constexpr,
    STAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,  # ids that are looked at together
    GROUP: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    EXPERTS: tl.constexpr,  # E_l
    DISPATCHED: tl.constexpr,
    COUNTS: tl.constexpr,
    EPOCHS: tl.constexpr,
    FAULT: tl.constexpr,
    IDS: tl.constexpr,
    ROWS: tl.constexpr,
    SCALES: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Wait for the other ranks' tokens; then each row, in turn, to its place among the rows of each of its experts.

    A place is the number of choices of that expert in the rows before, so it is the same each time.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    dtype: tl.constexpr = out.dtype.element_ty
    C: tl.constexpr = W * M
    ranks = tl.arange(0, WP)
    lanes = tl.load(peers + ranks, mask=ranks < W, other=0)
    gdc_wait()
    gdc_launch_dependents()
    epoch = tl.load(at(base + EPOCHS, tl.int32) + 1)
    wait(base, status, lanes + FAULT, ranks, DISPATCHED, epoch * UNITS, lost(base, FAULT), limit_ms, rank, STAGE, W)
    counts = counts_of(base, epoch, ranks, COUNTS, W)
    received = at(base + IDS, tl.int32)  # where no row has come, ids are -1
    rows = tl.max(counts) * W
    for item in range(program, rows, programs):
        token = item // W
        source = other_rank(item, token, rank, programs, W)
        if token < of_rank(counts, ranks, source):
            row = row_of(token, source, W)
            mine = received + row * K
            came = at(base + ROWS + row.to(tl.int64) * ROW_BYTES, dtype)
            scales = at(base + SCALES + row.to(tl.int64) * SCALE_BYTES, tl.float32)
            for first in tl.static_range(0, K, 4):
                before = _counts_before(received, mine, row * K, first, K, C * K, CHUNK)
                for choice in tl.static_range(first, min(first + 4, K)):
                    expert = tl.load(mine + choice)
                    slot = ((before >> (16 * (choice - first))) & 0xFFFF).to(tl.int32)
                    # Ids that stand twice in a row, which the plugin forbids, could be more than there is room for.
                    to = tl.where((expert >= 0) & (slot < C), expert * C + slot, -1)
                    tl.store(at(base + PLACES, tl.int32) + row * K + choice, to)
                    if to >= 0:
                        _copy(came, out + to.to(tl.int64) * H, H, BLOCK)
                        if GROUP > 0:
                            _copy(scales, out_scale + to.to(tl.int64) * G, G, GP)
    for expert in range(programs - 1 - program, EXPERTS, programs):
        index = tl.arange(0, CHUNK)
        found = tl.zeros([CHUNK], tl.int32)
        for first in range(0, rows * K, CHUNK):
            there = tl.load(received + first + index, mask=first + index < rows * K, other=-1)
            found += (there == expert).to(tl.int32)
        tl.store(tokens_per_expert + expert, tl.minimum(tl.sum(found), C))
