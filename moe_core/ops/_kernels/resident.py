"""The down GEMM where I is short: a program keeps its [BN, I] block of weights and walks its expert's rows.

With few steps per dot product a tile's epilogue is as long as its product; here the weights are read once per program
and the next rows arrive meanwhile. H hidden · I intermediate (padded to I_P, a power of 2) · E_l local experts.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def resident_down_kernel(
    act_map, w2_map, bias2, y, row_end,
    H: tl.constexpr, IP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[r] = act[r] @ w2[e].T + bias2[e] for every SPLITth tile of BM rows of one expert and BN columns."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    blocks: tl.constexpr = (H + BN - 1) // BN
    pid = tl.program_id(0)
    block = pid % blocks
    expert = pid // blocks // SPLIT
    end = tl.load(row_end + expert)
    start = tl.load(row_end + expert - 1, mask=expert > 0, other=0) + (pid // blocks % SPLIT) * BM
    if start < end:
        w = tl.reshape(w2_map.load([expert, block * BN, 0]), (BN, IP)).T
        n = block * BN + tl.arange(0, BN)
        b = tl.zeros((BN,), tl.float32)
        if bias2 is not None:
            b += tl.load(bias2 + expert.to(tl.int64) * H + n, mask=n < H, other=0).to(tl.float32)
        for row_0 in tl.range(start, end, SPLIT * BM, num_stages=STAGES):
            acc = tl.dot(act_map.load([row_0, 0]), w)
            if bias2 is not None:
                acc += b[None, :]
            row = row_0 + tl.arange(0, BM)
            y_ptr = y + row.to(tl.int64)[:, None] * H + n[None, :]
            if H % BN:
                tl.store(y_ptr, acc.to(y.dtype.element_ty), mask=(row < end)[:, None] & (n < H)[None, :])
            else:
                tl.store(y_ptr, acc.to(y.dtype.element_ty), mask=(row < end)[:, None])
