"""Which GEMM is chosen, and that all of them compute the same.

Shape letters: M rows · N out features · K in features.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_core.builtin import cpu_gemm
from moe_core.builtin.cpu_gemm import Gemm, choose_gemm, grouped_linear, linear, native_dtypes, onednn_linear

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "rows", "n", "k", "row_major", "onednn", "expected"),
    [
        (FP32, 1, 1536, 2048, True, True, Gemm.ONEDNN),
        (FP32, 2, 1536, 2048, True, True, Gemm.COLUMNS),
        (FP32, 4, 1536, 2048, True, True, Gemm.ONEDNN),
        (FP32, 4, 2048, 768, True, True, Gemm.COLUMNS),
        (FP32, 64, 2048, 768, True, True, Gemm.ONEDNN),
        (FP32, 8, 2048, 768, True, False, Gemm.ROWS),
        (FP32, 16, 2048, 768, True, False, Gemm.COLUMNS),
        (FP32, 2, 1536, 2048, False, True, Gemm.ROWS),
        (BF16, 2, 1536, 2048, True, True, Gemm.ROWS),
        (BF16, 64, 1536, 2048, True, True, Gemm.ROWS),
    ],
)
def test_choice(dtype: torch.dtype, rows: int, n: int, k: int, row_major: bool, onednn: bool, expected: Gemm) -> None:
    assert choose_gemm(dtype, rows, n, k, row_major, onednn) is expected


@pytest.mark.parametrize("gemm", Gemm)
def test_every_way_computes_the_same(gemm: Gemm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_gemm, "choose_gemm", lambda *shape: gemm)
    dtypes = [FP32] if gemm is Gemm.ONEDNN else [FP32, BF16]
    for dtype, rows, transposed in itertools.product(dtypes, (1, 2, 5, 33), (False, True)):
        x, w = torch.randn(rows, 23).to(dtype)[:, :19], torch.randn(11, 19).to(dtype)
        if transposed:
            w = w.t().contiguous().t()
        out, scratch = torch.full((rows, 11), float("nan"), dtype=dtype), torch.full((400,), float("nan"), dtype=dtype)
        linear(x, w, out, scratch)
        torch.testing.assert_close(out, (x.double() @ w.double().t()).to(dtype), atol=1e-5, rtol=2e-2)


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_gemm, "onednn_linear", lambda: None)
    for rows in (1, 2, 7, 16):
        x, w, out = torch.randn(rows, 19), torch.randn(11, 19), torch.empty(rows, 11)
        linear(x, w, out, torch.empty(400))
        torch.testing.assert_close(out, x @ w.t())


def test_groups() -> None:
    for dtype, transposed in itertools.product((FP32, BF16), (False, True)):
        x, w, out = torch.randn(9, 6).to(dtype), torch.randn(4, 5, 6).to(dtype), torch.empty(9, 5, dtype=dtype)
        if transposed:
            w = w.transpose(1, 2).contiguous().transpose(1, 2)
        grouped_linear(x, [2, 1, 6], [3, 0, 1], w, out, torch.empty(45, dtype=dtype))
        expected = torch.cat([x[:2] @ w[3].t(), x[2:3] @ w[0].t(), x[3:] @ w[1].t()])
        torch.testing.assert_close(out, expected, atol=1e-2, rtol=2e-2)


def test_what_this_machine_has() -> None:
    """The answers must be of the documented kind, whatever the machine."""
    assert FP32 in native_dtypes()
    operator = onednn_linear()
    if operator is not None:
        x, w = torch.randn(3, 8), torch.randn(5, 8)
        torch.testing.assert_close(operator(x, w, None, "none", [], ""), x @ w.t())
