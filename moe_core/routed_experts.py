"""`RoutedExperts`: owns one layer's expert weights on this rank.

Shape letters: E_l local experts · H hidden (as stored, so padded where the config says so) · I intermediate per rank.

Weights change in place, never by re-binding: loading, packing and reloading write into the same storage, because CUDA
graphs hold addresses.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_core.errors import CheckpointError, MoEError
from moe_core.expert_map import ExpertMapManager
from moe_core.quant import QuantMethod
from moe_core.select import Plan
from moe_core.types import ExpertWeights

_TENSOR_PARALLEL_DIM = {"gate": 0, "up": 0, "down": 1, "gate_bias": 0, "up_bias": 0}
"""The dim of a checkpoint tensor that runs along I, and is split over tp ranks. Others are whole on every rank."""


class RoutedExperts(torch.nn.Module):
    """One layer's routed experts. The order of calls is: select → this constructor → load_expert … → pack_weights.

    Args:
        plan: the layer's plan.
        quant_method: creates, fills and packs the weights; its scheme must be the plan's.
        device: where the weights live.
    """

    def __init__(self, plan: Plan, quant_method: QuantMethod, device: torch.device) -> None:
        super().__init__()
        if quant_method.scheme != plan.scheme:
            raise MoEError(
                f"quantization method of scheme {quant_method.scheme.name!r} for a plan of scheme "
                f"{plan.scheme.name!r}; plan and method must be of one scheme"
            )
        problem = plan.problem
        self.config = plan.config
        self.parallel = problem.parallel
        self.weight_layout = plan.weight_layout
        self.num_local_experts = problem.num_local_experts
        self.intermediate_size = problem.local_intermediate_size
        self.hidden_size = plan.config.experts_hidden_size
        self.device = device
        self.quant_method = quant_method
        self.expert_map = ExpertMapManager(
            self.config.num_experts, self.parallel.ep_size, self.parallel.ep_rank, self.config.placement
        )
        self._views: ExpertWeights | None = None
        quant_method.create_weights(self)

    def register_weight(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor into this layer's care, under a name of `ExpertWeights`. Called by `create_weights` only."""
        if hasattr(self, name):
            raise MoEError(f"RoutedExperts has {name!r} already; create_weights registers each weight once")
        self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))

    @property
    def weights(self) -> ExpertWeights:
        """Views on the weights, as experts take them."""
        if self._views is None:
            registered = dict(self.named_parameters(recurse=False))
            self._views = ExpertWeights(gate_up_layout=self.config.activation.gate_up_layout, **registered)
        return self._views

    def load_expert(self, expert: int, name: str, tensor: torch.Tensor) -> bool:
        """Copy one tensor of one expert from a checkpoint.

        Args:
            expert: global id.
            name: "gate", "up" or "down" (`[I, H]`, `[I, H]`, `[H, I]`, whole, not yet split over ranks), one of their
                biases such as "gate_bias", or a scale that the quantization method knows.

        Returns:
            whether the expert lives on this rank.
        """
        if not 0 <= expert < self.config.num_experts:
            raise CheckpointError(f"expert {expert}: this layer has experts 0 to {self.config.num_experts - 1}")
        own = self.expert_map.local_experts
        if expert not in own:
            return False
        tp_size, tp_rank = self.parallel.tp_size, self.parallel.tp_rank
        if tp_size > 1 and name in _TENSOR_PARALLEL_DIM:
            tensor = tensor.chunk(tp_size, dim=_TENSOR_PARALLEL_DIM[name])[tp_rank]
        if name == "down_bias" and tp_rank > 0:
            tensor = torch.zeros_like(tensor)  # the sum over tp ranks must hold it once
        self.quant_method.load_expert(self, own.index(expert), name, tensor)
        return True

    def pack_weights(self) -> None:
        """Bring the loaded weights into the plan's layout. Run again after every reload."""
        self.quant_method.pack_weights(self)

    def _apply(self, fn: Any, recurse: bool = True) -> RoutedExperts:
        self._views = None  # `.to()` and friends re-bind storage
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return (
            f"experts={self.num_local_experts} of {self.config.num_experts}, hidden={self.hidden_size}, "
            f"intermediate={self.intermediate_size}, scheme={self.quant_method.scheme.name}"
        )
