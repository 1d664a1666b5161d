"""The only file that imports MoRI. Imported when a plan that uses it is built, and by `moe-core doctor`."""

from __future__ import annotations

import torch

from moe_mori.availability import installed_version
from moe_mori.library import Library

try:
    import mori.ops
    import mori.shmem
except (OSError, RuntimeError, AttributeError) as error:  # without ROCm its extension ends in any of these
    raise ImportError(f"MoRI can't be imported: {error}") from error

_BLOCKS = 80
"""As MoRI's own configuration has it."""


def library() -> Library:
    """The library, for tensors of the current device."""
    device = torch.device("cuda", torch.cuda.current_device())  # ROCm's torch calls it so
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return Library(mori.ops, mori.shmem, "mori", installed_version(), device, min(_BLOCKS, units))
