"""`MoERunner`: one MoE layer, from hidden states to output, and the opaque ops behind which `torch.compile` sees it.

Shape letters: T tokens on this rank · H hidden · E experts, global · K top-k.

    hidden_states ─ input transform ─ pad ─┬─ gate ─ route ─ prepare ─ experts ─ finalize ─┐   (opaque op, route on)
                                           └─ shared experts ──────────────────────────────┤
    out ◄─ add shared ◄─ output transform ◄─ reduce ◄─ scale ◄─ unpad ◄────────────────────┘
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from moe_core.errors import CollectiveError, MoEError, UnsupportedError
from moe_core.expert_load import ExpertLoad
from moe_core.hookspecs import PLUGIN_API, hookimpl
from moe_core.interfaces import Group, MoERunnerInterface, Router
from moe_core.kernel import MoEKernel
from moe_core.quant import QuantMethod
from moe_core.routed_experts import RoutedExperts
from moe_core.select import Plan
from moe_core.shared_experts import SharedExperts
from moe_core.types import Duty, RoutedScaling, Routing

moe_core_api = PLUGIN_API


class MoERunner(torch.nn.Module, MoERunnerInterface):
    """The built-in runner. `moe_core.build_runner` makes one; its arguments are documented there.

    Args:
        plan: the layer's plan.
        routed_experts: the weights.
        router: logits → ids and weights.
        group: the ranks of this layer; None: one rank.
        replan: `replan(scheme=…)` plans the same layer for another scheme.
        gate: `[T, H] → [T, E]`, if the runner is to hold it.
        shared_experts: what every token visits.
        correction_bias: `[E]` float32 for routers that choose by biased scores.
        routed_input_transform, routed_output_transform: around the routed experts only (latent MoE).
    """

    correction_bias: torch.Tensor | None

    def __init__(
        self,
        plan: Plan,
        routed_experts: RoutedExperts,
        router: Router,
        *,
        replan: Callable[..., Plan],
        group: Group | None = None,
        gate: torch.nn.Module | None = None,
        shared_experts: SharedExperts | None = None,
        correction_bias: torch.Tensor | None = None,
        routed_input_transform: torch.nn.Module | None = None,
        routed_output_transform: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        if plan.config.has_shared_experts != (shared_experts is not None):
            raise ValueError(
                f"MoEConfig.has_shared_experts = {plan.config.has_shared_experts}, but shared_experts = "
                f"{shared_experts}; set both or neither"
            )
        if Duty.ROUTED_SCALING in router.owns and plan.config.routed_scaling_factor != 1.0:
            raise UnsupportedError(
                f"{Duty.ROUTED_SCALING.value} must have one owner, but is claimed by runner and router "
                f"{plan.config.router.name}; set MoEConfig.routed_scaling_factor = 1.0"
            )
        _check_shared_split(plan, shared_experts)
        self.routed_experts = routed_experts
        self.gate = gate
        self.routed_input_transform = routed_input_transform
        self.routed_output_transform = routed_output_transform
        self._shared_experts = shared_experts
        self.register_buffer("correction_bias", correction_bias)
        self._load: ExpertLoad | None = None
        self._router = router
        self._group = group
        self._replan = replan
        self._kernel = self._kernel_of(plan)
        self._layer_key = register_layer(self)

    @property
    def plan(self) -> Plan:
        return self._kernel.plan

    @property
    def is_internal_router(self) -> bool:
        return self.gate is not None

    @property
    def shared_experts(self) -> SharedExperts | None:
        return self._shared_experts

    @property
    def kernel(self) -> MoEKernel:
        """The kernel in force: stages for an engine that interleaves micro-batches, sizes for one that plans memory."""
        return self._kernel

    @property
    def load(self) -> ExpertLoad | None:
        """How often each expert was chosen, since `count_load`; None: nobody counts."""
        return self._load

    def count_load(self) -> ExpertLoad:
        """Count from now on how often each expert is chosen. Before a graph is captured, or its replays don't count."""
        self._load = self._load or ExpertLoad(self.plan.config.num_experts, self.routed_experts.device)
        return self._load

    def check(self) -> None:
        self._kernel.check()

    def replace_quant_method(self, method: QuantMethod) -> None:
        """Swap the quantization method: new plan, new kernel, new (empty) weights to be loaded and packed."""
        plan = self._replan(scheme=method.scheme)
        self.routed_experts = RoutedExperts(plan, method, self.routed_experts.device)
        self._kernel = self._kernel_of(plan)

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor | None = None,
        shared_experts_input: torch.Tensor | None = None,
        num_valid_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `MoERunnerInterface.forward`."""
        shape = hidden_states.shape
        tokens = hidden_states.reshape(-1, shape[-1])
        logits = self._logits(tokens, router_logits)
        shared_in = None
        if self._shared_experts is not None:
            shared_in = tokens if shared_experts_input is None else shared_experts_input.flatten(0, -2)
        routed_in = tokens if self.routed_input_transform is None else self.routed_input_transform(tokens)
        routed_in = self._pad(routed_in)
        routed, shared = self._step(routed_in, logits, shared_in, num_valid_tokens)
        out = self._assemble(self._unpad(routed), shared)
        return out.reshape(*shape[:-1], out.shape[-1])

    def _logits(self, tokens: torch.Tensor, router_logits: torch.Tensor | None) -> torch.Tensor:
        if (router_logits is None) != self.is_internal_router:
            raise ValueError(
                "this runner holds the gate, so router_logits must be None"
                if self.is_internal_router
                else "router_logits is None, and this runner holds no gate: pass logits, or build it with gate=…"
            )
        if self.gate is not None:
            logits: torch.Tensor = self.gate(tokens)
            return logits
        assert router_logits is not None
        logits = router_logits.reshape(-1, router_logits.shape[-1])
        expected = (tokens.shape[0], self.plan.config.num_experts)
        if tuple(logits.shape) != expected:
            raise ValueError(f"router_logits have shape {tuple(router_logits.shape)}; expected (T, E) = {expected}")
        return logits

    def _pad(self, tokens: torch.Tensor) -> torch.Tensor:
        config = self.plan.config
        missing = config.experts_hidden_size - tokens.shape[-1]
        if tokens.dtype != config.dtype:
            raise ValueError(f"hidden_states are {tokens.dtype}; this layer is built for dtype = {config.dtype}")
        if tokens.shape[-1] != config.hidden_size:
            raise ValueError(
                f"hidden_states have H = {tokens.shape[-1]}; this layer has hidden_size = {config.hidden_size}"
            )
        return functional.pad(tokens, (0, missing)) if missing else tokens

    def _unpad(self, routed: torch.Tensor) -> torch.Tensor:
        config = self.plan.config
        padded = config.experts_hidden_size != config.hidden_size
        return routed[:, : config.hidden_size].contiguous() if padded else routed

    def _step(
        self,
        routed_in: torch.Tensor,
        logits: torch.Tensor,
        shared_in: torch.Tensor | None,
        num_valid_tokens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Through the opaque op under compilation; directly otherwise, where the op would only cost host time."""
        if not torch.compiler.is_compiling():
            return self.run_step(routed_in, logits, shared_in, num_valid_tokens)
        ops = torch.ops.moe_core
        if shared_in is None:
            return ops.moe_forward(routed_in, logits, num_valid_tokens, self._layer_key), None
        routed, shared = ops.moe_forward_shared(routed_in, logits, shared_in, num_valid_tokens, self._layer_key)
        return routed, shared

    @torch.no_grad()
    def run_step(
        self,
        routed_in: torch.Tensor,
        logits: torch.Tensor,
        shared_in: torch.Tensor | None,
        num_valid_tokens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the opaque ops run: route, then the kernel. `[T, H]` in, routed `[T, H]` and the shared output out."""
        padding = None
        if num_valid_tokens is not None:
            rows = torch.arange(routed_in.shape[0], device=routed_in.device)
            padding = (rows >= num_valid_tokens).unsqueeze(1)
        if self.plan.routes_internally:
            shared_out = None if self._shared_experts is None else self._shared_experts(shared_in)
            routed = self._kernel.run_from_logits(routed_in, logits, self.routed_experts.weights)
            return (routed if padding is None else routed.masked_fill(padding, 0.0)), shared_out
        routing = self._router.select_experts(logits, self.correction_bias)
        if padding is not None:
            routing = Routing(routing.topk_ids.masked_fill(padding, -1), routing.topk_weights)
        if self._load is not None:
            self._load.add(routing.topk_ids)
        return self._run_kernel(routed_in, routing, shared_in)

    def _run_kernel(
        self, routed_in: torch.Tensor, routing: Routing, shared_in: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """From routing on: `MoEKernel.__call__`."""
        return self._kernel(
            routed_in,
            routing,
            self.routed_experts.weights,
            shared_experts=self._shared_experts,
            shared_experts_input=shared_in,
        )

    def _kernel_of(self, plan: Plan, *, agree: bool = True) -> MoEKernel:
        """The kernel that runs a plan. `agree`: as for `MoEKernel`."""
        return MoEKernel(plan, self._group, agree=agree)

    def _assemble(self, routed: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
        """Scale, reduce, transform and add: each exactly once, by the plan's ledger."""
        plan, config = self.plan, self.plan.config
        on_routed = config.routed_scaling is RoutedScaling.ON_ROUTED
        if config.routed_scaling_factor != 1.0 and on_routed:
            routed = routed * config.routed_scaling_factor
        reduces_routed = not plan.output_is_reduced
        reduces_shared = self._shared_experts is not None and self._shared_experts.output_is_partial
        # one sum over ranks for both where nothing stands between them
        shared_group = self._shared_experts.group or self._group if self._shared_experts is not None else None
        joint = (
            reduces_routed and reduces_shared and self.routed_output_transform is None and shared_group is self._group
        )
        if reduces_routed and not joint:
            routed = self._all_reduce(routed, self._group)
        if shared is None:
            return routed if self.routed_output_transform is None else self.routed_output_transform(routed)
        if reduces_shared and not joint:
            shared = self._all_reduce(shared, shared_group)
        if not on_routed:
            shared = shared / config.routed_scaling_factor
        if self.routed_output_transform is not None:
            routed = self.routed_output_transform(routed)
        out = routed + shared
        return self._all_reduce(out, self._group) if joint else out

    def _all_reduce(self, tensor: torch.Tensor, group: Group | None) -> torch.Tensor:
        if group is None:
            raise MoEError(
                "this layer's output is a sum over ranks, and the runner has no group: build it with group=…"
            )
        try:
            return group.all_reduce(tensor)
        except CollectiveError as error:
            error.during("sum over ranks")
            raise

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle carries the plan; the kernel is made anew, since backends may hold device buffers."""
        state = self.__dict__.copy()
        state["_kernel"] = self.plan
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._kernel = self._kernel_of(state["_kernel"], agree=False)
        self._layer_key = register_layer(self)  # a copy is a layer of its own


def _check_shared_split(plan: Plan, shared_experts: SharedExperts | None) -> None:
    """A sum over ranks that have different tokens would mix them."""
    parallel = plan.problem.parallel
    if shared_experts is None or not shared_experts.output_is_partial or shared_experts.group is not None:
        return
    if not parallel.tokens_are_replicated:
        raise MoEError(
            f"the shared experts are split over ranks (output_is_partial), and with dp_size = {parallel.dp_size}, "
            f"sp_size = {parallel.sp_size} the layer's ranks have different tokens: pass SharedExperts(…, group=the "
            "ranks that it is split over and that have the same tokens), or keep it whole on every rank"
        )


_layers: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register_layer(layer: object) -> str:
    """A key for `layer`, unique in this process; it dies with the layer."""
    key = f"moe_layer_{next(_numbers)}"
    _layers[key] = layer
    return key


def layer_of(key: str) -> Any:
    """The layer that an opaque op was given the key of."""
    layer = _layers.get(key)
    if layer is None:
        raise MoEError(
            f"the opaque op was called for layer {key!r}, which does not exist any more: the model that this code was "
            "compiled for has been deleted; compile again"
        )
    return layer


_library = torch.library.Library("moe_core", "FRAGMENT")
_library.define(
    "moe_forward(Tensor hidden_states, Tensor router_logits, Tensor? num_valid_tokens, str layer) -> Tensor"
)
_library.define(
    "moe_forward_shared(Tensor hidden_states, Tensor router_logits, Tensor shared_experts_input, "
    "Tensor? num_valid_tokens, str layer) -> (Tensor, Tensor)"
)


def _moe_forward(
    hidden_states: torch.Tensor, router_logits: torch.Tensor, num_valid_tokens: torch.Tensor | None, layer: str
) -> torch.Tensor:
    routed, _ = layer_of(layer).run_step(hidden_states, router_logits, None, num_valid_tokens)
    return routed


def _moe_forward_shared(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    shared_experts_input: torch.Tensor,
    num_valid_tokens: torch.Tensor | None,
    layer: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return layer_of(layer).run_step(hidden_states, router_logits, shared_experts_input, num_valid_tokens)


def _contiguous_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


_library.impl("moe_forward", _moe_forward, "CompositeExplicitAutograd")
_library.impl("moe_forward_shared", _moe_forward_shared, "CompositeExplicitAutograd")
torch.library.register_fake(
    "moe_core::moe_forward", lambda hidden_states, *_: _contiguous_like(hidden_states), lib=_library
)
torch.library.register_fake(
    "moe_core::moe_forward_shared",
    # the shared output follows its own input, which in a latent MoE is wider than the routed one
    lambda hidden_states, _, shared_in, *__: (_contiguous_like(hidden_states), _contiguous_like(shared_in)),
    lib=_library,
)


@hookimpl
def moe_core_register_runners(register: Callable[..., None]) -> None:
    register("default", MoERunner)
