"""The kernels around a library's grouped GEMMs compile for sm_90 on a machine without a GPU, and spill nothing."""

import os

import pytest
import torch

from moe_core.ops import Activation, ContiguousRows, ExpertsProblem, PaddedRows, RowQuantization
from moe_core.ops.contiguous import contiguous_workspace, padded_workspace

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

PROBLEM = ExpertsProblem(8, 2, 4096, 1792)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from moe_core.ops._compile import compile_only

    with compile_only(90) as kernels:
        yield kernels


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def space(shapes):
    return {name: meta(*shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}


@pytest.mark.parametrize("quantize", [None, RowQuantization(), RowQuantization(power_of_two=True)])
def test_standard(compiled, quantize):
    rows, workspace = (
        ContiguousRows(PROBLEM, Activation(), quantize),
        space(contiguous_workspace(PROBLEM, torch.bfloat16, 64, quantize)),
    )
    ids = meta(64, 2, dtype=torch.int32)
    rows.gather(meta(64, 4096), None, ids, None, workspace)
    rows.activate(workspace)
    rows.reduce(ids, meta(64, 2, dtype=torch.float32), None, workspace, meta(64, 4096))
    assert len(compiled) == (5 if quantize is None else 6)
    assert not any("st.local" in kernel.asm["ptx"] for kernel in compiled)


@pytest.mark.parametrize("carried", [False, True])
def test_batched(compiled, carried):
    quantize = RowQuantization()
    rows = PaddedRows(PROBLEM, Activation(), quantize)
    workspace, counts = space(padded_workspace(PROBLEM, torch.bfloat16, 64, quantize)), meta(8, dtype=torch.int32)
    x = (meta(8, 64, 4096, dtype=torch.float8_e4m3fn), meta(8, 64, 32, dtype=torch.float32))
    rows.gather(*(x if carried else (meta(8, 64, 4096), None)), counts, workspace)
    rows.activate(counts, workspace)
    assert len(compiled) == 2
