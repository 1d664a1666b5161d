"""The plugin's kernel compiles for the GPUs that it is for, on a machine without one."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)


def test_the_transposition_of_scales_for_hopper(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from moe_core.ops._compile import compile_only
    from moe_nixl_ep.kernels.transpose import transpose_scales

    source, target = (torch.empty(shape, device="meta") for shape in ((64, 56, 512), (64, 512, 56)))
    counts = torch.empty(64, dtype=torch.int32, device="meta")
    with compile_only(90):
        kernel = transpose_scales.warmup(
            source, target, counts, 512, 56 * 512, GROUPS=56, BLOCK_G=64, BLOCK_C=32, num_warps=4, grid=(64, 16)
        )
    assert ".target sm_90" in kernel.asm["ptx"]
