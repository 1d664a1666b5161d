"""The only file that imports NIXL EP. Imported when a plan that uses it is built, and by `moe-core doctor`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.distributed import distributed_c10d

from moe_nixl_ep.availability import installed_version, module_names
from moe_nixl_ep.library import Library


def _load() -> Any:
    """The first of its modules that loads: a wheel may be there and not fit this torch, Python or driver."""
    errors = []
    for name in module_names():
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:
            errors.append(f"{name}: {error}")
    raise ImportError("NIXL EP can't be imported: " + "; ".join(errors))


module = _load()


def library() -> Library:
    """The library, for tensors of the current CUDA device."""
    device = torch.device("cuda", torch.cuda.current_device())
    return Library(module, module.__name__, installed_version(), distributed_c10d.PrefixStore, device)
