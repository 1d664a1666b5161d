"""`from_pretrained`: quantized checkpoints as transformers models whose experts stay packed.

    from moe_core.integrations.transformers.packed import from_pretrained
    model = from_pretrained(folder)

transformers has one quantizer for each format, and its own for some of these loses scales. This one is for all: the
installed plugins' `from_checkpoint_config` says who reads the format, that method's names say which tensors belong
together, and its `QuantSpec` what they stand for. Dense layers are dequantized to the model dtype while they load;
experts are streamed from the same files into a `RoutedExperts` each, and run by a plan.

Shape letters: T tokens · H hidden · I intermediate · E experts · K top-k.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.moe import ExpertsInterface
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import moe_core.checkpoint as checkpoints
from moe_core import formats
from moe_core.build import method_for_checkpoint, plan
from moe_core.config import MoEConfig
from moe_core.errors import CheckpointError, UnsupportedError
from moe_core.integrations.transformers.foreign import experts_modules, top_k_of
from moe_core.integrations.transformers.gates import recognise_gate
from moe_core.kernel import MoEKernel
from moe_core.packed import PackedMethod
from moe_core.quant import upright
from moe_core.routed_experts import RoutedExperts
from moe_core.select import Plan
from moe_core.types import Routing

METHOD = "moe_core"
IMPLEMENTATION = "moe_core_packed"
_EXPERTS = r"\.experts\.\d+\."


def from_pretrained(
    folder: str | Path,
    *,
    scheme: str | None = None,
    dispatch: str | None = None,
    experts: str | None = None,
    auto_class: Any = AutoModelForCausalLM,
    **arguments: Any,
) -> Any:
    """A transformers model of a quantized checkpoint folder, its experts packed.

    Args:
        folder: a local checkpoint with a `quantization_config` that an installed plugin claims.
        scheme: the scheme to run it in, where more than one can; None: the checkpoint's own.
        dispatch, experts: names of backends to insist on.
        auto_class: whose `from_pretrained` is called.
        arguments: what that takes besides, such as `dtype`.

    Raises:
        UnsupportedError: nobody reads the format, or nothing can run a layer.
        CheckpointError: an expert's tensor is missing or does not fit.
    """
    config = AutoConfig.from_pretrained(folder)
    stored = getattr(config, "quantization_config", None)
    if not stored:
        raise UnsupportedError(f"{folder}: config.json has no quantization_config; load it with transformers as it is")
    stored = dict(stored) if isinstance(stored, dict) else stored.to_dict()
    method_for_checkpoint(stored, scheme)  # refused before anything is read
    asked = PackedConfig(str(folder), stored, scheme, dispatch, experts)
    config.quantization_config = asked.to_dict()  # where a checkpoint has one, transformers looks for a dict
    return auto_class.from_pretrained(folder, config=config, experts_implementation=IMPLEMENTATION, **arguments)


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """What the quantizer has to know: the folder, its own `quantization_config`, and what the user asked for."""

    def __init__(
        self,
        folder: str,
        stored: dict[str, Any],
        scheme: str | None = None,
        dispatch: str | None = None,
        experts: str | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.folder, self.stored, self.scheme, self.dispatch, self.experts = folder, stored, scheme, dispatch, experts

    @property
    def method(self) -> PackedMethod:
        """A method of its own for each layer."""
        found = method_for_checkpoint(self.stored, self.scheme)
        if not isinstance(found, PackedMethod):
            raise UnsupportedError(f"{self.folder}: scheme {found.scheme.name} does not say what its dense layers hold")
        return found


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Dense layers: dequantized while they load. Experts: taken out before, put back packed afterwards."""

    requires_calibration = True
    is_trainable = False
    quantization_config: PackedConfig

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in experts_modules(model).values():
            inner, hidden = _sizes(module)
            vars(module)["_moe_core_sizes"] = (inner, hidden)
            for name in [*dict(module.named_parameters(recurse=False))]:
                delattr(module, name)
                # the model's own initialisation goes over these, and we know an experts module by having them
                setattr(module, name, torch.empty(0))
        ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {_EXPERTS, r"\.(k|v)_scale$"}
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Without the converters that would stack experts, with one that dequantizes all other layers."""
        kept = [c for c in weight_conversions if not _is_of_experts(c)]
        suffixes = ["weight", *(name for name in self.quantization_config.method.checkpoint_suffixes if "_" in name)]
        # before 5.18 patterns are searched unanchored, and "weight" would swallow "weight_scale" too
        return [*kept, WeightConverter([f"{name}$" for name in suffixes], "weight", operations=[_Dequantize(self)])]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        config = self.quantization_config
        modules = experts_modules(model)
        with checkpoints.Checkpoint.open(config.folder) as checkpoint:
            rules = (*checkpoints.RULES, *checkpoints.packed_rules(config.method.checkpoint_suffixes))
            blocks = {_numbers(name): name for name in checkpoints.expert_blocks(checkpoint, rules)}
            for name, module in modules.items():
                if _numbers(name) not in blocks:
                    raise CheckpointError(f"{config.folder}: no experts for {name!r}; blocks: {list(blocks.values())}")
                experts = _experts_of(model, name, module, config)
                checkpoints.load_experts(checkpoint, blocks[_numbers(name)], experts, rules)
                module.add_module("packed", experts)
        return model


class _Dequantize(ConversionOps):
    """A dense layer's tensors, collected by their names, as one weight in the model dtype."""

    def __init__(self, hf_quantizer: PackedQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *_: Any, **arguments: Any) -> dict[str, torch.Tensor]:
        method = self.hf_quantizer.quantization_config.method
        target, model = arguments["full_layer_name"], arguments["model"]
        dtype = model.get_parameter(target).dtype
        held: dict[str, torch.Tensor] = {}
        for pattern, value in input_dict.items():
            name = pattern.removesuffix("$")
            kind = method.checkpoint_suffixes.get(name, "")
            tensor = value[0] if isinstance(value, list) else value
            held[upright(kind)] = 1 / tensor.to(torch.float64) if upright(kind) != kind else tensor
        weight, scale = held[""], held.get("_scale")
        if scale is None:
            return {target: weight.to(dtype)}
        spec = method.weight
        if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
            scale = formats.decode_ue8m0(scale)
        grid = formats.scale_shape(spec.group_shape, weight.shape[0], weight.shape[1] * formats.codes_per_byte(spec))
        top = held["_global_scale"].reshape(()) if spec.second_level else None
        return {target: formats.dequantize(weight, scale.reshape(grid), spec, top).to(dtype)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("a packed checkpoint is not written back")


def _is_of_experts(converter: Any) -> bool:
    sources = getattr(converter, "_original_source_patterns", None) or converter.source_patterns
    return isinstance(converter, WeightConverter) and any(re.search(r"(?<!_)experts", source) for source in sources)


def _sizes(module: Any) -> tuple[int, int]:
    """(I, H) of an experts module as transformers made it."""
    experts, first, second = module.down_proj.shape
    assert experts == module.num_experts, f"{experts} experts, num_experts = {module.num_experts}"
    return (first, second) if module.is_transposed else (second, first)


def _numbers(name: str) -> tuple[int, ...]:
    """What stays the same where transformers renames a block: its layer's index."""
    return tuple(int(number) for number in re.findall(r"\d+", name))


def _experts_of(model: Any, name: str, module: Any, config: PackedConfig) -> RoutedExperts:
    """The empty `RoutedExperts` of one experts module, planned."""
    inner, hidden = module._moe_core_sizes
    activation, top_k = recognise_gate(module, inner), top_k_of(model, name)
    if isinstance(activation, str) or top_k is None:
        raise UnsupportedError(f"{name}: {activation if top_k is not None else 'its top-k is not known'}; not packed")
    layer = MoEConfig(
        num_experts=module.num_experts, top_k=top_k, hidden_size=hidden,
        intermediate_size=inner, dtype=model.dtype, activation=activation,
    )  # fmt: skip
    method, device = config.method, model.device
    chosen = plan(layer, scheme=method.scheme, dispatch=config.dispatch, experts=config.experts, device=device,
                  routing_is_external=True)  # fmt: skip
    experts = RoutedExperts(chosen, method, device)
    experts.kernel = MoEKernel(chosen)  # type: ignore[assignment]
    return experts


def packed_plans(model: torch.nn.Module) -> dict[str, Plan]:
    """Experts module → its plan, of a model that `from_pretrained` made."""
    modules: dict[str, Any] = dict(experts_modules(model))
    return {name: module.packed.kernel.plan for name, module in modules.items()}


def packed_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls for a whole experts module: `[..., H]`, ids and weights `[..., K]` → `[..., H]`."""
    experts = self.packed
    ids = top_k_index.reshape(-1, top_k_index.shape[-1])
    x = hidden_states.reshape(-1, hidden_states.shape[-1]).to(experts.config.dtype)
    with torch.no_grad():
        weights = top_k_weights.reshape(ids.shape).to(torch.float32)
        out, _ = experts.kernel(x, Routing(ids, weights), experts.weights)
    return out.to(hidden_states.dtype).reshape(hidden_states.shape)


ExpertsInterface.register(IMPLEMENTATION, packed_forward)
