"""The only file that imports DeepGEMM: its grouped GEMMs, as sgl-deep-gemm 0.1.5 names them.

M rows · C row capacity · E_l local experts · N output columns · L length of the dot products. All compute
out = x @ w[expert].T on the current stream, compile a kernel when a shape is first met, and return nothing.

Scales: `x_scale` fp32 of 1×128 groups with a column's rows next to one another (which the library else arranges by a
kernel of its own), `w_scale` fp32 `[E_l, N / 128, L / 128]`, contiguous.
"""

from __future__ import annotations

import deep_gemm
import torch

from moe_core.errors import PluginError

BLOCK_ROWS = 128
"""What our rows are aligned to."""


def check_alignment() -> None:
    """
    Raises:
        PluginError: this library wants the rows of different experts further apart than we put them.
    """
    wanted = int(deep_gemm.get_mk_alignment_for_contiguous_layout())
    if BLOCK_ROWS % wanted:
        raise PluginError(
            f"DeepGEMM {deep_gemm.__version__} aligns experts to {wanted} rows, and moe-experts-deepgemm to "
            f"{BLOCK_ROWS}; leave set_mk_alignment_for_contiguous_layout at {BLOCK_ROWS}"
        )


def contiguous_fp8(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, out: torch.Tensor,
    ends: torch.Tensor,
) -> None:  # fmt: skip
    """x e4m3 `[M, L]`, w e4m3 `[E_l, N, L]` → out bf16 `[M, N]`.

    ends int32 `[E_l]`: where each expert's rows end; they begin at the first whole block behind the ones before. Told
    so, the library leaves out the empty blocks at the end of M: up to a fifth of the time where experts are many.
    """
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        (x, x_scale), (w, w_scale), out, ends, disable_ue8m0_cast=True, use_psum_layout=True
    )


def masked_fp8(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, out: torch.Tensor,
    tokens_per_expert: torch.Tensor, expected_rows: int,
) -> None:  # fmt: skip
    """x e4m3 `[E_l, C, L]`, w e4m3 `[E_l, N, L]` → the counted rows of out bf16 `[E_l, C, N]`; C in whole blocks.

    `expected_rows` of an expert only tunes the launch.
    """
    deep_gemm.fp8_m_grouped_gemm_nt_masked(
        (x, x_scale), (w, w_scale), out, tokens_per_expert, expected_rows, disable_ue8m0_cast=True
    )


def contiguous_bf16(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, expert_of_row: torch.Tensor) -> None:
    """x bf16 `[M, L]`, w bf16 `[E_l, N, L]`, or a view on such that is stored `[E_l, L, N]` → out bf16 `[M, N]`.

    expert_of_row int32 `[M]`, -1: the row is empty.
    """
    if w.stride(2) == 1:
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(x, w, out, expert_of_row)
    else:
        deep_gemm.m_grouped_bf16_gemm_nn_contiguous(x, w.transpose(1, 2), out, expert_of_row)


def masked_bf16(
    x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, tokens_per_expert: torch.Tensor, expected_rows: int
) -> None:
    """x bf16 `[E_l, C, L]`, w bf16 `[E_l, N, L]` → the counted rows of out bf16 `[E_l, C, N]`."""
    deep_gemm.m_grouped_bf16_gemm_nt_masked(x, w, out, tokens_per_expert, expected_rows)
