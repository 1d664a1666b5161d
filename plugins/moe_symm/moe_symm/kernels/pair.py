"""Dispatch and combine. The protocol is in `layout.py`, which also has the pure twins of the index functions here.

Shape letters: T tokens on this rank · M the largest T · H hidden · P pitch of a row in elements · K top-k · W ranks.

Stores to other ranks are plain. What makes them visible is one release per program: all its threads meet, then W of
them add to the W counters with release semantics at system scope. The reader's acquire loads poll its own memory.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

DYNAMIC = ["base", "status", "tokens", "rank", "limit_ms"]
"""Not specialised: their values differ by rank and by step, and no step may compile."""


@triton.jit
def _at(address, dtype: tl.constexpr):
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _acquire(address):
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.b32 $0, [$1];", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _count(counters, there, amount):
    """All this program's stores are visible to whoever sees the count."""
    tl.debug_barrier()
    tl.atomic_add(counters.to(tl.pointer_type(tl.int32)), amount, mask=there, sem="release", scope="sys")


@triton.jit
def _wait(base, status, faults, there, counters, target, dead, limit_ms, rank, STAGE: tl.constexpr, W: tl.constexpr):
    """Until every rank has counted up to `target`; 1 if one did not in time, and then all ranks are told."""
    late = dead
    for source in tl.static_range(W):
        address = base + counters + source * 4
        value = _acquire(address)
        if value - target < 0:
            deadline = globaltimer() + tl.where(late == 0, limit_ms, 0).to(tl.int64) * 1000000
            while (value - target < 0) & (globaltimer() < deadline):
                value = _acquire(address)
            if (value - target < 0) & (late == 0):
                code = (STAGE << 16) | (rank << 8) | source
                tl.store(faults.to(tl.pointer_type(tl.int32)), code, mask=there)
                tl.store(status.to(tl.pointer_type(tl.int32)), code)
                late = 1
    tl.debug_barrier()
    return late


@triton.jit
def _other_rank(item, token, rank, programs, W: tl.constexpr):
    return (rank + 1 + item % W + token * W // programs) % W


@triton.jit
def _place(expert, SHARE: tl.constexpr, MORE: tl.constexpr, LINEAR: tl.constexpr, W: tl.constexpr):
    """(rank, local id there); -1 stays on no rank."""
    if LINEAR:
        SPLIT: tl.constexpr = MORE * (SHARE + 1)
        rest = expert - SPLIT
        owner = tl.where(rest < 0, expert // (SHARE + 1), MORE + rest // SHARE)
        local = tl.where(rest < 0, expert % (SHARE + 1), rest % SHARE)
    else:
        owner = expert % W
        local = expert // W
    return tl.where(expert < 0, -1, owner), local


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
    M: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    SHARE: tl.constexpr,
    MORE: tl.constexpr,
    LINEAR: tl.constexpr,
    UNITS: tl.constexpr,
    STAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    DISPATCHED: tl.constexpr,  # offsets in a lane
    COUNTS: tl.constexpr,
    EPOCHS: tl.constexpr,
    FAULT: tl.constexpr,
    IDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program for each (token, rank) in turn; program 0 waits for the other ranks' tokens."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    dtype: tl.constexpr = x.dtype.element_ty
    SIZE: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
    ranks = tl.arange(0, WP)
    there = ranks < W
    lanes = tl.load(peers + ranks, mask=there, other=0)
    epoch = tl.load(_at(base + EPOCHS, tl.int32)) + 1
    dead = (tl.load(_at(base + FAULT, tl.int32), volatile=True) != 0).to(tl.int32)
    if program == 0:
        tl.store(_at(base + EPOCHS, tl.int32) + 1, epoch)
        told = lanes + COUNTS + ((epoch & 1) * W + rank) * 4
        tl.store(told.to(tl.pointer_type(tl.int32)), tokens, mask=there)
    k = tl.arange(0, KP)
    column = tl.arange(0, BLOCK)
    for item in range(program, tokens * W, programs):
        token = item // W
        target = _other_rank(item, token, rank, programs, W)
        chosen = tl.load(ids + token * K + k, mask=k < K, other=-1).to(tl.int32)
        weight = tl.load(weights + token * K + k, mask=k < K, other=0.0)
        owner, local = _place(chosen, SHARE, MORE, LINEAR, W)
        here = owner == target
        lane = tl.load(peers + target)
        row = (rank * M + token).to(tl.int64)
        wanted = tl.max(here.to(tl.int32)) > 0
        for first in tl.static_range(0, H, BLOCK):
            inside = first + column < H
            value = tl.load(x + tl.cast(token, tl.int64) * H + first + column, mask=inside)
            if wanted:
                tl.store(_at(lane + ROWS + row * (P * SIZE), dtype) + first + column, value, mask=inside)
        if wanted:
            tl.store(_at(lane + IDS, tl.int32) + row * K + k, tl.where(here, local, -1), mask=k < K)
            tl.store(_at(lane + WEIGHTS, tl.float32) + row * K + k, tl.where(here, weight, 0.0), mask=k < K)
    active = tl.maximum(tl.minimum(tokens * W, programs), 1)
    if program < active:
        _count(lanes + DISPATCHED + rank * 4, there, tl.where(program == 0, UNITS - active + 1, 1))
    if program == 0:
        _wait(base, status, lanes + FAULT, there, DISPATCHED, epoch * UNITS, dead, limit_ms, rank, STAGE, W)


@triton.jit(do_not_specialize=DYNAMIC)
def combine(
    y,  # [W · M, H], contiguous: the experts' rows
    ids,  # int32 or int64 [T, K], what was dispatched
    out,  # [T, H], contiguous
    peers,  # int64 [W], each rank's address of this lane
    base,  # this rank's
    status,  # address of an int32 in pinned host memory
    tokens,  # T
    rank,
    limit_ms,  # how long a wait may take
    W: tl.constexpr,
    WP: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    SHARE: tl.constexpr,
    MORE: tl.constexpr,
    LINEAR: tl.constexpr,
    UNITS: tl.constexpr,
    STAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    COMBINED: tl.constexpr,
    COUNTS: tl.constexpr,
    EPOCHS: tl.constexpr,
    FAULT: tl.constexpr,
    IDS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Send the experts' rows home, clear their ids, and sum what comes back in fp32, in the order of ranks."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    dtype: tl.constexpr = y.dtype.element_ty
    SIZE: tl.constexpr = y.dtype.element_ty.primitive_bitwidth // 8
    ranks = tl.arange(0, WP)
    there = ranks < W
    lanes = tl.load(peers + ranks, mask=there, other=0)
    epoch = tl.load(_at(base + EPOCHS, tl.int32) + 1)
    dead = (tl.load(_at(base + FAULT, tl.int32), volatile=True) != 0).to(tl.int32)
    counts = tl.load(_at(base + COUNTS, tl.int32) + (epoch & 1) * W + ranks, mask=there, other=0)
    if program == 0:
        tl.store(_at(base + EPOCHS, tl.int32), epoch)
        if dead != 0:  # another rank's fault: this one's host learns it here
            code = tl.load(_at(base + FAULT, tl.int32), volatile=True)
            tl.store(status.to(tl.pointer_type(tl.int32)), code)
    k = tl.arange(0, KP)
    column = tl.arange(0, BLOCK)
    items = tl.max(counts) * W
    for item in range(program, items, programs):
        token = item // W
        source = _other_rank(item, token, rank, programs, W)
        if token < tl.sum(tl.where(ranks == source, counts, 0)):
            row = (source * M + token).to(tl.int64)
            places = _at(base + IDS, tl.int32) + row * K + k
            chosen = tl.load(places, mask=k < K, other=-1)
            lane = tl.load(peers + source)
            wanted = tl.max(chosen) >= 0
            home = (rank * M + token).to(tl.int64)
            for first in tl.static_range(0, H, BLOCK):
                inside = first + column < H
                value = tl.load(y + row * H + first + column, mask=inside)
                if wanted:
                    tl.store(_at(lane + SUMS + home * (P * SIZE), dtype) + first + column, value, mask=inside)
            tl.debug_barrier()  # every warp has read the ids for itself: only now may one of them clear them
            tl.store(places, tl.full([KP], -1, tl.int32), mask=k < K)
    active = tl.maximum(tl.minimum(items, programs), 1)
    if program < active:
        _count(lanes + COMBINED + rank * 4, there, tl.where(program == 0, UNITS - active + 1, 1))
    if (program < tokens) | (program == 0):
        late = _wait(base, status, lanes + FAULT, there, COMBINED, epoch * UNITS, dead, limit_ms, rank, STAGE, W)
        # what a rank that never came would have sent is not a number, and must not look like one
        poison = tl.where(late != 0, float("nan"), 0.0)
        for token in range(program, tokens, programs):
            chosen = tl.load(ids + token * K + k, mask=k < K, other=-1).to(tl.int32)
            owner, _ = _place(chosen, SHARE, MORE, LINEAR, W)
            for first in tl.static_range(0, H, BLOCK):
                inside = first + column < H
                total = tl.zeros([BLOCK], tl.float32)
                for source in tl.static_range(W):
                    sent = tl.max((owner == source).to(tl.int32)) > 0
                    row = (source * M + token).to(tl.int64)
                    part = _at(base + SUMS + row * (P * SIZE), dtype) + first + column
                    total += tl.load(part, mask=inside & sent, other=0.0).to(tl.float32)
                tl.store(out + tl.cast(token, tl.int64) * H + first + column, (total + poison).to(dtype), mask=inside)
