"""Kernels in Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted`.

The variable must be set before Triton is imported, so these tests need a process of their own. bf16 is left to the GPU
tests: the interpreter's `tl.dot` multiplies its raw bits.
"""

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 in a process of its own"))
