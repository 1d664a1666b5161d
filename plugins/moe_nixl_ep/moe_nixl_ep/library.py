"""`Library`: NIXL EP as the adapter sees it, so that a stand-in can take its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch.utils import deterministic

from moe_nixl_ep.limits import Limits, Version, limits_of

DETERMINISM: Any = deterministic
"""The settings of torch's deterministic mode: properties of a module, which type checkers don't see."""


@attrs.frozen
class Library:
    """
    Attributes:
        module: has `Buffer` and `topk_idx_t` (int32 or int64, by version), as the library's module has.
        name: the module's.
        version: of the wheel; None: unknown.
        prefixed: `prefixed(prefix, store)` is the store under a prefix.
        device: where tensors for it live.
        unbounded: `connect_ranks` waits for a missing rank for ever, so a watchdog ends the process.
    """

    module: Any
    name: str
    version: Version | None
    prefixed: Callable[[str, Any], Any]
    device: torch.device
    unbounded: bool = True

    @property
    def limits(self) -> Limits:
        return limits_of(self.version)

    def __str__(self) -> str:
        version = "of unknown version" if self.version is None else ".".join(map(str, self.version))
        return f"{self.name} {version}"
