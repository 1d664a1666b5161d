"""`Library`: MoRI as the adapter sees it, so that a stand-in can take its place."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from moe_mori.limits import Version


@attrs.frozen
class Library:
    """
    Attributes:
        ops: has `EpDispatchCombineConfig`, `EpDispatchCombineOp` and `EpDispatchCombineKernelType`, as `mori.ops` has.
        shmem: has the calls of `mori.shmem` that start and end its world.
        name: for messages.
        version: None: unknown.
        device: where tensors for it live.
        blocks: thread blocks of a launch. More than the device holds at once would wait for one another for ever.
        unbounded: calls and kernels wait for a missing rank for ever, so a watchdog ends the process.
    """

    ops: Any
    shmem: Any
    name: str
    version: Version | None
    device: torch.device
    blocks: int
    unbounded: bool = True

    def __str__(self) -> str:
        version = "of unknown version" if self.version is None else ".".join(map(str, self.version))
        return f"{self.name} {version}"
