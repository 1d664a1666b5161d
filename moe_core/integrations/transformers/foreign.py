"""Reading a transformers experts module: its flags, its parameters, and views on them. Nothing is ever written to it.

Shape letters: H hidden · I intermediate per rank · E experts (under expert parallelism: those of this rank) · K top-k.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch

from moe_core.config import MODEL_DTYPES, ActivationSpec, MoEConfig
from moe_core.errors import UnsupportedError
from moe_core.integrations.transformers.quantized import refuse_lost_scales
from moe_core.plugins import registry
from moe_core.types import ExpertWeights, GateUpLayout

_KNOWN_FLAGS = frozenset({"has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated"})
_TOP_K_NAMES = (
    "num_experts_per_tok",
    "top_k",
    "moe_k",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "num_experts_per_token",
    "num_selected_experts",
)

_GATE_SETTINGS = ("limit", "swiglu_limit", "alpha", "swiglu_alpha")
_PLAIN = (torch.nn.Parameter, torch.Tensor)

Signature = tuple[tuple[Any, ...], ...]


def is_experts_module(module: torch.nn.Module) -> bool:
    """Does this module's forward go through transformers' experts interface? The decorator leaves these marks."""
    return "is_transposed" in vars(module) and "has_gate" in vars(module) and hasattr(module, "down_proj")


def experts_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every experts module of a model that goes through transformers' experts interface, by module name."""
    return {name: module for name, module in model.named_modules() if is_experts_module(module)}


def top_k_of(model: torch.nn.Module, name: str) -> int | None:
    """K of the experts module `name`, from its own, its siblings', its parent's or its config's attributes."""
    module = model.get_submodule(name)
    parent = model.get_submodule(name.rpartition(".")[0])
    for owner in (module, *parent.children(), parent, getattr(module, "config", None)):
        for attribute in _TOP_K_NAMES:
            value = getattr(owner, attribute, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


@attrs.frozen(eq=False)
class Tensors:
    """A module's own expert tensors, as it stores them.

    Attributes:
        up: `[E, 2I, H]`, without a gate `[E, I, H]`; transposed: the last two swapped.
        down: `[E, H, I]`; transposed: `[E, I, H]`.
        up_bias: `[E, 2I]` (`[E, I]`) or None.
        down_bias: `[E, H]` or None.
    """

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @classmethod
    def of(cls, module: Any) -> Tensors:
        """Look them up; this runs on every step."""
        up = "gate_up_proj" if module.has_gate else "up_proj"
        if not getattr(module, "has_bias", False):
            return cls(_local(getattr(module, up)), _local(module.down_proj))
        up_bias, down_bias = getattr(module, f"{up}_bias"), module.down_proj_bias
        return cls(_local(getattr(module, up)), _local(module.down_proj), _local(up_bias), _local(down_bias))

    def signature(self) -> Signature:
        """Differs whenever a view made from these tensors would be stale. Host arithmetic only."""
        return tuple(
            (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            for tensor in (self.up, self.down, self.up_bias, self.down_bias)
            if tensor is not None
        )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a distributed tensor (transformers' expert and tensor parallelism); others as they are."""
    if type(tensor) in _PLAIN or not hasattr(tensor, "to_local"):
        return tensor
    local: torch.Tensor = tensor.to_local()
    return local


def gate_settings(module: torch.nn.Module) -> tuple[Any, ...]:
    """What the module's gate depends on besides its code: its activation, limit and alpha. Runs on every step."""
    own = vars(module)
    return (getattr(module, "act_fn", None), *(own.get(name) for name in _GATE_SETTINGS))


def plan_signature(signature: Signature) -> Signature:
    """The part of a signature that a plan depends on: shapes, dtypes, devices."""
    return tuple((shape, dtype, device) for _, shape, _, dtype, device in signature)


def check_supported(module: torch.nn.Module) -> None:
    """Refuse what would come out wrong: packed weights, flags of a later transformers, shapes that disagree.

    Raises:
        UnsupportedError: naming the module's class, what is in the way, and what to do.
    """
    who = type(module).__name__
    refuse_lost_scales(who, getattr(module, "config", None))
    tensors = Tensors.of(module)
    scales = [name for name, _ in module.named_parameters(recurse=False) if "scale" in name]
    if scales or tensors.up.dtype not in MODEL_DTYPES or tensors.down.dtype != tensors.up.dtype:
        raise UnsupportedError(f"{who}: {packed_text(module, tensors, scales)}")
    subclass = next((type(t) for t in (tensors.up, tensors.down) if type(t) not in _PLAIN), None)
    if subclass is not None:
        raise UnsupportedError(
            f"{who}: its expert weights are {subclass.__module__}.{subclass.__name__}, a tensor class of its own (a "
            "quantized one, say) whose storage moe-core cannot read; load the model without that quantization"
        )
    strange = [
        name
        for name, value in vars(module).items()
        if name.startswith(("has_", "is_")) and value is True and name not in _KNOWN_FLAGS
    ]
    if strange:
        raise UnsupportedError(
            f"{who} sets {', '.join(strange)} = True, which this version of moe-core does not know; it will not guess "
            "what that changes. Upgrade moe-core, or use experts_implementation='grouped_mm'"
        )
    _check_shapes(module, tensors)


def packed_text(module: torch.nn.Module, tensors: Tensors, scales: list[str]) -> str:
    """What is packed how, and which kind of package would read it."""
    stored = str(tensors.up.dtype).removeprefix("torch.")
    block = getattr(module, "block_size", None)
    details = f"dtype {stored}" + (f", scales {', '.join(scales)}" if scales else "")
    details += f", block size {tuple(block)}" if block else ""
    known = ", ".join(sorted(registry().quant_methods))
    package = "moe-quant-fp8" if "float8" in stored else "moe-quant-nvfp4" if tensors.up.element_size() == 1 else ""
    advice = (
        f"a plugin that reads it is a package named moe-quant-… ({package})"
        if package
        else (f"legal dtypes: {', '.join(str(dtype).removeprefix('torch.') for dtype in MODEL_DTYPES)}")
    )
    return (
        f"its expert weights are stored as {details}, and no installed plugin has registered a scheme for them with "
        f"the transformers bridge (schemes here: {known}); {advice}. To run without one, load the model dequantized: "
        "dtype=torch.bfloat16, or quantization_config with dequantize=True"
    )


def _check_shapes(module: torch.nn.Module, tensors: Tensors) -> None:
    who, factor = type(module).__name__, 2 if module.has_gate else 1
    w13, w2 = _oriented(module, tensors.up), _oriented(module, tensors.down)
    fits = w13.ndim == w2.ndim == 3 and w13.shape == (w2.shape[0], factor * w2.shape[2], w2.shape[1])
    if not fits or module.num_experts != w2.shape[0]:
        raise UnsupportedError(
            f"{who}: parameters of shape {tuple(tensors.up.shape)} and {tuple(tensors.down.shape)} with num_experts = "
            f"{module.num_experts}, is_transposed = {module.is_transposed}, has_gate = {module.has_gate} do not make "
            "[E, 2I, H] and [E, H, I]; use experts_implementation='eager' for this model"
        )


def _oriented(module: torch.nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """A stored projection as `[E, out, in]`: a view."""
    tensor = tensor.detach()
    return tensor.transpose(-2, -1) if module.is_transposed else tensor


def config_of(module: torch.nn.Module, top_k: int, activation: ActivationSpec, debug: bool = False) -> MoEConfig:
    """The layer as moe-core describes it. Under expert parallelism, where E is this rank's share, K is cut to it."""
    w2 = _oriented(module, Tensors.of(module).down)
    experts, hidden, intermediate = w2.shape
    if getattr(module, "_is_expert_parallel", True):  # before 5.18 nothing says whether it is
        top_k = min(top_k, experts)
    return MoEConfig(
        num_experts=experts,
        top_k=top_k,
        hidden_size=hidden,
        intermediate_size=intermediate,
        dtype=w2.dtype,
        activation=activation,
        debug=debug,
    )


def views(module: torch.nn.Module, tensors: Tensors, layout: GateUpLayout | None) -> ExpertWeights:
    """The module's own storage, as experts read it. Copies nothing."""
    return ExpertWeights(
        w13=_oriented(module, tensors.up),
        w2=_oriented(module, tensors.down),
        gate_up_layout=layout,
        w13_bias=None if tensors.up_bias is None else tensors.up_bias.detach(),
        w2_bias=None if tensors.down_bias is None else tensors.down_bias.detach(),
    )
