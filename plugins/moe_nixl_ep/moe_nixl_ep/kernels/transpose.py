"""The kernel behind `scales.row_major`."""

import triton
import triton.language as tl


@triton.jit
def transpose_scales(
    source,  # float32 [E_l, groups on the wire, C], contiguous
    target,  # float32 [E_l, C, GROUPS], contiguous
    counts,  # int32 [E_l], rows that are there
    capacity,  # C
    expert_stride,  # groups on the wire · C
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program for BLOCK_C rows of an expert; blocks past the count end at once."""
    expert = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_C
    count = tl.load(counts + expert)
    if first < count:
        row = first + tl.arange(0, BLOCK_C)
        group = tl.arange(0, BLOCK_G)
        here = (row < count)[:, None] & (group < GROUPS)[None, :]
        values = tl.load(source + expert * expert_stride + group[None, :] * capacity + row[:, None], mask=here)
        tl.store(target + (expert * capacity + row)[:, None] * GROUPS + group[None, :], values, mask=here)
