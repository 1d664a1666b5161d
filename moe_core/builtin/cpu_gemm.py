"""Skinny GEMMs on a CPU: every expert's few rows against its weight, each by the library call that is fastest for it.

Shape letters: S rows, sorted by expert · M rows of one expert · N out features · K in features (not top-k, in this
file) · E_l local experts.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any

import torch

SMALL_WEIGHT = 1 << 17
"""Elements. A weight up to this stays in a core's cache, and a call's fixed cost decides: `mm` 2 us, oneDNN 16."""


class Gemm(enum.Enum):
    """A way to compute `x [M, K] @ w [N, K]ᵀ`."""

    ROWS = "rows"
    """`mm(x, wᵀ)`, straight into the result."""
    COLUMNS = "columns"
    """`mm(w, xᵀ)`, which leaves the result with columns of M, and a copy that turns it round."""
    ONEDNN = "onednn"
    """oneDNN's inner product, which `torch.mm` uses for bf16 but not for fp32."""


@functools.lru_cache(maxsize=4096)
def choose_gemm(dtype: torch.dtype, rows: int, n: int, k: int, row_major: bool, onednn: bool) -> Gemm:
    """The fastest call for this shape; a pure function, so that it can be tested.

    Measured on 2 cores of an AMD EPYC (AVX-512, bf16 instructions) with weights that aren't in the cache, `[N, K]` =
    `[1536, 2048]` and `[2048, 768]`. fp32, GB/s of weight read for M = 1, 2, 4, 16, then GFLOP/s for M = 64:

        ROWS 18, 11, 11, 9, 137 · COLUMNS 18, 26 to 33, 15 to 28, 12, 160 · ONEDNN 28 to 33, 20, 18, 12, 168

    bf16: `mm` is oneDNN already; with the weight as left operand it is 10 % faster for 32 ≤ M ≤ 128, less than the
    turning round costs.

    Args:
        dtype: of both operands.
        rows: M.
        n, k: N and K.
        row_major: `w` has unit stride in K. A transposed weight is only ever given to `mm`.
        onednn: `onednn_linear()` found it.
    """
    if dtype is not torch.float32 or not row_major or n * k <= SMALL_WEIGHT:
        return Gemm.ROWS
    if rows == 2 or (2 < rows <= 6 and n > k):
        return Gemm.COLUMNS  # MKL has a kernel for few columns, oneDNN has none for few rows of a wide result
    if onednn:
        return Gemm.ONEDNN
    return Gemm.COLUMNS if rows <= 4 or 16 <= rows <= 64 else Gemm.ROWS


@functools.cache
def onednn_linear() -> Callable[..., torch.Tensor] | None:
    """oneDNN's `(x [M, K], w [N, K], None, "none", [], "") -> [M, N]` for fp32; None where this torch lacks it.

    It is the operator that torch's own compiler emits for a linear layer; there is no public name for it, hence the
    trial run.
    """
    packet: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if packet is None or not torch.backends.mkldnn.is_available():
        return None
    x, w = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        operator: Callable[..., torch.Tensor] = packet.default  # the overload: half the call overhead of the packet
        right = torch.equal(operator(x, w, None, "none", [], ""), x @ w.t())
    except (AttributeError, RuntimeError, TypeError):  # another signature, or built without oneDNN
        return None
    return operator if right else None


@functools.cache
def native_dtypes() -> frozenset[torch.dtype]:
    """Dtypes that this CPU multiplies fast. The others are converted to fp32, expert by expert.

    Without instructions for a 16-bit format, torch's fallback runs at a hundredth of the fp32 speed.
    """
    native = {torch.float32}
    for dtype, question in (
        (torch.bfloat16, "_is_mkldnn_bf16_supported"),
        (torch.float16, "_is_mkldnn_fp16_supported"),
    ):
        answer: Any = getattr(torch.ops.mkldnn, question, None)
        if answer is not None and torch.backends.mkldnn.is_available() and answer():
            native.add(dtype)
    return frozenset(native)


def linear(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
    """`out = x @ wᵀ`.

    Args:
        x: `[M, K]`, any strides.
        w: `[N, K]`, any strides.
        out: `[M, N]`, contiguous.
        scratch: 1-D, at least M · N elements, same dtype.
    """
    rows, k = x.shape
    n = w.shape[0]
    operator = onednn_linear() if x.dtype is torch.float32 else None
    kind = choose_gemm(x.dtype, rows, n, k, w.stride(1) == 1, operator is not None)
    if kind is Gemm.COLUMNS:
        out.copy_(torch.mm(w, x.t(), out=scratch.as_strided((n, rows), (rows, 1))).t())
    elif kind is Gemm.ONEDNN and operator is not None:
        out.copy_(operator(x, w, None, "none", [], ""))
    else:
        torch.mm(x, w.t(), out=out)


def grouped_linear(
    x: torch.Tensor,
    sizes: list[int],
    experts: list[int],
    weight: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Group g's rows of `x` times the weight of expert `experts[g]`.

    Args:
        x: `[S, K]`, rows of group 0, then of group 1, ….
        sizes: rows of each group, all > 0, S in sum.
        experts: one per group.
        weight: `[E_l, N, K]`, any strides, dtype of `x`.
        out: `[S, N]`, contiguous.
        scratch: 1-D, at least as many elements as the largest group's part of `out`.
    """
    parts = zip(torch.split(x, sizes), torch.split(out, sizes), experts, strict=True)
    if weight.dtype is torch.float32 and weight.stride(2) == 1:
        for x_g, out_g, expert in parts:
            linear(x_g, weight[expert], out_g, scratch)
        return
    # One way for all groups: the loop is bare, because at a few rows a group every µs of it is 1 % of the time.
    transposed, mm = weight.transpose(1, 2), torch.mm
    for x_g, out_g, expert in parts:
        mm(x_g, transposed[expert], out=out_g)
