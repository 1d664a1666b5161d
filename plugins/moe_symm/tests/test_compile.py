"""The kernels compile for the GPUs that they are for, on a machine without one."""

from __future__ import annotations

import os
import re

import pytest
import torch

from moe_core.quant import ScaleFormat
from moe_core.types import ExpertPlacement
from moe_symm.buffers import Layer
from moe_symm.layout import Form, Layout, Shares

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

LARGE = Layer(Shares.of(256, 4, ExpertPlacement.LINEAR), torch.bfloat16, ScaleFormat.FP32)
CASES = {
    "a large model": (Layout(4, 128, 7168, 8, 2), LARGE),
    "its experts' rows": (Layout(4, 128, 7168, 8, 2, Form.BATCHED), LARGE),
    "its choices": (Layout(4, 128, 7168, 8, 2, Form.EXACT), LARGE),
    "its rows fetched": (Layout(4, 4096, 7168, 8, 2), Layer(LARGE.shares, torch.bfloat16)),
    "odd sizes": (Layout(3, 5, 13, 5, 4), Layer(Shares.of(10, 3, ExpertPlacement.ROUND_ROBIN), torch.float32)),
    "more than a block": (
        Layout(8, 1024, 12288, 1, 2, Form.BATCHED),
        Layer(Shares.of(9, 8, ExpertPlacement.LINEAR), torch.float16, ScaleFormat.UE8M0),
    ),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.full) if case == "its choices" else case for case in CASES]
)
def test_all_kernels_for_hopper(case, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from moe_core.ops import KernelLaunch, compile_only
    from moe_symm.launches import Kernels

    layout, layer = CASES[case]
    compiled = {}

    compile_it = KernelLaunch.compile

    def keep(self, key, *arguments):
        compile_it(self, key, *arguments)
        compiled[self._kernel.__name__, tuple(self._constants.items()), key] = self._compiled[key].asm["ptx"]

    monkeypatch.setattr(KernelLaunch, "compile", keep)
    with compile_only(90):
        kernels = Kernels(layout, layer, 1, torch.device("meta"))
    names = [name for name, _, _ in compiled]
    expanded, payloads = layout.form is not Form.STANDARD, 1 + (layer.scales is not None)
    assert names.count("dispatch") == len(kernels.dispatch) * 2 == 2 * payloads * (1 if expanded else 2)
    assert names.count("expand") == len(kernels.expand) == payloads * expanded
    assert (names.count("combine"), names.count("arrive")) == (6, not expanded)
    for (name, constants, _), ptx in compiled.items():
        sends = name == "dispatch" or (name == "combine" and ("SENDS", True) in constants)
        waits = name in ("arrive", "expand") or ("WAITS", True) in constants or ("COLLECTS", True) in constants
        assert ".target sm_90" in ptx
        assert bool(re.search(r"atom\.(global\.)?(sys\.)?release|atom\.(global\.)?release\.sys", ptx)) == sends
        assert ("ld.acquire.sys.global.b32" in ptx) == waits
        assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch_dependents") == 1
        assert ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents")
        assert "multimem" not in ptx
        only_tells = {("FETCHES", True), ("COLLECTS", False)} <= set(constants)
        if layout.hidden % 512 == 0 and name != "arrive" and not only_tells:  # whole rows by vectors
            assert "st.global.v4.b32" in ptx
