"""What the NVFP4 products want to find: each expert's slots in a list, and columns in the order of the lanes.

T tokens · H hidden · E_l local experts · K top-k; slot s = t * K + k.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["num_slots"])
def nvfp4_list_kernel(
    ids, num_rows, slot_of_row, row_end, num_slots, K: tl.constexpr, SLOTS: tl.constexpr, PDL: tl.constexpr
):
    """The slots of program 0's expert, in order, behind those of lower experts; and where they end. For few slots."""
    expert = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.arange(0, SLOTS)
    if num_rows is not None:
        num_slots = tl.minimum(num_slots, tl.load(num_rows) * K)
    chosen = tl.load(ids + slot, mask=slot < num_slots, other=-1).to(tl.int32)
    hit = (chosen == expert).to(tl.int32)
    row_0 = tl.sum(((chosen >= 0) & (chosen < expert)).to(tl.int32), 0)
    tl.store(slot_of_row + row_0 + tl.cumsum(hit, 0) - 1, slot, mask=hit > 0)
    tl.store(row_end + expert, row_0 + tl.sum(hit, 0))


@triton.jit
def _permute_rows(x, out, row, ok, column, stride_x: tl.constexpr, stride_out: tl.constexpr, H: tl.constexpr):
    """out[r, 64 c + 16 j + 8 p + 2 q + b] = x[r, 64 c + 16 q + 4 j + 2 p + b] for some rows and columns."""
    BT: tl.constexpr = row.shape[0]
    BH: tl.constexpr = column.shape[0]
    ok = ok[:, None] & (column < H)[None, :]
    values = tl.load(x + row.to(tl.int64)[:, None] * stride_x + column[None, :], mask=ok)
    values = tl.permute(tl.reshape(values, (BT, BH // 64, 4, 4, 2, 2)), (0, 1, 3, 4, 2, 5))
    tl.store(out + row.to(tl.int64)[:, None] * stride_out + column[None, :], tl.reshape(values, (BT, BH)), mask=ok)


@triton.jit(do_not_specialize=["num_tokens"])
def nvfp4_permute_kernel(
    x, out, num_tokens, stride_x: tl.constexpr, H: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr
):
    """x `[T, H]` with columns as the lanes want them; a program has BT tokens and BH columns."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BH + tl.arange(0, BH)
    _permute_rows(x, out, token, token < num_tokens, column, stride_x, H, H)


@triton.jit
def nvfp4_permute_batched_kernel(
    x, row_end, tile_expert, tile_row, num_tiles, out, stride_x: tl.constexpr, stride_out: tl.constexpr,
    shift_x: tl.constexpr, shift_out: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
    BH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same for the rows of listed tiles of BM rows; programs walk them. The shifts are those of `grouped.py`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    columns = tl.cdiv(H, BH)
    parts = BM // BT * columns
    for i in range(tl.program_id(0), tl.load(num_tiles) * parts, tl.num_programs(0)):
        expert = tl.load(tile_expert + i // parts).to(tl.int64)
        row = tl.load(tile_row + i // parts) + i % parts // columns * BT + tl.arange(0, BT)
        column = i % columns * BH + tl.arange(0, BH)
        ok = row < tl.load(row_end + expert)
        _permute_rows(x + expert * shift_x, out + expert * shift_out, row, ok, column, stride_x, stride_out, H)
