"""`RoutedExperts`: owns one layer's expert weights on this rank.

Shape letters: E_l local experts · H hidden (as stored, so padded where the config says so) · I intermediate per rank.

Weights change in place, never by re-binding: loading, packing and reloading write into the same storage, because CUDA
graphs hold addresses.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from moe_core.errors import CheckpointError, MoEError
from moe_core.expert_map import ExpertMapManager
from moe_core.quant import QuantMethod
from moe_core.select import Plan
from moe_core.types import ExpertWeights

_LAYOUT = "layout:"
"""Starts the state dict's key for the experts that stand in a kernel's layout."""


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
        self.packed_experts: set[int] = set()
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
            registered: dict[str, Any] = dict(self.named_parameters(recurse=False))
            if self.packed_experts:
                registered["layout"] = self.quant_method.layouts[self.weight_layout]
            self._views = ExpertWeights(gate_up_layout=self.config.activation.gate_up_layout, **registered)
        return self._views

    def load_expert(self, expert: int, name: str, tensor: torch.Tensor, *, sharded: bool = False) -> bool:
        """Copy one tensor of one expert from a checkpoint.

        Args:
            expert: global id.
            name: "gate", "up" or "down" (`[I, H]`, `[I, H]`, `[H, I]`), one of their biases such as "gate_bias", or a
                scale that the quantization method knows.
            tensor: whole, not yet split over ranks; `sharded`: this rank's part of it already (see `shard_index`).

        Returns:
            whether the expert lives on this rank.
        """
        if not 0 <= expert < self.config.num_experts:
            raise CheckpointError(f"expert {expert}: this layer has experts 0 to {self.config.num_experts - 1}")
        own = self.expert_map.local_experts
        if expert not in own:
            return False
        if not sharded:
            tensor = tensor[self.shard_index(name, tuple(tensor.shape))]
        if name == "down_bias" and self.parallel.tp_rank > 0:
            tensor = torch.zeros_like(tensor)  # the sum over tp ranks must hold it once
        self.quant_method.load_expert(self, own.index(expert), name, tensor)
        return True

    def shard_index(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Which part of a whole expert's tensor this rank holds, as an index."""
        tp_size, tp_rank = self.parallel.tp_size, self.parallel.tp_rank
        if tp_size == 1:
            return (slice(None),) * len(shape)
        return self.quant_method.shard_index(self, name, shape, tp_rank, tp_size)

    def pack_weights(self) -> None:
        """Bring the loaded weights into the plan's layout. Run again after every reload."""
        if not self.packed_experts:
            self._views = None  # the next record says what the layout is
        self.quant_method.pack_weights(self)

    def unpack_weights(self) -> None:
        """Bring the weights back into the order in which they were loaded, for an export."""
        self._views = None
        self.quant_method.unpack_weights(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Beside the weights: which experts stand in a kernel's layout, under the layout's name."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed_experts:
            destination[f"{prefix}{_LAYOUT}{self.weight_layout}"] = torch.tensor(sorted(self.packed_experts))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        """Copy in place, also where `load_state_dict(assign=True)` would re-bind: addresses are stable."""
        layouts = [key for key in state_dict if key.startswith(prefix + _LAYOUT)]
        packed = {key.removeprefix(prefix + _LAYOUT): set(state_dict.pop(key).tolist()) for key in layouts}
        if packed.keys() - {self.weight_layout}:
            raise CheckpointError(
                f"the state dict's experts are in the weight layout {', '.join(packed)}, and this plan's experts read "
                f"{self.weight_layout}: call unpack_weights() on the layer before its state_dict()"
            )
        if f"{prefix}w13" in state_dict:
            self.packed_experts, self._views = packed.get(self.weight_layout, set()), None
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "assign_to_params_buffers": False}, *rest)

    def _apply(self, fn: Any, recurse: bool = True) -> RoutedExperts:
        self._check_move(fn)
        self._views = None  # `.to()` and friends re-bind storage
        if self.quant_method.scheme.weight is not None:
            fn = functools.partial(_keeping_dtype, fn)
        super()._apply(fn, recurse)
        return self

    def _check_move(self, fn: Any) -> None:
        """A plan is made for one dtype and one kind of device; a layer that moves away from it needs another plan."""
        moved = fn(torch.empty(0, dtype=self.config.dtype, device=self.device))
        if moved.dtype != self.config.dtype or moved.device.type != self.device.type:
            raise MoEError(
                f"this layer is planned for {self.config.dtype} on {self.device.type} and cannot become {moved.dtype} "
                f"on {moved.device.type}: build it with dtype = {moved.dtype} and device = '{moved.device.type}', and "
                "load its weights there"
            )
        self.device = moved.device

    def extra_repr(self) -> str:
        return (
            f"experts={self.num_local_experts} of {self.config.num_experts}, hidden={self.hidden_size}, "
            f"intermediate={self.intermediate_size}, scheme={self.quant_method.scheme.name}"
        )


def _keeping_dtype(fn: Any, tensor: torch.Tensor) -> torch.Tensor:
    """`model.to(torch.bfloat16)` converts whatever is floating point: fp8 weights and scales of any kind too."""
    moved: torch.Tensor = fn(tensor)
    return moved if moved.dtype is tensor.dtype else tensor.to(moved.device)
