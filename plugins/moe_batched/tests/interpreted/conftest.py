"""Kernels in Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest plugins/moe_batched/tests/interpreted`.

The variable must be set before Triton is imported, so these tests need a process of their own.
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
