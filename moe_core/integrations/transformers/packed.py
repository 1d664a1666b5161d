"""`from_pretrained`: quantized checkpoints as transformers models whose experts stay packed.

    from moe_core.integrations.transformers.packed import from_pretrained
    model = from_pretrained(folder)
    model = from_pretrained(floating_point_folder, scheme="nvfp4")  # experts are quantized while they load

transformers has one quantizer for each format, and its own for some of these loses scales. This one is for all: the
installed plugins' `from_checkpoint_config` says who reads the format, that method's names say which tensors belong
together, and its `QuantSpec` what they stand for. Dense layers are dequantized to the model dtype while they load;
experts are streamed from the same files into a `RoutedExperts` each, and run by a plan. A checkpoint of floating-point
weights goes the same way under a scheme's name: its experts are quantized one after the other, all else stays as it is.

Formats that transformers has no quantizer for (ModelOpt's) come here from its own `from_pretrained` too, once this
module is imported.

Shape letters: T tokens · H hidden · I intermediate · E experts · K top-k.
"""

from __future__ import annotations

import contextvars
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.moe import ExpertsInterface
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import moe_core.checkpoint as checkpoints
from moe_core import formats
from moe_core.build import method_for_checkpoint, method_for_floats, plan
from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.errors import CheckpointError, MoEError, UnsupportedError
from moe_core.integrations.transformers.foreign import experts_modules, top_k_of
from moe_core.integrations.transformers.gates import recognise_gate
from moe_core.integrations.transformers.layer import call_layer
from moe_core.integrations.transformers.spread import run_in_turn
from moe_core.interfaces import Group
from moe_core.kernel import MoEKernel
from moe_core.packed import PackedMethod
from moe_core.quant import UNQUANTIZED, QuantMethod, upright
from moe_core.routed_experts import RoutedExperts
from moe_core.runner import register_layer
from moe_core.select import Plan
from moe_core.types import Routing

METHOD = "moe_core"
UNKNOWN_TO_TRANSFORMERS = "modelopt"
"""A `quant_method` that transformers has no quantizer for: it would load the numbers and ignore their scales."""
IMPLEMENTATION = "moe_core_packed"
_EXPERTS = r"\.experts\.(\d+\.|(gate_up|down)_proj)"


@attrs.frozen
class _Request:
    """What a caller of `from_pretrained` asks beyond what a config can say."""

    scheme: str | None = None
    dispatch: str | None = None
    experts: str | None = None
    parallel: MoEParallelConfig = MoEParallelConfig()
    group: Group | None = None
    debug: bool = False
    max_tokens_per_rank: int | None = None
    progress: Callable[[int, int], None] | None = None


_asked: contextvars.ContextVar[_Request | None] = contextvars.ContextVar("moe_core_packed_request", default=None)


def from_pretrained(
    folder: str | Path,
    *,
    scheme: str | None = None,
    dispatch: str | None = None,
    experts: str | None = None,
    parallel: MoEParallelConfig | None = None,
    group: Group | None = None,
    debug: bool = False,
    max_tokens_per_rank: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    auto_class: Any = AutoModelForCausalLM,
    **arguments: Any,
) -> Any:
    """A transformers model of a checkpoint folder, its experts packed.

    Args:
        folder: a local checkpoint with a `quantization_config` that an installed plugin claims; one without any, where
            `scheme` is given or there are several ranks.
        scheme: the scheme to run it in, where more than one can; None: the checkpoint's own. Floating-point experts
            are quantized to it while they load, one after the other.
        dispatch, experts: names of backends to insist on.
        parallel: how the experts are spread over ranks (ep_size or tp_size); each rank reads and holds its own share
            of them, and all the rest of the model. None: one rank.
        group: the ranks, where there is more than one; all must be given the same tokens.
        debug: check ids and shapes on every step, which reads values on the host.
        max_tokens_per_rank: how many tokens a rank dispatches at once, where the tokens are shared out too (sp_size).
        progress: called with (experts done, experts of all layers on this rank) after each one.
        auto_class: whose `from_pretrained` is called.
        arguments: what that takes besides, such as `dtype`.

    Raises:
        UnsupportedError: nobody reads the format, or nothing can run a layer.
        CheckpointError: an expert's tensor is missing or does not fit.
    """
    theirs = sorted({"tp_plan", "tp_size", "distributed_config", "device_mesh"} & arguments.keys())
    if theirs:
        raise UnsupportedError(
            f"{folder}: {', '.join(theirs)} would have transformers split experts that it does not hold; pass "
            "parallel= and group= instead"
        )
    config = AutoConfig.from_pretrained(folder)
    stored = checkpoints.quantization_config(Path(folder), config.to_dict())
    if not stored and group is None and scheme is None:
        raise UnsupportedError(
            f"{folder}: config.json has no quantization_config; load it with transformers as it is, or name a scheme: "
            "then its experts are quantized while they load"
        )
    _method_of(stored, scheme)  # refused before anything is read
    # where there is one, a dict is looked for
    config.quantization_config = PackedConfig(METHOD, stored or {}).to_dict()
    spread = parallel or MoEParallelConfig()
    token = _asked.set(_Request(scheme, dispatch, experts, spread, group, debug, max_tokens_per_rank, progress))
    try:
        return auto_class.from_pretrained(folder, config=config, **arguments)
    finally:
        _asked.reset(token)


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint, as it is stored there, under the name that leads to the quantizer.

    Args:
        quant_method: `METHOD`, or the checkpoint's own.
        stored: all of it, {} where there is none; None: `rest` is.
        rest: what transformers reads from config.json.
    """

    def __init__(self, quant_method: str, stored: dict[str, Any] | None = None, **rest: Any) -> None:
        self.quant_method = quant_method
        self.stored = {"quant_method": quant_method, **rest} if stored is None else stored


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Dense layers: dequantized while they load. Experts: taken out before, put back packed afterwards."""

    requires_calibration = True
    is_trainable = False
    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **arguments: Any) -> None:
        super().__init__(quantization_config, **arguments)
        self.request = _asked.get() or _Request()
        self.folder = Path()
        self.method()  # refused before anything is read

    def method(self) -> QuantMethod:
        """A method of its own for each layer."""
        return _method_of(self.quantization_config.stored, self.request.scheme)

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> Any:
        if not checkpoint_files:
            raise UnsupportedError("packed experts are read from safetensors files, and there are none to load from")
        self.folder = Path(checkpoint_files[0]).parent
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
        method = self.method()
        if not self.quantization_config.stored or not isinstance(method, PackedMethod):
            return kept
        suffixes = ["weight", *(name for name in method.checkpoint_suffixes if "_" in name)]
        # before 5.18 patterns are searched unanchored, and "weight" would swallow "weight_scale" too
        return [
            *kept,
            WeightConverter([f"{name}$" for name in suffixes], "weight", operations=[_Dequantize(method)]),
        ]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        modules = experts_modules(model)
        with checkpoints.Checkpoint.open(self.folder) as checkpoint:
            rules = (*checkpoints.RULES, *checkpoints.packed_rules(self.method().checkpoint_suffixes))
            blocks = {_numbers(name): name for name in checkpoints.expert_blocks(checkpoint, rules)}
            layers = {name: self._experts_of(model, name, module) for name, module in modules.items()}
            total, before = sum(experts.num_local_experts for experts in layers.values()), 0
            for name, experts in layers.items():
                if _numbers(name) not in blocks:
                    raise CheckpointError(f"{self.folder}: no experts for {name!r}; blocks: {list(blocks.values())}")
                step = None if self.request.progress is None else _counted(self.request.progress, before, total)
                checkpoints.load_experts(checkpoint, blocks[_numbers(name)], experts, rules, step)
                before += experts.num_local_experts
                modules[name].add_module("packed", experts)
        model.set_experts_implementation(IMPLEMENTATION)
        return model

    def _experts_of(self, model: Any, name: str, module: Any) -> PackedExperts:
        """The empty experts of one module, planned."""
        asked, (inner, hidden) = self.request, module._moe_core_sizes
        activation, top_k = recognise_gate(module, inner), top_k_of(model, name)
        if isinstance(activation, str) or top_k is None:
            reason = "its top-k is not known" if top_k is None else activation
            raise UnsupportedError(f"{name}: {reason}; not packed")
        layer = MoEConfig(
            num_experts=module.num_experts,
            top_k=top_k,
            hidden_size=hidden,
            intermediate_size=inner,
            dtype=model.dtype,
            activation=activation,
            debug=asked.debug,
            max_tokens_per_rank=asked.max_tokens_per_rank,
        )
        method = self.method()
        chosen = plan(
            layer,
            parallel=asked.parallel,
            scheme=method.scheme,
            dispatch=asked.dispatch,
            experts=asked.experts,
            device=model.device,
            routing_is_external=True,
        )
        return PackedExperts(chosen, method, model.device, asked.group)


class PackedExperts(RoutedExperts):
    """One experts module's packed weights, and the kernel that runs them.

    Args:
        plan, quant_method, device: as for `RoutedExperts`.
        group: the ranks that share the experts; None: there is one.

    Raises:
        MoEError: there are several, and no group.
    """

    def __init__(self, plan: Plan, quant_method: QuantMethod, device: torch.device, group: Group | None) -> None:
        if group is None and not plan.output_is_reduced:
            raise MoEError("packed experts are spread over ranks, and group is None: pass the ranks' Group")
        super().__init__(plan, quant_method, device)
        self.group = group
        self._kernel = MoEKernel(plan, group)
        self.layer_key = register_layer(self)

    @property
    def kernel(self) -> MoEKernel:
        return self._kernel

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`[..., H]`, ids and weights `[..., K]` → `[..., H]`, summed over K and over the ranks."""
        ids = top_k_index.reshape(-1, top_k_index.shape[-1])
        x = hidden_states.reshape(-1, hidden_states.shape[-1]).to(self.config.dtype)
        routing = Routing(ids, top_k_weights.reshape(ids.shape).to(torch.float32))
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # experts write into buffers of the model dtype
                out = self._step(x, routing)
        else:
            out = self._step(x, routing)
        return out.to(hidden_states.dtype).reshape(hidden_states.shape)

    @torch.no_grad()
    def _step(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        most = self.config.max_tokens_per_rank
        if self.parallel.sp_size > 1 and self.group is not None and most is not None:
            return run_in_turn(self._reduced, x, routing, self.group, most)
        return self._reduced(x, routing)

    def _reduced(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        out, _ = self._kernel(x, routing, self.weights)
        if self._kernel.plan.output_is_reduced:
            return out
        assert self.group is not None, "the constructor saw to it"
        return self.group.all_reduce(out)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle carries the plan; the kernel is made anew, since backends may hold device buffers."""
        return {**self.__dict__, "_kernel": self._kernel.plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._kernel = MoEKernel(state["_kernel"], self.group, agree=False)
        self.layer_key = register_layer(self)  # a copy is a layer of its own


def _method_of(stored: dict[str, Any] | None, scheme: str | None) -> QuantMethod:
    """What reads a checkpoint: by its `quantization_config`, or, where it has none, as it is.

    Raises:
        UnsupportedError: nobody reads it, or not its dense layers; or it lacks what the scheme needs.
    """
    if not stored:
        return method_for_floats(scheme or UNQUANTIZED.name)
    found = method_for_checkpoint(stored, scheme)
    if not isinstance(found, PackedMethod):
        raise UnsupportedError(f"scheme {found.scheme.name} does not say what a checkpoint's dense layers hold")
    return found


class _Dequantize(ConversionOps):
    """A dense layer's tensors, collected by their names, as one weight in the model dtype."""

    def __init__(self, method: PackedMethod) -> None:
        self._method = method  # not the quantizer: transformers copies its converters, and a group can't be copied

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *_: Any, **arguments: Any) -> dict[str, torch.Tensor]:
        method = self._method
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


def _counted(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    """One layer's part of the progress of all."""
    return lambda done, _: progress(before + done, total)


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


def packed_plans(model: torch.nn.Module) -> dict[str, Plan]:
    """Experts module → its plan, of a model whose experts are packed."""
    modules: dict[str, Any] = dict(experts_modules(model))
    return {name: module.packed.kernel.plan for name, module in modules.items()}


def packed_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls for a whole experts module."""
    return call_layer(self.packed, hidden_states, top_k_index, top_k_weights)


ExpertsInterface.register(IMPLEMENTATION, packed_forward)
if UNKNOWN_TO_TRANSFORMERS not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(UNKNOWN_TO_TRANSFORMERS)(PackedConfig)
    register_quantizer(UNKNOWN_TO_TRANSFORMERS)(PackedQuantizer)
