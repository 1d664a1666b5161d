"""The kernels compile for the GPUs that they are for, on a machine without one.

Shape letters: T tokens · H hidden · E_l local experts · K top-k · C capacity.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from moe_batched import launch
from moe_batched.owners import Owners
from moe_core.ops import compile_only
from moe_core.quant import QuantSpec
from moe_core.types import ExpertPlacement
from moe_core.wire import WireRow


@pytest.mark.parametrize(
    ("quantized", "placement"), [(False, ExpertPlacement.LINEAR), (True, ExpertPlacement.ROUND_ROBIN)]
)
def test_a_step_for_hopper(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, quantized: bool, placement: ExpertPlacement
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tokens, hidden, top_k, experts, ranks, most_tokens = 8, 7168, 8, 256, 4, 128
    spec = QuantSpec("float8_e4m3fn", (1, 128), dynamic=True) if quantized else None
    row = WireRow(hidden, torch.bfloat16, top_k, spec, weighted=False)
    with compile_only(90) as compiled:
        x = torch.empty(tokens, hidden, dtype=torch.float8_e4m3fn if quantized else torch.bfloat16, device="meta")
        scales = torch.empty(tokens, hidden // 128, device="meta") if quantized else None
        ids = torch.empty(tokens, top_k, dtype=torch.int64, device="meta")
        room = row.unpack(torch.empty(ranks * most_tokens, row.row_bytes, dtype=torch.uint8, device="meta"))
        home = launch.spread(x, scales, ids, room, Owners(experts, ranks, placement), most_tokens, top_k)
        table = torch.empty(experts, dtype=torch.int32, device="meta")
        capacity = ranks * most_tokens
        place, _ = launch.find_slots(room.topk_ids, table, experts // ranks, capacity)
        launch.to_slots(room.x, room.x_scale, place, experts // ranks * capacity)
        y = torch.empty(experts // ranks * capacity, hidden, dtype=torch.bfloat16, device="meta")
        back = launch.from_slots(y, place, top_k)
        launch.weigh_and_sum(back, home, torch.empty(tokens, top_k, device="meta"), torch.empty_like(y[:tokens]))
    assert [kernel.name for kernel in compiled] == ["spread", "find_slots", "to_slots", "from_slots", "weigh_and_sum"]
    for kernel in compiled:
        assert ".target sm_90" in kernel.asm["ptx"]
        if kernel.name != "find_slots":
            moves_vectors = any(store in kernel.asm["ptx"] for store in ("st.global.v4.b32", "st.global.v2.b64"))
            assert moves_vectors, f"{kernel.name} moves vectors of 16 bytes"
