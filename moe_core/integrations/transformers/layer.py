"""The function that transformers calls for a whole experts module, its state, and the opaque op around it.

Shape letters: T tokens on this rank · H hidden · E experts (under expert parallelism: those of this rank) · K top-k.

State never stands on the foreign module: it would be copied, pickled and saved with it. It stands in a weak table
keyed by the module's identity, so that a copy gets its own, and a dead model leaves nothing behind. What does stand on
the module is the user's request for certain backends: a copy shall honour it too.
"""

from __future__ import annotations

import gc
import operator
import weakref
from typing import Any

import torch
from torch.nn import functional

from moe_core.errors import MoEError, UnsupportedError
from moe_core.integrations.transformers.foreign import (
    Signature,
    Tensors,
    check_supported,
    gate_settings,
    is_experts_module,
    packed_text,
    plan_signature,
    views,
)
from moe_core.integrations.transformers.plans import Request, make_plan
from moe_core.kernel import MoEKernel
from moe_core.runner import layer_of, register_layer
from moe_core.select import Plan
from moe_core.types import ExpertWeights, Routing

_REQUEST = "_moe_core_request"


class BridgeLayer:
    """What moe-core knows about one foreign experts module: kernels per K, and views on the module's parameters.

    Args:
        module: not kept alive.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = weakref.ref(module)
        self._signature: Signature = ()
        self._gate: tuple[Any, ...] = ()
        self._kernels: dict[int, MoEKernel] = {}
        self._weights: ExpertWeights | None = None
        self.key = register_layer(self)

    @property
    def weights(self) -> ExpertWeights | None:
        """The views in force; None before the first step."""
        return self._weights

    @property
    def plans(self) -> dict[int, Plan]:
        """The plan for each K that was met."""
        return {top_k: kernel.plan for top_k, kernel in self._kernels.items()}

    @property
    def requested(self) -> Request:
        """The backends that the user insists on."""
        request: Request = getattr(self._live(), _REQUEST, Request())
        return request

    def request(self, request: Request) -> None:
        """Insist on backends from now on."""
        module = self._live()
        vars(module).pop(_REQUEST, None)
        if request != Request():
            vars(module)[_REQUEST] = request
        self._kernels.clear()

    def plan(self, top_k: int) -> Plan:
        """The plan for a K, made now if there is none for the module's parameters as they are."""
        module = self._live()
        self._refresh(module)
        return self._kernel(module, top_k).plan

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """One step.

        Args:
            hidden_states: `[..., H]`, never written.
            top_k_index: `[..., K]` integer; under expert parallelism ids >= E mean "no expert here".
            top_k_weights: `[..., K]`, any floating dtype.

        Returns:
            `[..., H]` in the dtype of `hidden_states`, weighted and summed over K.
        """
        module = self._live()
        self._refresh(module)
        ids = top_k_index.reshape(-1, top_k_index.shape[-1])
        weights = top_k_weights.reshape(ids.shape).to(torch.float32)
        # before 5.18 nothing says whether off-rank ids may appear
        if getattr(module, "_is_expert_parallel", True):
            ids = torch.where(ids >= module.num_experts, -1, ids)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # experts write into buffers of the weights' dtype
                out = self._step(module, x, ids, weights)
        else:
            out = self._step(module, x, ids, weights)
        return out.reshape(hidden_states.shape)

    @torch.no_grad()
    def _step(self, module: torch.nn.Module, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        kernel, top_k = self._kernel(module, ids.shape[1]), ids.shape[1]
        assert self._weights is not None, "views are made with the kernel"
        rows = x.to(self._weights.w2.dtype)
        experts = self._weights.w2.shape[0]
        if top_k <= experts:
            out, _ = kernel(rows, Routing(ids, weights), self._weights)
            return out.to(x.dtype)
        # Under expert parallelism a token has more choices than this rank has experts; a kernel's K is at most E.
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for part, part_weights in zip(ids.split(experts, 1), weights.split(experts, 1), strict=True):
            missing = experts - part.shape[1]
            routing = Routing(functional.pad(part, (0, missing), value=-1), functional.pad(part_weights, (0, missing)))
            total += kernel(rows, routing, self._weights)[0]
        return total.to(x.dtype)

    def _refresh(self, module: torch.nn.Module) -> None:
        """Drop whatever the module's parameters or activation have left behind since the last step."""
        tensors = Tensors.of(module)
        signature, gate = tensors.signature(), gate_settings(module)
        same_gate = len(gate) == len(self._gate) and all(map(operator.is_, gate, self._gate))
        if same_gate and signature == self._signature:
            return
        check_supported(module)
        if not same_gate or plan_signature(signature) != plan_signature(self._signature):
            self._kernels.clear()
        self._weights, self._signature, self._gate = None, signature, gate

    def _kernel(self, module: torch.nn.Module, top_k: int) -> MoEKernel:
        kernel = self._kernels.get(top_k)
        if kernel is None:
            plan = make_plan(module, top_k, self.requested)
            kernel = self._kernels[top_k] = MoEKernel(plan)
        if self._weights is None:
            self._weights = views(module, Tensors.of(module), kernel.plan.config.activation.gate_up_layout)
        return kernel

    def _live(self) -> Any:
        module = self._module()
        if module is None:
            raise MoEError(f"layer {self.key!r}: the transformers module behind it has been deleted")
        return module


_layers: weakref.WeakKeyDictionary[torch.nn.Module, BridgeLayer] = weakref.WeakKeyDictionary()
_by_identity: weakref.WeakValueDictionary[int, BridgeLayer] = weakref.WeakValueDictionary()
"""The same layers by their module's id: an entry is gone before the id can be used again."""


def layer_for(module: torch.nn.Module) -> BridgeLayer:
    """The state of one experts module; made on first use, gone with the module."""
    layer = _layers.get(module)
    if layer is None:
        layer = _layers[module] = _by_identity[id(module)] = BridgeLayer(module)
    return layer


@torch.compiler.assume_constant_result
def _layer_key(identity: int) -> str:
    """Runs while a graph is traced; the answer becomes a constant of the graph, guarded by the module's identity.

    It takes an id because torch 2.11 cannot hand a module to such a function. A module that never ran before is found
    among the living: once for all layers of a model, and never in a step.
    """
    if identity not in _by_identity:
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.nn.Module) and is_experts_module(thing):
                layer_for(thing)
    return _by_identity[identity].key


def experts_forward(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What transformers calls for a module with `experts_implementation="moe_core"`. See `BridgeLayer.forward`.

    Through the opaque op under compilation; directly otherwise, where the op would only cost host time.
    """
    if torch.compiler.is_compiling():
        # id() is also a guard: without it, a graph that was traced for one layer could serve another
        key = _layer_key(id(self))
        compiled: torch.Tensor = torch.ops.moe_core.experts_forward(hidden_states, top_k_index, top_k_weights, key)
        return compiled
    return _eagerly(layer_for(self), hidden_states, top_k_index, top_k_weights)


def call_layer(
    layer: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The same for a module that holds its layer itself, under `layer.layer_key` and with a `forward` like this."""
    if torch.compiler.is_compiling():
        key = layer.layer_key
        compiled: torch.Tensor = torch.ops.moe_core.experts_forward(hidden_states, top_k_index, top_k_weights, key)
        return compiled
    return _eagerly(layer, hidden_states, top_k_index, top_k_weights)


def _eagerly(
    layer: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    out: torch.Tensor = layer.forward(hidden_states, top_k_index, top_k_weights)
    if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
        out = _InferenceOnly.apply(out, hidden_states, top_k_weights)
    return out


def packed_experts_forward(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What transformers calls for a module with FP8 or FP4 weights: refuses, since no scheme is registered for them.

    Raises:
        UnsupportedError: always; it says what is packed how.
    """
    scales = [name for name, _ in self.named_parameters(recurse=False) if "scale" in name]
    raise UnsupportedError(f"{type(self).__name__}: {packed_text(self, Tensors.of(self), scales)}")


class _InferenceOnly(torch.autograd.Function):
    """Passes the output on, and raises where a gradient would silently have been lost."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise _no_gradient()


def _no_gradient() -> MoEError:
    return MoEError(
        "moe_core experts run inference only, and a gradient was asked of them; train with "
        "model.set_experts_implementation('grouped_mm')"
    )


_library = torch.library.Library("moe_core", "FRAGMENT")
_library.define("experts_forward(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, str layer) -> Tensor")
_library.define("experts_backward(Tensor gradient, Tensor hidden_states, Tensor topk_weights) -> (Tensor, Tensor)")


def _experts_forward(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer: str
) -> torch.Tensor:
    out: torch.Tensor = layer_of(layer).forward(hidden_states, topk_ids, topk_weights)
    return out


def _experts_backward(
    gradient: torch.Tensor, hidden_states: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A graph compiled with gradients enabled contains its backward, so the refusal must be an op of its own."""
    raise _no_gradient()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[2])


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    to_hidden, to_weights = torch.ops.moe_core.experts_backward(gradient, *ctx.saved_tensors)
    return to_hidden, None, to_weights, None


def _new_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


_library.impl("experts_forward", _experts_forward, "CompositeExplicitAutograd")
_library.impl("experts_backward", _experts_backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "moe_core::experts_forward", lambda hidden_states, *_: _new_like(hidden_states), lib=_library
)
torch.library.register_fake(
    "moe_core::experts_backward",
    lambda _, hidden_states, topk_weights: (_new_like(hidden_states), _new_like(topk_weights)),
    lib=_library,
)
torch.library.register_autograd("moe_core::experts_forward", _backward, setup_context=_setup_context, lib=_library)
