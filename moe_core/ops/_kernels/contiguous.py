"""Brings rows to where grouped-GEMM libraries want them, and applies the activation there; both may quantize to fp8.

T tokens · H hidden · I intermediate · E_l local experts · C row capacity · K top-k; slot s = t * K + k.

Rows stand in blocks of BM that belong to one expert each. STANDARD: an expert's blocks follow the one's before it, and
rows that fill its last one up have expert -1. BATCHED: expert e has the rows from e * RB on, of which the first
tokens_per_expert[e] count. Scales stand transposed, `[RB blocks, G, RB]` with G groups of 128 columns, as tensor-map
loads of a column want.
"""

import triton
import triton.language as tl

from moe_core.ops._kernels.activation import activate
from moe_core.ops._kernels.fp8_quantize import magnitude, scale_of, to_e4m3


@triton.jit
def _quantize(x, POWER_OF_TWO: tl.constexpr):
    """`[R, G, 128]` float32 → e4m3 values and scales `[R, G]`."""
    scale = scale_of(tl.max(magnitude(x), 2), POWER_OF_TWO)
    return to_e4m3(x, scale[:, :, None], tl.div_rn(1.0, scale)[:, :, None], False), scale


@triton.jit
def _store_scale(pointer, scale, row, group, ok, G: tl.constexpr, rows_per_block):
    at = (row // rows_per_block).to(tl.int64) * G * rows_per_block + row % rows_per_block
    tl.store(pointer + at[:, None] + group[None, :].to(tl.int64) * rows_per_block, scale, mask=ok)


@triton.jit(do_not_specialize=["num_blocks"])
def tight_blocks_kernel(
    row_end, block_expert, block_row, ends, num_blocks,
    E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """From where each expert's rows end without gaps: its blocks, one behind the other, and where its rows end there.

    block_expert: -1 for the blocks that are left over; block_row: a block's first row among the rows without gaps.
    """
    e = tl.arange(0, EP)
    start = tl.load(row_end + e - 1, mask=(e > 0) & (e < E), other=0)
    count = tl.load(row_end + e, mask=e < E, other=0) - start
    count = tl.where(e < E, count, 0)
    blocks = tl.cdiv(count, BM)
    first = tl.cumsum(blocks, 0) - blocks
    tl.store(ends + e, first * BM + count, mask=e < E)
    step = tl.arange(0, 16)
    for i in range(0, tl.max(blocks, 0), 16):
        j = i + step[None, :]
        at = first[:, None] + j
        mine = j < blocks[:, None]
        tl.store(block_expert + at, e[:, None] + tl.zeros_like(j), mask=mine)
        tl.store(block_row + at, start[:, None] + j * BM, mask=mine)
    left = tl.arange(0, 1024)
    for i in range(tl.sum(blocks, 0), num_blocks, 1024):
        tl.store(block_expert + i + left, -1, mask=i + left < num_blocks)


@triton.jit
def _rows_of_block(block_expert, block_row, row_end, row, block, BM: tl.constexpr):
    """A block's expert, its rows among those without gaps, and which of them there are."""
    expert = tl.load(block_expert + block)
    source = tl.load(block_row + block, mask=expert >= 0, other=0) + row % BM
    return expert, source, (source < tl.load(row_end + expert, mask=expert >= 0, other=0)) & (expert >= 0)


@triton.jit(do_not_specialize=["rows_per_block", "capacity"])
def gather_rows_kernel(
    x, x_scale, tokens_per_expert, slot_of_row, row_end, block_expert, block_row,
    rows, rows_scale, expert_of_row, row_of_slot, rows_per_block, capacity,
    stride_x: tl.constexpr, stride_x_expert: tl.constexpr, stride_scale: tl.constexpr,
    stride_scale_expert: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, MODE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """rows[r] = x of the token whose choice r is; also which expert each row has, and which row each slot.

    MODE: "copy", "quantize", or "carry" for an x that was quantized before it came, with its scales `[…, G]`.
    """
    G: tl.constexpr = H // 128
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    if tokens_per_expert is None:
        block = tl.program_id(0) * BR // BM
        expert, source, used = _rows_of_block(block_expert, block_row, row_end, row, block, BM)
        slot = tl.load(slot_of_row + source, mask=used, other=0)
        if tl.program_id(1) == 0:
            tl.store(expert_of_row + row, tl.where(used, expert, -1))
            tl.store(row_of_slot + slot, row, mask=used)
        index = (slot // K).to(tl.int64)
        at, scale_at = index * stride_x, index * stride_scale
    else:
        expert = tl.program_id(0) * BR // rows_per_block
        index = row % rows_per_block
        used = index < tl.minimum(tl.load(tokens_per_expert + expert), capacity)
        at = expert.to(tl.int64) * stride_x_expert + index.to(tl.int64) * stride_x
        scale_at = expert.to(tl.int64) * stride_scale_expert + index.to(tl.int64) * stride_scale
    ok = used[:, None] & (column < H)[None, :]
    values = tl.load(x + at[:, None] + column[None, :], mask=ok, other=0.0)
    target = row.to(tl.int64)[:, None] * H + column[None, :]
    if MODE == "copy":
        tl.store(rows + target, values, mask=ok)
    else:
        group = tl.program_id(1) * (BC // 128) + tl.arange(0, BC // 128)
        ok_scale = used[:, None] & (group < G)[None, :]
        if MODE == "carry":
            tl.store(rows + target, values, mask=ok)
            scale = tl.load(x_scale + scale_at[:, None] + group[None, :], mask=ok_scale, other=0.0)
        else:
            q, scale = _quantize(tl.reshape(values.to(tl.float32), (BR, BC // 128, 128)), POWER_OF_TWO)
            tl.store(rows + target, tl.reshape(q, (BR, BC)), mask=ok)
        _store_scale(rows_scale, scale, row, group, ok_scale, G, rows_per_block)


@triton.jit(do_not_specialize=["rows_per_block"])
def activate_rows_kernel(
    h, tokens_per_expert, expert_of_row, act, act_scale, rows_per_block,
    I: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, UP_FIRST: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, QUANTIZE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """act[r] = activation(h[r]) for the rows that have an expert; h `[…, 2I]` (without a gate `[…, I]`)."""
    G: tl.constexpr = I // 128
    WIDTH: tl.constexpr = 2 * I if GATED else I
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    if tokens_per_expert is None:
        used = tl.load(expert_of_row + row) >= 0
    else:
        used = row % rows_per_block < tl.load(tokens_per_expert + tl.program_id(0) * BR // rows_per_block)
    ok = used[:, None] & (column < I)[None, :]
    first = h + row.to(tl.int64)[:, None] * WIDTH
    if INTERLEAVED:
        gate = tl.load(first + 2 * column[None, :], mask=ok, other=0.0).to(tl.float32)
        up = tl.load(first + 2 * column[None, :] + 1, mask=ok, other=0.0).to(tl.float32)
    else:
        gate = tl.load(first + column[None, :] + (I if UP_FIRST else 0), mask=ok, other=0.0).to(tl.float32)
        up = gate
        if GATED:
            up = tl.load(first + column[None, :] + (0 if UP_FIRST else I), mask=ok, other=0.0).to(tl.float32)
    # A linear layer's input has the model dtype, and that is what a format quantizes.
    values = activate(gate, up, ACT, GATED, ALPHA, LIMIT).to(h.dtype.element_ty)
    target = row.to(tl.int64)[:, None] * I + column[None, :]
    if QUANTIZE:
        q, scale = _quantize(tl.reshape(values.to(tl.float32), (BR, BC // 128, 128)), POWER_OF_TWO)
        tl.store(act + target, tl.reshape(q, (BR, BC)), mask=ok)
        group = tl.program_id(1) * (BC // 128) + tl.arange(0, BC // 128)
        _store_scale(act_scale, scale, row, group, used[:, None] & (group < G)[None, :], G, rows_per_block)
    else:
        tl.store(act + target, values, mask=ok)
