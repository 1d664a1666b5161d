"""A stand-in for DeepGEMM, not the library: the signatures of sgl-deep-gemm 0.1.5, and what they compute, in torch.

What the library leaves open is filled with NaN: rows without an expert, and (masked) nothing but whole blocks of 128
rows is written, so the last block of an expert reaches into what follows where the capacity is no multiple of 128.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch

_BLOCK = 128


def _values(operand: Any, rows: int) -> torch.Tensor:
    """A tensor, or a pair (e4m3, scales of groups of `rows` × 128), as fp32."""
    if isinstance(operand, torch.Tensor):
        return operand.float()
    q, scale = operand
    assert q.dtype is torch.float8_e4m3fn
    assert scale.dtype is torch.float32
    if rows == 1:
        assert scale.stride(-2) == 1, "a column's scales stand next to one another"
    return q.float() * scale.repeat_interleave(rows, -2).repeat_interleave(_BLOCK, -1)


def _contiguous(a: Any, b: Any, d: torch.Tensor, grouped_layout: torch.Tensor) -> None:
    x, w = _values(a, 1), _values(b, _BLOCK)
    assert grouped_layout.dtype is torch.int32
    assert x.shape[0] == d.shape[0] == grouped_layout.shape[0]
    d.fill_(torch.nan)
    for first in range(0, x.shape[0], _BLOCK):
        experts = grouped_layout[first : first + _BLOCK]
        used = experts[experts >= 0].unique().tolist()
        assert len(used) <= 1, "a block of 128 rows belongs to one expert"
        if used:
            d[first : first + _BLOCK] = (x[first : first + _BLOCK] @ w[used[0]].T).to(d.dtype)


def m_grouped_fp8_gemm_nt_contiguous(
    a, b, d, grouped_layout, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="nk", disable_ue8m0_cast=False,
    use_psum_layout=False, ensure_zero_padding=True, expected_m_for_psum_layout=None,
):  # fmt: skip
    assert disable_ue8m0_cast, "the scales are fp32"
    if use_psum_layout:
        ends, grouped_layout = grouped_layout, torch.full((d.shape[0],), -1, dtype=torch.int32)
        first = 0
        for expert, end in enumerate(ends.tolist()):
            grouped_layout[first:end] = expert
            first = -(-end // _BLOCK) * _BLOCK
    _contiguous(a, b, d, grouped_layout)


def m_grouped_bf16_gemm_nt_contiguous(
    a, b, d, grouped_layout, compiled_dims="nk", use_psum_layout=False, ensure_zero_padding=True,
    expected_m_for_psum_layout=None,
):  # fmt: skip
    _contiguous(a, b, d, grouped_layout)


def m_grouped_bf16_gemm_nn_contiguous(
    a, b, d, grouped_layout, compiled_dims="nk", use_psum_layout=False, ensure_zero_padding=True
):
    assert b.is_contiguous()
    _contiguous(a, b.transpose(1, 2), d, grouped_layout)


def _masked(a: Any, b: Any, d: torch.Tensor, masked_m: torch.Tensor, expected_m: int) -> None:
    x, w = _values(a, 1), _values(b, _BLOCK)
    assert masked_m.dtype is torch.int32
    assert expected_m > 0
    assert d.is_contiguous()
    flat, capacity = d.view(-1, d.shape[2]), d.shape[1]
    for expert, count in enumerate(masked_m.tolist()):
        end = expert * capacity + -(-count // _BLOCK) * _BLOCK
        flat[expert * capacity : end] = torch.nan
        flat[expert * capacity :][:count] = (x[expert, :count] @ w[expert].T).to(d.dtype)


def fp8_m_grouped_gemm_nt_masked(
    a, b, d, masked_m, expected_m, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="nk",
    disable_ue8m0_cast=False,
):  # fmt: skip
    assert disable_ue8m0_cast, "the scales are fp32"
    _masked(a, b, d, masked_m, expected_m)


def m_grouped_bf16_gemm_nt_masked(a, b, d, masked_m, expected_m, compiled_dims="nk"):
    _masked(a, b, d, masked_m, expected_m)


def get_mk_alignment_for_contiguous_layout():
    return _BLOCK


def install(monkeypatch: Any) -> types.ModuleType:
    """Put this in the library's place; the plugin's modules that import it are imported anew."""
    module = types.ModuleType("deep_gemm")
    for name, value in globals().items():
        if callable(value) and not name.startswith("_") and name not in ("Any", "install"):
            setattr(module, name, value)
    module.__version__ = "0.1.5"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    for name in ("experts_deepgemm._vendor_api", "experts_deepgemm.experts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return module
