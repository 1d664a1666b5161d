"""Routers whose weights are a softmax: over all experts, then top-k; or top-k, then over the chosen.

Shape letters: T tokens on this rank · E experts, global · K top-k.
"""

from __future__ import annotations

import attrs
import torch

from moe_core.config import MoEConfig
from moe_core.interfaces import Router
from moe_core.route.choose import choose
from moe_core.route.on_gpu import on_gpu
from moe_core.route.params import flag, read_params
from moe_core.types import Routing


@attrs.frozen
class SoftmaxRouter(Router):
    """Softmax over all E experts, then the K best (Mixtral, Qwen-MoE, OLMoE, Jamba).

    Attributes:
        top_k: K.
        renormalize: divide the K weights by their sum.
    """

    top_k: int
    renormalize: bool = False

    @classmethod
    def from_config(cls, config: MoEConfig) -> SoftmaxRouter:
        return cls(config.top_k, **read_params("softmax", config, {"renormalize": flag()}))

    def select_experts(self, router_logits: torch.Tensor, correction_bias: torch.Tensor | None = None) -> Routing:
        probabilities_TE = torch.softmax(router_logits, dim=-1, dtype=torch.float32)
        ids_TK, weights_TK = choose(probabilities_TE, correction_bias, self.top_k)
        if self.renormalize:
            # No epsilon: without a bias the sum is at least K / E.
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return Routing(ids_TK, weights_TK)

    def for_device(self, device: torch.device, num_experts: int) -> Router:
        return on_gpu(self, device, num_experts, self.top_k, "softmax", renormalize=self.renormalize)


@attrs.frozen
class TopKSoftmaxRouter(Router):
    """The K best logits, then a softmax over these K (gpt-oss, Granite).

    In exact arithmetic this is `SoftmaxRouter` with `renormalize`; in floating point it is what these models compute.

    Attributes:
        top_k: K.
    """

    top_k: int

    @classmethod
    def from_config(cls, config: MoEConfig) -> TopKSoftmaxRouter:
        read_params("topk_softmax", config, {})
        return cls(config.top_k)

    def select_experts(self, router_logits: torch.Tensor, correction_bias: torch.Tensor | None = None) -> Routing:
        ids_TK, logits_TK = choose(router_logits, correction_bias, self.top_k)
        return Routing(ids_TK, torch.softmax(logits_TK, dim=-1, dtype=torch.float32))

    def for_device(self, device: torch.device, num_experts: int) -> Router:
        return on_gpu(self, device, num_experts, self.top_k, "softmax_of_topk")
