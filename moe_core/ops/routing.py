"""Routing on the GPU: scores, limits to groups, top-k and renormalisation in one kernel.

T tokens · E experts · K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from moe_core.ops._runtime import KernelLaunch

SCORINGS = ("softmax", "sigmoid", "softmax_of_topk", "sigmoid_of_topk")


@dataclass(frozen=True)
class RouteSpec:
    """How a router turns logits into choices and weights.

    Attributes:
        top_k: K.
        scoring: "softmax" over E (Mixtral, Qwen), "sigmoid" (DeepSeek-V3, MiniMax), "softmax_of_topk": choice by logit,
            softmax over the K chosen (gpt-oss), "sigmoid_of_topk": choice by logit, then sigmoid (Llama 4).
        renormalize: divide the K weights by their sum + epsilon.
        epsilon: see above.
        num_groups, topk_groups: only experts of the best `topk_groups` of `num_groups` contiguous groups may be chosen;
            a group is worth the sum of its two best choices (DeepSeek-V3). Equal numbers: no limit.
    """

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = False
    epsilon: float = 0.0
    num_groups: int = 1
    topk_groups: int = 1

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ValueError(f"RouteSpec.scoring = {self.scoring!r}; legal values: {', '.join(SCORINGS)}")
        if not 1 <= self.topk_groups <= self.num_groups:
            raise ValueError(
                f"RouteSpec.topk_groups = {self.topk_groups}; legal values: 1 to num_groups = {self.num_groups}"
            )

    def check(self, num_experts: int) -> None:
        """Refuses numbers of experts that the spec does not fit."""
        size = num_experts // self.num_groups
        if num_experts % self.num_groups or (self.topk_groups < self.num_groups and size < 2):
            raise ValueError(
                f"RouteSpec.num_groups = {self.num_groups} does not fit {num_experts} experts; use a divisor"
            )
        if not 1 <= self.top_k <= self.topk_groups * size:
            raise ValueError(f"RouteSpec.top_k = {self.top_k}; legal values: 1 to {self.topk_groups * size}")


@lru_cache(maxsize=64)
def _prepared(spec: RouteSpec, num_experts: int, device: torch.device) -> KernelLaunch:
    from moe_core.ops._kernels.routing import topk_route_kernel

    spec.check(num_experts)
    pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    constants = {
        "E": num_experts, "EP": _power_of_2(num_experts), "K": spec.top_k, "KP": _power_of_2(spec.top_k),
        "SCORING": spec.scoring, "RENORMALIZE": spec.renormalize, "GROUPS": spec.num_groups,
        "GP": _power_of_2(spec.num_groups), "KEEP": spec.topk_groups, "PDL": pdl,
    }  # fmt: skip
    # One warp: every reduction stays inside it. More than 512 experts would be too many registers for it.
    return KernelLaunch(topk_route_kernel, constants, warps=1 if num_experts <= 512 else 4)


def topk_route(
    logits: torch.Tensor,
    spec: RouteSpec,
    correction_bias: torch.Tensor | None = None,
    *,
    ids_dtype: torch.dtype = torch.int64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K experts of each token and their weights; mathematics in float32.

    Args:
        logits: `[T, E]`, any floating dtype, unit stride in E.
        spec: see `RouteSpec`.
        correction_bias: `[E]` or None; takes part in the choice alone.
        ids_dtype: int64 or int32.

    Returns:
        ids `[T, K]`, best choice first, the lowest id of equals; weights `[T, K]` float32.
    """
    tokens, experts = logits.shape
    if logits.stride(1) != 1 and experts > 1:
        raise ValueError(f"topk_route: logits have strides {logits.stride()}; unit stride in E is needed")
    if correction_bias is not None and (correction_bias.shape != (experts,) or not correction_bias.is_contiguous()):
        raise ValueError(
            f"topk_route: correction_bias is {tuple(correction_bias.shape)} with strides {correction_bias.stride()}; a "
            f"contiguous [{experts}] is needed"
        )
    ids = torch.empty((tokens, spec.top_k), dtype=ids_dtype, device=logits.device)
    weights = torch.empty((tokens, spec.top_k), dtype=torch.float32, device=logits.device)
    launch = _prepared(spec, experts, logits.device)
    if tokens:
        key = None
        if (logits.data_ptr() | ids.data_ptr() | weights.data_ptr()) % 16 == 0 and (
            correction_bias is None or correction_bias.data_ptr() % 16 == 0
        ):
            bias_dtype = None if correction_bias is None else correction_bias.dtype
            key = (logits.dtype, logits.stride(0), ids_dtype, bias_dtype)
        launch((tokens, 1, 1), key, logits, correction_bias, ids, weights, logits.stride(0), spec.epsilon)
    return ids, weights


def topk_route_torch(
    logits: torch.Tensor,
    spec: RouteSpec,
    correction_bias: torch.Tensor | None = None,
    *,
    ids_dtype: torch.dtype = torch.int64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `topk_route` computes."""
    spec.check(logits.shape[1])
    scores = logits.float()
    if spec.scoring == "softmax":
        scores = scores.softmax(dim=-1)
    elif spec.scoring == "sigmoid":
        scores = scores.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias.float()
    if spec.topk_groups < spec.num_groups:
        groups = choice.unflatten(-1, (spec.num_groups, -1))
        worth = groups.topk(2, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, _first_best(worth, spec.topk_groups), True)
        choice = groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = _first_best(choice, spec.top_k)
    weights = scores.gather(-1, ids)
    if spec.scoring == "softmax_of_topk":
        weights = weights.softmax(dim=-1)
    elif spec.scoring == "sigmoid_of_topk":
        weights = weights.sigmoid()
    if spec.renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + spec.epsilon)
    return ids.to(ids_dtype), weights


def _first_best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest, best first, the lowest index of equals (`topk` leaves that open)."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
