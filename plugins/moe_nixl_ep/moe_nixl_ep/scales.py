"""Scales as experts read them: the library writes them column-major, for tensor-map loads that nobody here makes.

Shape letters: E_l local experts · C row capacity per local expert · G groups of columns in a row.
"""

from __future__ import annotations

import torch

_ROWS = 32
"""Rows of a program: at decoding an expert has a few, and most programs end at once."""


def row_major(scales: torch.Tensor, counts: torch.Tensor, groups: int) -> torch.Tensor:
    """The first `groups` scales of each row that is there, as a contiguous tensor.

    Args:
        scales: float32 `[E_l, C, G on the wire]`, the transposed view of a contiguous `[E_l, G on the wire, C]`.
        counts: int32 `[E_l]`; rows from there on are not read.
        groups: G, what a row has without the padding of the wire.

    Returns:
        float32 `[E_l, C, G]`; rows past the counts are uninitialised.
    """
    if scales.device.type != "cuda":
        return row_major_torch(scales, counts, groups)
    return _launch(scales, counts, groups)


def row_major_torch(scales: torch.Tensor, counts: torch.Tensor, groups: int) -> torch.Tensor:
    """The same in plain torch, on any device; it copies rows past the counts, too."""
    return scales[..., :groups].contiguous()


def _launch(scales: torch.Tensor, counts: torch.Tensor, groups: int) -> torch.Tensor:
    import triton  # noqa: PLC0415 - a CUDA build of torch brings it

    from moe_nixl_ep.kernels.transpose import transpose_scales  # noqa: PLC0415 - needs triton

    experts, capacity, wire = scales.shape
    assert scales.stride() == (wire * capacity, 1, capacity), f"strides {scales.stride()} of {tuple(scales.shape)}"
    target = torch.empty(experts, capacity, groups, dtype=scales.dtype, device=scales.device)
    transpose_scales[experts, triton.cdiv(capacity, _ROWS)](
        scales, target, counts, capacity, wire * capacity,
        GROUPS=groups, BLOCK_G=triton.next_power_of_2(groups), BLOCK_C=_ROWS, num_warps=4,
    )  # fmt: skip
    return target
