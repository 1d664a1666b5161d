"""What a layer is (`MoEConfig`), how it is spread over ranks (`MoEParallelConfig`), and the `Problem` they make.

Everything here is frozen, validated at construction and free of device calls and of environment reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch

from moe_core.errors import MoEError
from moe_core.quant import UNQUANTIZED, QuantScheme
from moe_core.types import GATED_FUNCTIONS as GATED_FUNCTIONS  # beside `ActivationSpec`, for who writes one
from moe_core.types import UNGATED_FUNCTIONS as UNGATED_FUNCTIONS
from moe_core.types import (
    ActivationFormat,
    Device,
    DispatchCapabilities,
    ExpertPlacement,
    GateUpLayout,
    RoutedScaling,
    SharedExpertsOrder,
)

MODEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _one_of(*legal: Any) -> Any:
    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value not in legal:
            shown = ", ".join(repr(item) for item in legal)
            raise ValueError(f"{type(instance).__name__}.{attribute.name} = {value!r}; legal values: {shown}")

    return check


def _at_least(minimum: int) -> Any:
    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{type(instance).__name__}.{attribute.name} = {value!r}; legal values: int >= {minimum}")

    return check


def _number(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value == 0:
        raise ValueError(
            f"{type(instance).__name__}.{attribute.name} = {value!r}; legal values: a finite number, not 0"
        )


def _instance_of(kind: type) -> Any:
    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not isinstance(value, kind):
            raise ValueError(f"{type(instance).__name__}.{attribute.name} = {value!r}; legal values: a {kind.__name__}")

    return check


@attrs.frozen
class ActivationSpec:
    """The function between the two GEMMs of an expert, to the last detail.

    With a gate g and an up projection u the functions are: "silu" g·σ(g)·u; "gelu" (erf) and "gelu_tanh" gelu(g)·u;
    "swiglu_oai" g·σ(alpha·g)·(u + 1). Without a gate: "silu", "gelu" (erf), "relu2" relu(x)².

    Attributes:
        function: one of the names above.
        gate_up_layout: where gate and up stand in w13; None: there is no gate.
        limit: g is clamped to at most `limit` and u to [-limit, limit], before the function; None: no clamp.
        alpha: only of "swiglu_oai".
        bias: experts have biases on both projections.
    """

    function: str = attrs.field(default="silu", validator=_one_of(*GATED_FUNCTIONS, "relu2"))
    gate_up_layout: GateUpLayout | None = attrs.field(
        default=GateUpLayout.GATE_UP, validator=_one_of(*GateUpLayout, None)
    )
    limit: float | None = attrs.field(default=None, validator=attrs.validators.optional(_number))
    alpha: float = attrs.field(default=1.702, validator=_number)
    bias: bool = attrs.field(default=False, validator=_one_of(True, False))

    def __attrs_post_init__(self) -> None:
        legal = GATED_FUNCTIONS if self.gated else UNGATED_FUNCTIONS
        if self.function not in legal:
            kind = "with" if self.gated else "without"
            raise ValueError(
                f"ActivationSpec.function = {self.function!r} {kind} a gate (gate_up_layout = {self.gate_up_layout}); "
                f"legal values {kind} a gate: {', '.join(legal)}"
            )
        if self.limit is not None and not (self.gated and self.limit > 0):
            raise ValueError(f"ActivationSpec.limit = {self.limit!r}; legal values: None, or > 0 with a gate")

    @property
    def gated(self) -> bool:
        return self.gate_up_layout is not None


def _freeze_params(params: Mapping[str, Any] | tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(dict(params).items()))


@attrs.frozen
class RouterSpec:
    """Which router turns logits into ids and weights, and its parameters (validated by the router's own factory)."""

    name: str = "softmax"
    params: tuple[tuple[str, Any], ...] = attrs.field(default=(), converter=_freeze_params)

    @classmethod
    def of(cls, name: str, **params: Any) -> RouterSpec:
        """`RouterSpec.of("softmax", renormalize=True)`"""
        return cls(name, params)


@attrs.frozen(kw_only=True)
class MoEConfig:
    """One MoE layer, as its model defines it.

    Attributes:
        num_experts: E, global.
        top_k: K.
        hidden_size: H of the routed input (after a routed input transform, where there is one).
        padded_hidden_size: H of the weights, where they are stored wider than the model (zeros in the added rows and
            columns) for a kernel's sake; the runner pads and unpads. None: H.
        intermediate_size: I, of one whole expert, before any tensor-parallel split.
        dtype: of weights that are not quantized, of activations and of the output.
        activation: what stands between the two GEMMs.
        router: how logits become ids and weights.
        routed_scaling_factor: s, multiplied onto the routed output (see `RoutedScaling`).
        routed_scaling: the convention for s.
        router_weight_on_input: the router weight multiplies the experts' input instead of their output.
        has_shared_experts: the layer adds shared experts.
        shared_experts_order: when they run; None: decided by selection.
        placement: which rank holds which experts.
        max_tokens_per_rank: upper bound of T, for buffers that are sized once; None: only backends without such.
        cuda_graph: the step will be captured: only graph-capturable backends qualify.
        deterministic: only backends that give the same bits each time qualify.
        debug: check ids, rows and shapes on every step. It reads values on the host: not for service, not in graphs.
    """

    num_experts: int = attrs.field(validator=_at_least(1))
    top_k: int = attrs.field(validator=_at_least(1))
    hidden_size: int = attrs.field(validator=_at_least(1))
    intermediate_size: int = attrs.field(validator=_at_least(1))
    padded_hidden_size: int | None = attrs.field(default=None, validator=attrs.validators.optional(_at_least(1)))
    dtype: torch.dtype = attrs.field(default=torch.bfloat16, validator=_one_of(*MODEL_DTYPES))
    activation: ActivationSpec = attrs.field(default=ActivationSpec(), validator=_instance_of(ActivationSpec))
    router: RouterSpec = attrs.field(default=RouterSpec(), validator=_instance_of(RouterSpec))
    routed_scaling_factor: float = attrs.field(default=1.0, validator=_number)
    routed_scaling: RoutedScaling = attrs.field(default=RoutedScaling.ON_ROUTED, validator=_one_of(*RoutedScaling))
    router_weight_on_input: bool = attrs.field(default=False, validator=_one_of(True, False))
    has_shared_experts: bool = attrs.field(default=False, validator=_one_of(True, False))
    shared_experts_order: SharedExpertsOrder | None = attrs.field(
        default=None, validator=_one_of(*SharedExpertsOrder, None)
    )
    placement: ExpertPlacement = attrs.field(default=ExpertPlacement.LINEAR, validator=_one_of(*ExpertPlacement))
    max_tokens_per_rank: int | None = attrs.field(default=None, validator=attrs.validators.optional(_at_least(1)))
    cuda_graph: bool = attrs.field(default=False, validator=_one_of(True, False))
    deterministic: bool = attrs.field(default=False, validator=_one_of(True, False))
    debug: bool = attrs.field(default=False, validator=_one_of(True, False))

    def __attrs_post_init__(self) -> None:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"MoEConfig.top_k = {self.top_k}; legal values: 1 to num_experts = {self.num_experts} "
                "(a token cannot choose more experts than there are)"
            )
        if self.experts_hidden_size < self.hidden_size:
            raise ValueError(
                f"MoEConfig.padded_hidden_size = {self.padded_hidden_size}; legal values: None, or >= hidden_size = "
                f"{self.hidden_size}"
            )
        if self.routed_scaling is RoutedScaling.INVERSE_ON_SHARED and not self.has_shared_experts:
            raise ValueError(
                "MoEConfig.routed_scaling = INVERSE_ON_SHARED without shared experts would lose the factor; "
                "legal values without shared experts: ON_ROUTED"
            )
        if self.shared_experts_order is not None:
            runs = self.shared_experts_order is not SharedExpertsOrder.NONE
            if runs != self.has_shared_experts:
                raise ValueError(
                    f"MoEConfig.shared_experts_order = {self.shared_experts_order} with has_shared_experts = "
                    f"{self.has_shared_experts}; legal values: None (decided by selection), "
                    + ("or any order but NONE" if self.has_shared_experts else "or NONE")
                )

    @property
    def experts_hidden_size(self) -> int:
        """H as the weights and every backend see it."""
        return self.hidden_size if self.padded_hidden_size is None else self.padded_hidden_size


@attrs.frozen(kw_only=True)
class MoEParallelConfig:
    """How one MoE layer is spread over ranks, seen from one of them.

    Sizes are of the *experts*: with expert parallelism the outer tp × dp is folded into ep (see `fold`) and the
    experts themselves are not split, so tp_size is 1.

    Attributes:
        tp_size, tp_rank: ranks that share each expert's I.
        dp_size, dp_rank: groups of ranks, each with tokens of its own.
        ep_size, ep_rank: ranks that share the experts.
        sp_size, sp_rank: ranks that hold the rows of one token batch in turn (sequence parallel).
        dispatch: capabilities of the selected dispatch backend; selection fills it in, in `plan.parallel`.
    """

    tp_size: int = attrs.field(default=1, validator=_at_least(1))
    tp_rank: int = attrs.field(default=0, validator=_at_least(0))
    dp_size: int = attrs.field(default=1, validator=_at_least(1))
    dp_rank: int = attrs.field(default=0, validator=_at_least(0))
    ep_size: int = attrs.field(default=1, validator=_at_least(1))
    ep_rank: int = attrs.field(default=0, validator=_at_least(0))
    sp_size: int = attrs.field(default=1, validator=_at_least(1))
    sp_rank: int = attrs.field(default=0, validator=_at_least(0))
    dispatch: DispatchCapabilities | None = attrs.field(default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        for axis in ("tp", "dp", "ep", "sp"):
            size, rank = getattr(self, f"{axis}_size"), getattr(self, f"{axis}_rank")
            if rank >= size:
                raise ValueError(
                    f"MoEParallelConfig.{axis}_rank = {rank}; legal values: 0 to {axis}_size - 1 = {size - 1}"
                )
        if self.tp_size > 1 and self.ep_size > 1:
            raise ValueError(
                f"MoEParallelConfig.tp_size = {self.tp_size} with ep_size = {self.ep_size}: experts are either split "
                "(tp_size) or shared out whole (ep_size); legal values: one of the two is 1. "
                "MoEParallelConfig.fold(…, expert_parallel=True) folds tp × dp into ep"
            )

    @classmethod
    def fold(
        cls,
        *,
        tp_size: int = 1,
        tp_rank: int = 0,
        dp_size: int = 1,
        dp_rank: int = 0,
        expert_parallel: bool = False,
        sequence_parallel: bool = False,
    ) -> MoEParallelConfig:
        """From the sizes of the model around the layer to the layer's own.

        With `expert_parallel`, ep_size = tp_size · dp_size, ep_rank = dp_rank · tp_size + tp_rank, and the experts'
        tp_size is 1. With `sequence_parallel`, the tp ranks hold the rows of one batch in turn (sp_size = tp_size),
        so every ep rank has tokens of its own.
        """
        sp = (tp_size, tp_rank) if sequence_parallel else (1, 0)
        common: dict[str, Any] = {"dp_size": dp_size, "dp_rank": dp_rank, "sp_size": sp[0], "sp_rank": sp[1]}
        if not expert_parallel:
            return cls(tp_size=tp_size, tp_rank=tp_rank, **common)
        cls(tp_size=tp_size, tp_rank=tp_rank, **common)  # validates the outer ranks before they are folded
        return cls(ep_size=tp_size * dp_size, ep_rank=dp_rank * tp_size + tp_rank, **common)

    @property
    def tokens_are_replicated(self) -> bool:
        """Every rank of the layer holds the same tokens, so that a sum over ranks completes the output.

        Ranks of another dp group belong to this layer only where they share its experts (ep_size > 1).
        """
        return (self.dp_size == 1 or self.ep_size == 1) and self.sp_size == 1

    def _selected(self, question: str) -> DispatchCapabilities:
        if self.dispatch is None:
            raise MoEError(
                f"MoEParallelConfig.{question} is an answer of the selected dispatch backend, and none is selected "
                "yet: read plan.parallel"
            )
        return self.dispatch

    @property
    def use_batched_activation_format(self) -> bool:
        """The selected dispatch delivers `[E_l, C, H]`."""
        return self._selected("use_batched_activation_format").activation_format is ActivationFormat.BATCHED

    @property
    def needs_round_robin_routing_tables(self) -> bool:
        """The selected dispatch wants physical ids under round-robin placement. Another fact than the format."""
        return self._selected("needs_round_robin_routing_tables").needs_round_robin_routing_tables


@attrs.frozen(kw_only=True)
class Problem:
    """All that a backend may look at when it decides whether it can run: what `refuse` gets.

    Attributes:
        config: the layer.
        parallel: its spread over ranks.
        scheme: how its weights and activations are quantized.
        device: where it will run.
        routing_is_external: ids and weights come from outside (a bridge), so logits are not to be had.
    """

    config: MoEConfig
    parallel: MoEParallelConfig = MoEParallelConfig()
    scheme: QuantScheme = UNQUANTIZED
    device: Device = Device("cpu")
    routing_is_external: bool = False

    def __attrs_post_init__(self) -> None:
        if self.parallel.ep_size > self.config.num_experts:
            raise ValueError(
                f"MoEParallelConfig.ep_size = {self.parallel.ep_size}; legal values: 1 to num_experts = "
                f"{self.config.num_experts} (every rank holds at least one expert)"
            )
        if self.config.intermediate_size % self.parallel.tp_size:
            raise ValueError(
                f"MoEParallelConfig.tp_size = {self.parallel.tp_size}; legal values: divisors of intermediate_size = "
                f"{self.config.intermediate_size}"
            )

    @property
    def num_local_experts(self) -> int:
        """E_l: the first E mod W ranks hold one expert more, in both placements."""
        share, remainder = divmod(self.config.num_experts, self.parallel.ep_size)
        return share + (self.parallel.ep_rank < remainder)

    @property
    def local_intermediate_size(self) -> int:
        """I per rank."""
        return self.config.intermediate_size // self.parallel.tp_size
