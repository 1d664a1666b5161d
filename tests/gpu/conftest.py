"""GPU tests: `python -m pytest tests/gpu`. Without CUDA every test here is skipped."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # the shared cases
sys.path.insert(0, str(Path(__file__).parent))  # and the workers here


def pytest_collection_modifyitems(items):
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def plugins_of_this_checkout():
    """A GPU machine may hold the checkout alone: then its plugins are registered in process."""
    import importlib

    from moe_core.plugins import register_plugin, registry

    here = {record.name for record in registry().plugins}
    for name, package in {"batched": "moe_batched", "fp8": "quant_fp8", "nvfp4": "quant_nvfp4"}.items():
        if name not in here:
            sys.path.insert(0, str(Path(__file__).parents[2] / "plugins" / package))
            register_plugin(importlib.import_module(f"{package}.plugin"), name)
