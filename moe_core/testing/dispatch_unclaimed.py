"""What a dispatch backend does not claim, as layers that it must refuse; and a device as good as it asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs

from moe_core.config import MODEL_DTYPES, Problem
from moe_core.testing.dispatch_bench import Setting
from moe_core.types import Device, DispatchCapabilities, ExpertPlacement, SharedExpertsOrder


def unclaimed(
    caps: DispatchCapabilities, base: Setting, there: Device, fit: Callable[[Setting], Setting]
) -> Iterator[tuple[str, Problem]]:
    """(what, a problem that needs it) for everything that the record does not say."""

    def problem(setting: Setting = base, device: Device = there, **config: Any) -> Problem:
        made = setting.problem(0, device)
        return attrs.evolve(made, config=attrs.evolve(made.config, **config)) if config else made

    for dtype in MODEL_DTYPES:
        if dtype not in caps.dtypes:
            yield str(dtype), problem(attrs.evolve(base, dtype=dtype))
    for device_type in ("cpu", "cuda", "xpu"):
        if device_type not in caps.device_types:
            capability = (99, 0) if device_type == "cuda" else None
            yield f"device {device_type}", problem(device=Device(device_type, capability, device_type))
    if caps.min_compute_capability is not None:
        yield "an older GPU", problem(device=Device("cuda", (1, 0), "an old GPU"))
    for placement in ExpertPlacement:
        if placement not in caps.placements:
            yield f"placement {placement.value}", problem(attrs.evolve(base, placement=placement))
    for count in (caps.min_ep_size - 1, (caps.max_ep_size or 0) + 1):
        if count >= 1 and not caps.min_ep_size <= count <= (caps.max_ep_size or count):
            other = fit(attrs.evolve(base, world=count, experts=4 * count))
            yield other.ranks, problem(other)
    if not caps.carries_tokens:
        yield "tokens of each rank's own", problem(attrs.evolve(base, world=2, experts=8, topology="own"))
    if not caps.gathers_tokens:
        yield "ranks that split experts and tokens", problem(attrs.evolve(base, world=2, experts=8, topology="split"))
    if caps.max_topk is not None:
        yield "a larger K", problem(attrs.evolve(base, experts=8 * caps.max_topk, top_k=caps.max_topk + 1))
    if caps.hidden_sizes is not None:
        yield "another H", problem(attrs.evolve(base, hidden=max(caps.hidden_sizes) + 1))
    if caps.max_tokens_per_rank is not None:
        yield "more tokens per rank", problem(max_tokens_per_rank=caps.max_tokens_per_rank + 1)
        yield "no bound of T", problem(max_tokens_per_rank=None)
    if caps.needs_equal_shares and (caps.max_ep_size or 2) >= 2:
        yield "unequal shares", problem(attrs.evolve(base, world=2, experts=7))
    if not caps.graph_capturable:
        yield "a CUDA graph", problem(cuda_graph=True)
    if not caps.deterministic:
        yield "determinism", problem(deterministic=True)
    if not caps.overlap_safe:
        order = SharedExpertsOrder.INTERNAL
        yield "overlap with shared experts", problem(has_shared_experts=True, shared_experts_order=order)


def device_of(caps: DispatchCapabilities, device_type: str | None = None) -> Device:
    """A device as good as it asks for."""
    device_type = device_type or ("cpu" if "cpu" in caps.device_types else sorted(caps.device_types)[0])
    if device_type != "cuda":
        return Device(device_type, None, device_type)
    return Device("cuda", caps.min_compute_capability or (9, 0), "a CUDA device")
