"""Which layers route by one kernel: decided once, when a layer is built.

Shape letters: E experts, global · K top-k.
"""

from __future__ import annotations

import importlib.util

import torch

from moe_core.interfaces import Router

MAX_EXPERTS = 1024
MAX_TOP_K = 32
"""The kernel holds a token's E scores in the registers of a few warps, and finds its K choices one by one."""


def on_gpu(
    router: Router,
    device: torch.device,
    num_experts: int,
    top_k: int,
    scoring: str,
    *,
    renormalize: bool = False,
    epsilon: float = 0.0,
    num_groups: int = 1,
    topk_groups: int = 1,
) -> Router:
    """`router` as one kernel where device and sizes allow that, else itself. Arguments as in `ops.RouteSpec`."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    if not nvidia or num_experts > MAX_EXPERTS or top_k > MAX_TOP_K or importlib.util.find_spec("triton") is None:
        return router
    from moe_core.ops import RouteSpec  # noqa: PLC0415 - only where a GPU routes
    from moe_core.route.kernel_router import KernelRouter  # noqa: PLC0415 - as above

    return KernelRouter(RouteSpec(top_k, scoring, renormalize, epsilon, num_groups, topk_groups), router)
