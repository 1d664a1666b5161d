"""Kernels in Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest plugins/quant_fp8/tests/interpreted`.

The variable must be set before Triton is imported, so these tests need a process of their own.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def casts_to_and_from_e4m3(monkeypatch):
    """The interpreter's cast to e4m3 loses a carry into the exponent and rounds subnormals down; torch's is right."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    original = interpreter._convert_float

    def convert(data, source, target, rounding):
        values = np.ascontiguousarray(data)
        if str(target) == "fp8e4nv":
            # As the hardware does it for finite values: saturating.
            wide = torch.from_numpy(values.astype(np.float32)).clamp(-448, 448)
            return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if str(source) == "fp8e4nv" and str(target) == "fp32":
            return torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn).float().numpy()
        return original(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 in a process of its own"))
