"""The kernels compile for the GPUs that they are for, on a machine without one."""

from __future__ import annotations

import os
import re

import pytest
import torch

from moe_core.types import ExpertPlacement
from moe_symm.layout import Layout, Shares

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

CASES = {
    "a large model": (Layout(4, 128, 7168, 8, 2), torch.bfloat16, torch.int64, ExpertPlacement.LINEAR, 256),
    "odd sizes": (Layout(3, 5, 13, 5, 4), torch.float32, torch.int32, ExpertPlacement.ROUND_ROBIN, 10),
    "more than a block": (Layout(8, 16, 12288, 1, 2), torch.float16, torch.int32, ExpertPlacement.LINEAR, 9),
}


@pytest.mark.parametrize("case", CASES)
def test_both_kernels_for_hopper(case, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from moe_core.ops import compile_only
    from moe_symm import peers
    from moe_symm.kernels import pair

    layout, dtype, id_dtype, placement, experts = CASES[case]
    shares = Shares.of(experts, layout.ranks, placement)
    fixed = peers.constants(layout, shares)
    options = {"num_warps": peers.warps(layout.hidden), "num_stages": 1, "grid": (64,)}
    x = torch.empty(4, layout.hidden, dtype=dtype, device="meta")
    ids = torch.empty(4, layout.top_k, dtype=id_dtype, device="meta")
    weights = torch.empty(4, layout.top_k, device="meta")
    table = torch.empty(layout.ranks, dtype=torch.int64, device="meta")
    tail = (table, 1 << 40, 1 << 41, 4, 1, 30_000)
    with compile_only(90):
        sent = pair.dispatch.warmup(x, ids, weights, *tail, **fixed["dispatch"], **options).asm["ptx"]
        home = pair.combine.warmup(x, ids, x, *tail, **fixed["combine"], **options).asm["ptx"]
    for ptx in (sent, home):
        assert ".target sm_90" in ptx
        assert "ld.acquire.sys.global.b32" in ptx
        assert re.search(r"atom\.(global\.)?(sys\.)?release|atom\.(global\.)?release\.sys", ptx)
        assert "multimem" not in ptx
    if layout.hidden % 512 == 0:  # whole rows by vectors of 16 bytes
        assert "st.global.v4.b32" in sent
        assert "st.global.v4.b32" in home
