"""What is registered, and whether it can be used on this machine."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from moe_core.answers import probed
from moe_core.plugins import PluginRecord, registry


@attrs.frozen
class Usable:
    """One registered thing: `item` as in `PluginRecord.registers`, and why not, if not."""

    item: str
    ok: bool
    reason: str = ""


def device_types() -> set[str]:
    """The device types of this machine. Asks the driver, without making a CUDA context."""
    return {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}


def usable(record: PluginRecord) -> list[Usable]:
    """Each thing that a plugin registered; backends are probed, the others need nothing."""
    return [_usable(item) for item in record.registers]


def _usable(item: str) -> Usable:
    kind, _, name = item.partition(":")
    if kind not in ("dispatch", "experts"):
        return Usable(item, True)
    candidate: Any = getattr(registry(), kind)[name]
    here, takes = device_types(), candidate.capabilities.device_types
    availability = probed(candidate).availability
    reasons = [] if availability.ok else [availability.reason]
    if not takes & here:
        reasons.insert(0, f"runs on {', '.join(sorted(takes))}; here: {', '.join(sorted(here))}")
    return Usable(item, not reasons, "; ".join(reasons))
