"""A router as one kernel. Imported where a layer is built that routes on a GPU: see `on_gpu`.

Shape letters: T tokens on this rank · E experts, global · K top-k.
"""

from __future__ import annotations

import attrs
import torch

from moe_core.interfaces import Router
from moe_core.ops import RouteSpec, topk_route
from moe_core.types import Routing


@attrs.frozen
class KernelRouter(Router):
    """Scores, choice and weights in one launch of `ops.topk_route`.

    The same mathematics as `twin`, in float32. Of equal scores the lowest id is chosen; which one `torch.topk` takes
    is not defined.

    Attributes:
        spec: what the kernel computes.
        twin: the router in torch operators that it stands for.
    """

    spec: RouteSpec
    twin: Router

    def select_experts(self, router_logits: torch.Tensor, correction_bias: torch.Tensor | None = None) -> Routing:
        logits = router_logits if router_logits.stride(-1) == 1 else router_logits.contiguous()
        bias = None if correction_bias is None else correction_bias.contiguous()
        return Routing(*topk_route(logits, self.spec, bias))
