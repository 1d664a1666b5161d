"""Results back to the ranks of their tokens, and summed there.

Shape letters: T tokens on this rank · M the largest T · H hidden · P pitch of a row in elements · E_l local experts ·
C = W · M row capacity of an expert · K top-k · W ranks.

Three forms, by what the experts give and what travels:

    standard   y [W · M, H], weighted and summed by the experts: one row to each source rank
    batched    y [E_l, C, H]: weighted and summed here, over this rank's choices, in the order of K: one row as well
    exact      y [E_l, C, H]: a row for each choice, as it is; weighted and summed at the source, in the order of K

With many tokens the rows of the standard form stay where the experts wrote them, in `sums`: the ranks of their tokens
fetch them. The link is as busy, but no row is stored on arrival and read again.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_symm.kernels.protocol import DYNAMIC, at, count, counts_of, lost, of_rank, other_rank, place, row_of, wait


@triton.jit
def _send_summed(y, ids, home, H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr):
    """Standard: the row at `y`, if it stands for any choice; then its ids are cleared."""
    k = tl.arange(0, KP)
    column = tl.arange(0, BLOCK)
    wanted = tl.max(tl.load(ids + k, mask=k < K, other=-1)) >= 0
    for first in tl.static_range(0, H, BLOCK):
        inside = first + column < H
        value = tl.load(y + first + column, mask=inside)
        if wanted:
            tl.store(home + first + column, value, mask=inside)
    tl.debug_barrier()  # every warp has read the ids for itself: only now may one of them clear them


@triton.jit
def _send_weighted(y, places, weights, home, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Batched: the sum of the rows at `places` of y, fused multiply-adds in the order of K, rounded once."""
    column = tl.arange(0, BLOCK)
    for first in tl.static_range(0, H, BLOCK):
        inside = first + column < H
        total = tl.zeros([BLOCK], tl.float32)
        most = -1
        for choice in tl.static_range(K):
            row = tl.load(places + choice)
            weight = tl.load(weights + choice)
            value = tl.load(y + row.to(tl.int64) * H + first + column, mask=inside & (row >= 0), other=0.0)
            total = tl.where(row >= 0, tl.fma(value.to(tl.float32), weight, total), total)
            most = tl.maximum(most, row)
        if most >= 0:
            tl.store(home + first + column, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _send_choices(y, places, home, H: tl.constexpr, P: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Exact: each row as it is, to `home` + its choice."""
    column = tl.arange(0, BLOCK)
    for choice in tl.static_range(K):
        row = tl.load(places + choice)
        for first in tl.static_range(0, H, BLOCK):
            inside = (first + column < H) & (row >= 0)
            value = tl.load(y + row.to(tl.int64) * H + first + column, mask=inside)
            tl.store(home + choice * P + first + column, value, mask=inside)


@triton.jit
def _clear(ids, used):
    """Set the ids of all rows that have come to -1; all programs together."""
    WORDS: tl.constexpr = 1024
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    for first in range(0, used, tl.num_programs(0) * WORDS):
        tl.store(ids + first + word, tl.full([WORDS], -1, tl.int32), mask=first + word < used)


@triton.jit
def _sum_over_ranks(
    base, peers, rank, chosen, token, column, dtype: tl.constexpr, M: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    SHARE: tl.constexpr, MORE: tl.constexpr, LINEAR: tl.constexpr, W: tl.constexpr, FETCHES: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Of a token's rows, in fp32: those that the ranks of its `chosen` experts have sent, or have ready."""
    owner, _ = place(chosen, SHARE, MORE, LINEAR, W)
    total = tl.zeros(column.shape, tl.float32)
    for source in tl.static_range(W):
        there = tl.max((owner == source).to(tl.int32)) > 0
        if FETCHES:
            row = at(tl.load(peers + source) + SUMS, dtype) + row_of(token, rank, W).to(tl.int64) * P
        else:
            row = at(base + SUMS, dtype) + (source * M + token).to(tl.int64) * P
        total += tl.load(row + column, mask=(column < H) & there, other=0.0).to(tl.float32)
    return total


@triton.jit
def _sum_over_choices(
    base, chosen, weights, token, column, dtype: tl.constexpr, H: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Of a token's rows, weighted, in fp32 and in the order of K."""
    k = tl.arange(0, KP)
    rows = at(base + SUMS, dtype) + (token * K).to(tl.int64) * P
    total = tl.zeros(column.shape, tl.float32)
    for choice in tl.static_range(K):
        there = tl.max(tl.where(k == choice, chosen, -1)) >= 0
        value = tl.load(rows + choice * P + column, mask=(column < H) & there, other=0.0).to(tl.float32)
        total = tl.where(there, tl.fma(value, tl.load(weights + token * K + choice), total), total)
    return total


@triton.jit(do_not_specialize=DYNAMIC)
def combine(
    y,  # the experts' rows, contiguous
    ids,  # int32 or int64 [T, K], what was dispatched
    weights,  # float32 [T, K]
    out,  # [T, H], contiguous
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
    FORM: tl.constexpr,
    FETCHES: tl.constexpr,  # rows are not sent home, but read from there
    SENDS: tl.constexpr,  # the first half: send rows home, clear their ids, count
    COLLECTS: tl.constexpr,  # the second half: wait, and sum in fp32
    COMBINED: tl.constexpr,  # offsets in a lane
    COUNTS: tl.constexpr,
    EPOCHS: tl.constexpr,
    FAULT: tl.constexpr,
    IDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PLACES: tl.constexpr,
    SUMS: tl.constexpr,
):
    """A program for each received row in turn; then a program for each token of this rank and BLOCK columns."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    dtype: tl.constexpr = out.dtype.element_ty
    ranks = tl.arange(0, WP)
    there = ranks < W
    k = tl.arange(0, KP)
    lanes = tl.load(peers + ranks, mask=there, other=0)
    gdc_wait()
    gdc_launch_dependents()
    epoch = tl.load(at(base + EPOCHS, tl.int32) + 1)
    dead = lost(base, FAULT)
    if SENDS:
        counts = counts_of(base, epoch, ranks, COUNTS, W)
        if FETCHES:
            _clear(at(base + IDS, tl.int32), tl.max(counts) * (W * K))
            active = programs
        else:
            items = tl.max(counts) * W
            for item in range(program, items, programs):
                token = item // W
                source = other_rank(item, token, rank, programs, W)
                if token < of_rank(counts, ranks, source):
                    row = row_of(token, source, W).to(tl.int64)
                    received = at(base + IDS, tl.int32) + row * K
                    places = at(base + PLACES, tl.int32) + row * K
                    sums = at(tl.load(peers + source) + SUMS, dtype)
                    home = (rank * M + token).to(tl.int64)
                    if FORM == "standard":
                        _send_summed(y + row * H, received, sums + home * P, H, K, KP, BLOCK)
                    elif FORM == "batched":
                        sent = at(base + WEIGHTS, tl.float32) + row * K
                        _send_weighted(y, places, sent, sums + home * P, H, K, BLOCK)
                    else:
                        _send_choices(y, places, sums + tl.cast(token, tl.int64) * (K * P), H, P, K, BLOCK)
                    tl.store(received + k, tl.full([KP], -1, tl.int32), mask=k < K)
            active = tl.maximum(tl.minimum(items, programs), 1)
        if program < active:
            count(lanes + COMBINED + rank * 4, there, tl.where(program == 0, UNITS - active + 1, 1))
    if COLLECTS:
        if program == 0:
            tl.store(at(base + EPOCHS, tl.int32), epoch)
            if dead != 0:  # another rank's fault: this one's host learns it here
                code = tl.load(at(base + FAULT, tl.int32), volatile=True)
                tl.store(status.to(tl.pointer_type(tl.int32)), code)
        BLOCKS: tl.constexpr = (H + BLOCK - 1) // BLOCK
        items = tokens * BLOCKS
        if (program < items) | (program == 0):
            chosen = tl.load(ids + program // BLOCKS * K + k, mask=(k < K) & (program < items), other=-1).to(tl.int32)
            late = wait(base, status, lanes + FAULT, ranks, COMBINED, epoch * UNITS, dead, limit_ms, rank, STAGE, W)
            # what a rank that never came would have sent is not a number, and must not look like one
            poison = tl.where(late != 0, float("nan"), 0.0)
            for item in range(program, items, programs):
                token = item // BLOCKS
                column = item % BLOCKS * BLOCK + tl.arange(0, BLOCK)
                if FORM == "exact":
                    total = _sum_over_choices(base, chosen, weights, token, column, dtype, H, P, K, KP, SUMS)
                else:
                    total = _sum_over_ranks(
                        base, peers, rank, chosen, token, column, dtype, M, H, P, SHARE, MORE, LINEAR, W, FETCHES, SUMS
                    )  # fmt: skip
                tl.store(out + tl.cast(token, tl.int64) * H + column, (total + poison).to(dtype), mask=column < H)
                ahead = item + programs
                next_ids = ids + ahead // BLOCKS * K + k
                chosen = tl.load(next_ids, mask=(k < K) & (ahead < items), other=-1).to(tl.int32)
