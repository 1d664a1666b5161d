"""Kernels in Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest plugins/moe_symm/tests/interpreted`.

The variable must be set before Triton is imported, so these tests need a process of their own.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def casts_to_e4m3(monkeypatch):
    """The interpreter's own loses a carry into the exponent and rounds subnormals down; torch's is right."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    original = interpreter._convert_float

    def convert(data, source, target, rounding):
        if str(target) != "fp8e4nv":
            return original(data, source, target, rounding)
        wide = torch.from_numpy(np.ascontiguousarray(data).astype(np.float32)).clamp(-448, 448)
        return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 in a process of its own"))
