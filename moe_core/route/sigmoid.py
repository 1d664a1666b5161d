"""Routers whose weights are sigmoids: plain, limited to the best groups (DeepSeek-V3), and Llama 4's.

Shape letters: T tokens on this rank · E experts, global · K top-k.
"""

from __future__ import annotations

from typing import Final

import attrs
import torch

from moe_core.config import MoEConfig
from moe_core.interfaces import Router
from moe_core.route.choose import choose
from moe_core.route.on_gpu import on_gpu
from moe_core.route.params import Param, count, flag, read_params
from moe_core.types import Routing

GROUPED_EPSILON: Final = 1e-20
"""What DeepSeek-V3 and its descendants add to the sum that they divide by; it matters only where all scores are 0."""

EPSILON = Param(
    0.0,
    "float >= 0",
    lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0,
)


def _renormalized(weights_TK: torch.Tensor, epsilon: float) -> torch.Tensor:
    return weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + epsilon)


@attrs.frozen
class SigmoidRouter(Router):
    """The K best sigmoids (Flint; with a correction bias MiniMax-M2 and LFM2).

    Attributes:
        top_k: K.
        renormalize: divide the K weights by their sum.
        epsilon: added to that sum; models disagree about it (MiniMax-M2 0, LFM2 1e-6).
    """

    top_k: int
    renormalize: bool = False
    epsilon: float = 0.0

    @classmethod
    def from_config(cls, config: MoEConfig) -> SigmoidRouter:
        known = {"renormalize": flag(), "epsilon": EPSILON}
        return cls(config.top_k, **read_params("sigmoid", config, known))

    def select_experts(self, router_logits: torch.Tensor, correction_bias: torch.Tensor | None = None) -> Routing:
        ids_TK, weights_TK = choose(router_logits.float().sigmoid(), correction_bias, self.top_k)
        return Routing(ids_TK, _renormalized(weights_TK, self.epsilon) if self.renormalize else weights_TK)

    def for_device(self, device: torch.device, num_experts: int) -> Router:
        return on_gpu(
            self, device, num_experts, self.top_k, "sigmoid", renormalize=self.renormalize, epsilon=self.epsilon
        )  # fmt: skip


@attrs.frozen
class GroupedSigmoidRouter(Router):
    """The K best sigmoids within the best groups of experts (DeepSeek-V3, GLM-4, Kimi, Nemotron-H).

    Experts stand in `num_groups` contiguous groups. A group is worth the sum of its two best biased scores; the
    experts of the `topk_groups` best groups stand for election. The weights are the scores without the bias.

    Attributes:
        top_k: K.
        num_groups: into how many groups the experts are divided.
        topk_groups: how many of them are kept.
        renormalize: divide the K weights by their sum + `GROUPED_EPSILON`.
    """

    top_k: int
    num_groups: int = 1
    topk_groups: int = 1
    renormalize: bool = False

    @classmethod
    def from_config(cls, config: MoEConfig) -> GroupedSigmoidRouter:
        known = {"num_groups": count(1), "topk_groups": count(None, "int from 1 to num_groups"), "renormalize": flag()}
        params = read_params("grouped_sigmoid", config, known)
        num_groups, renormalize = params["num_groups"], params["renormalize"]
        # Not given: every group is kept, so that a forgotten limit does not become a limit of one group.
        topk_groups = num_groups if params["topk_groups"] is None else params["topk_groups"]
        _check_groups(config, num_groups, topk_groups)
        return cls(config.top_k, num_groups, topk_groups, renormalize)

    def select_experts(self, router_logits: torch.Tensor, correction_bias: torch.Tensor | None = None) -> Routing:
        scores_TE = router_logits.float().sigmoid()
        biased_TE = scores_TE if correction_bias is None else scores_TE + correction_bias
        if self.topk_groups < self.num_groups:
            biased_TE = self._only_best_groups(biased_TE)
        ids_TK = biased_TE.topk(self.top_k, dim=-1, sorted=False).indices
        weights_TK = scores_TE.gather(-1, ids_TK)
        return Routing(ids_TK, _renormalized(weights_TK, GROUPED_EPSILON) if self.renormalize else weights_TK)

    def for_device(self, device: torch.device, num_experts: int) -> Router:
        return on_gpu(
            self, device, num_experts, self.top_k, "sigmoid", renormalize=self.renormalize, epsilon=GROUPED_EPSILON,
            num_groups=self.num_groups, topk_groups=self.topk_groups,
        )  # fmt: skip

    def _only_best_groups(self, biased_TE: torch.Tensor) -> torch.Tensor:
        """`[T, E]` with -inf in place of every score outside the `topk_groups` best groups."""
        groups = biased_TE.unflatten(-1, (self.num_groups, -1))  # [T, groups, experts of a group]
        group_scores = groups.topk(2, dim=-1).values.sum(dim=-1)  # [T, groups]
        kept = group_scores.topk(self.topk_groups, dim=-1, sorted=False).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, kept, False)
        return groups.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)


def _check_groups(config: MoEConfig, num_groups: int, topk_groups: int) -> None:
    """Refuse groups that the experts do not fill, or that leave too few of them.

    Raises:
        ValueError: naming the router, the bad value and the legal ones.
    """
    experts = config.num_experts
    if topk_groups > num_groups:
        raise ValueError(
            f"router 'grouped_sigmoid': topk_groups = {topk_groups}; legal values: 1 to num_groups = {num_groups}"
        )
    if experts % num_groups:
        raise ValueError(
            f"router 'grouped_sigmoid': num_groups = {num_groups}; legal values: divisors of num_experts = {experts}"
        )
    group_size = experts // num_groups
    if topk_groups < num_groups and group_size < 2:
        raise ValueError(
            f"router 'grouped_sigmoid': num_groups = {num_groups} leaves {group_size} expert per group, and a group is "
            f"worth the sum of its two best; legal values: divisors of num_experts = {experts} up to {experts // 2}"
        )
    if config.top_k > topk_groups * group_size:
        raise ValueError(
            f"router 'grouped_sigmoid': top_k = {config.top_k} is more than the {topk_groups * group_size} experts of "
            f"topk_groups = {topk_groups} groups of {group_size}; legal values: a top_k up to that, or more topk_groups"
        )


@attrs.frozen
class Llama4Router(Router):
    """The K best logits, then the sigmoid of each (Llama 4, whose config also says `router_weight_on_input`).

    The choice is made on logits: sigmoids of large logits are equal in floating point, and would choose differently.

    Attributes:
        top_k: K.
    """

    top_k: int

    @classmethod
    def from_config(cls, config: MoEConfig) -> Llama4Router:
        read_params("llama4", config, {})
        return cls(config.top_k)

    def select_experts(self, router_logits: torch.Tensor, correction_bias: torch.Tensor | None = None) -> Routing:
        ids_TK, logits_TK = choose(router_logits, correction_bias, self.top_k)
        return Routing(ids_TK, logits_TK.float().sigmoid())

    def for_device(self, device: torch.device, num_experts: int) -> Router:
        return on_gpu(self, device, num_experts, self.top_k, "sigmoid_of_topk")
