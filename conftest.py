"""What every test process shares. The only conftest outside a test folder."""

from __future__ import annotations

import os
from pathlib import Path

# Set before torch is imported: test workers share the cores, so each computes on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may need the network; without this, transformers asks the Hub about folders that it does not know.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave a folder named `interpreted` to the process that `make test` starts for it.

    Triton reads TRITON_INTERPRET when it is imported, so its interpreter and its compiler cannot share a process.
    """
    if collection_path.name == "interpreted" and os.environ.get("TRITON_INTERPRET") != "1":
        return True
    return None
