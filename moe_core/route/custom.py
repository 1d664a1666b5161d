"""A router around a function that the user brings.

Shape letters: T tokens on this rank · E experts, global · K top-k.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch

from moe_core.config import MoEConfig
from moe_core.interfaces import Router
from moe_core.route.params import REQUIRED, Param, read_params
from moe_core.types import Routing

RoutingFunction = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""`function(router_logits [T, E], top_k) -> (ids [T, K] int32 or int64, weights [T, K] floating)`: new tensors, and
the logits stay as they are. -1 in the ids means "no expert"."""


@attrs.frozen
class CustomRouter(Router):
    """Calls a function and checks what it returns, as far as that needs no look at values.

    Attributes:
        top_k: K.
        function: see `RoutingFunction`.
    """

    top_k: int
    function: RoutingFunction

    @classmethod
    def from_config(cls, config: MoEConfig) -> CustomRouter:
        known = {"function": Param(REQUIRED, "a callable (router_logits, top_k) -> (ids, weights)", callable)}
        return cls(config.top_k, **read_params("custom", config, known))

    def select_experts(self, router_logits: torch.Tensor, correction_bias: torch.Tensor | None = None) -> Routing:
        if correction_bias is not None:
            raise ValueError(
                f"router 'custom' was given a correction bias of shape {tuple(correction_bias.shape)}, which its "
                "function has no argument for; let the function hold the bias itself"
            )
        answer = self.function(router_logits, self.top_k)
        name = getattr(self.function, "__qualname__", repr(self.function))
        try:
            ids, weights = answer
        except (TypeError, ValueError):
            raise ValueError(
                f"router 'custom': {name} returned {type(answer).__name__}; it must return a pair (ids, weights)"
            ) from None
        expected = (router_logits.shape[0], self.top_k)
        for what, tensor in (("ids", ids), ("weights", weights)):
            if tuple(tensor.shape) != expected:
                raise ValueError(
                    f"router 'custom': {name} returned {what} of shape {tuple(tensor.shape)}; it must be [T, K] = "
                    f"{list(expected)}"
                )
        if ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"router 'custom': {name} returned ids in {ids.dtype}; legal: torch.int32, torch.int64")
        if not weights.dtype.is_floating_point:
            raise ValueError(f"router 'custom': {name} returned weights in {weights.dtype}; legal: a floating dtype")
        return Routing(ids, weights.float())
