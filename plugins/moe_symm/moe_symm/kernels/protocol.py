"""What all kernels of the protocol do alike. `layout.py` has the protocol, and pure twins of the index functions.

Shape letters: T tokens on this rank · M the largest T · K top-k · W ranks.

Stores to other ranks are plain. What makes them visible is one release per program: all its threads meet, then W of
them add to the W counters with release semantics at system scope. The reader's acquire loads poll its own memory.

Every kernel may start while the one before it ends (programmatic dependent launch), and waits for that end before it
reads or writes anything but constants. Only then does it let the next one start: so one kernel at most stands by, and
a stream can't fill the device with programs that wait.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

DYNAMIC = ["base", "status", "tokens", "rank", "limit_ms"]
"""Not specialised: their values differ by rank and by step, and no step may compile."""


@triton.jit
def at(address, dtype: tl.constexpr):
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def acquire(address):
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.b32 $0, [$1];", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def count(counters, there, amount):
    """All this program's stores are visible to whoever sees the count."""
    tl.debug_barrier()
    tl.atomic_add(counters.to(tl.pointer_type(tl.int32)), amount, mask=there, sem="release", scope="sys")


@triton.jit
def _now():
    """Nanoseconds; one value for all threads of a warp."""
    return tl.max(tl.zeros([32], tl.int64) + globaltimer())


@triton.jit
def wait(base, status, faults, ranks, counters, target, dead, limit_ms, rank, STAGE: tl.constexpr, W: tl.constexpr):
    """Until every rank has counted up to `target`; 1 if one did not in time, and then all ranks are told.

    All counters are polled at once: one after the other, each would cost its latency. A counter for every thread of a
    warp, some of them twice, so that the smallest is one value for the warp, which must leave the loop together.
    """
    there = ranks < W
    source = tl.arange(0, 32) % W
    address = base + counters + source * 4
    missing = tl.min(acquire(address) - target)
    looks = tl.where(dead == 0, 1 << 14, 0)
    while (missing < 0) & (looks > 0):
        missing = tl.min(acquire(address) - target)
        looks -= 1
    if (missing < 0) & (dead == 0):  # after some milliseconds, by the clock: each look takes longer with it
        end = _now() + limit_ms.to(tl.int64) * 1000000
        while (missing < 0) & (_now() < end):
            missing = tl.min(acquire(address) - target)
    late = tl.where(missing < 0, 1, dead)
    if (missing < 0) & (dead == 0):
        behind = tl.max(tl.where(acquire(address) - target < 0, source, -1))
        code = (STAGE << 16) | (rank << 8) | tl.maximum(behind, 0)
        tl.store(faults.to(tl.pointer_type(tl.int32)), code, mask=there)
        tl.store(status.to(tl.pointer_type(tl.int32)), code)
    tl.debug_barrier()
    return late


@triton.jit
def lost(base, FAULT: tl.constexpr):
    """1: some rank has waited in vain, in this lane."""
    return (tl.load(at(base + FAULT, tl.int32), volatile=True) != 0).to(tl.int32)


@triton.jit
def counts_of(base, epoch, ranks, COUNTS: tl.constexpr, W: tl.constexpr):
    """How many tokens each source has. Both parities are read, so as not to wait for the epoch."""
    there = ranks < W
    even = tl.load(at(base + COUNTS, tl.int32) + ranks, mask=there, other=0)
    odd = tl.load(at(base + COUNTS, tl.int32) + W + ranks, mask=there, other=0)
    return tl.where((epoch & 1) == 0, even, odd)


@triton.jit
def row_of(token, source, W: tl.constexpr):
    """Where a rank finds what a source has sent of a token."""
    return token * W + source


@triton.jit
def of_rank(values, ranks, rank):
    return tl.sum(tl.where(ranks == rank, values, 0))


@triton.jit
def other_rank(item, token, rank, programs, W: tl.constexpr):
    return (rank + 1 + item % W + token * W // programs) % W


@triton.jit
def place(expert, SHARE: tl.constexpr, MORE: tl.constexpr, LINEAR: tl.constexpr, W: tl.constexpr):
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
