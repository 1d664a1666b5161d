"""What a quantization-method case asks: weights are loaded expert by expert, read back and compared with the source.

Shape letters: E_l local experts · H hidden · I intermediate per rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch

from moe_core.config import ActivationSpec, MoEParallelConfig
from moe_core.emulated import dequantize_weights
from moe_core.errors import MoEError
from moe_core.forms import made_method
from moe_core.quant import QuantSpec
from moe_core.routed_experts import RoutedExperts
from moe_core.testing.case import Skip, Violation
from moe_core.testing.compare import Untouched, same_bits
from moe_core.testing.quant_bench import SIZES, QuantBench, Setting, Tensors
from moe_core.types import ExpertWeights

FOREIGN_CONFIGS: Mapping[str, dict[str, Any]] = {
    "a config of nobody": {"quant_method": "kit: nobody's"},
    "an empty config": {},
    "a config without a method's name": {"bits": 3, "group_size": 7},
}
SOURCES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zero": torch.zeros_like,
    "tiny": lambda t: t * 1e-4,
    "large": lambda t: t * 1e3,
    "one-sided": lambda t: t.abs() + 0.1,
}
LAYOUTS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda t: t.T.contiguous().T if t.dim() == 2 else t,
    "rows apart": lambda t: torch.cat([t, torch.full_like(t, 9)], dim=-1)[..., : t.shape[-1]],
    "in a fused tensor": lambda t: torch.cat([t, torch.full_like(t, 9)])[: t.shape[0]],
}
BAD_TENSORS = (
    "a wrong shape",
    "a transposed tensor",
    "an unknown name",
    "a bias that is not declared",
    "a gate where there is none",
)


def stored(layer: RoutedExperts) -> dict[str, torch.Tensor]:
    return {name: parameter.data.clone() for name, parameter in layer.named_parameters()}


def _same(a: RoutedExperts, b: RoutedExperts, duty: str, text: str) -> None:
    first, second = stored(a), stored(b)
    for name in first:
        if not same_bits(first[name], second[name]):
            raise Violation(duty, f"{text}: {name} has other bytes")


def _addresses(layer: RoutedExperts) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}


def names_its_scheme(bench: QuantBench) -> None:
    first, second = made_method(bench.entry), made_method(bench.entry)
    if first.scheme != second.scheme:
        raise Violation("honest claims", f"two methods have two schemes: {first.scheme}, {second.scheme}")


def says_how_input_is(bench: QuantBench) -> None:
    spec = bench.entry.factory().activation_quant(bench.layer(bench.fit(Setting())))
    if spec is not None and not isinstance(spec, QuantSpec):
        raise Violation("honest claims", f"activation_quant is {spec!r}; the contract is a QuantSpec or None")
    if (spec is None) != (bench.scheme.activation is None):
        raise Violation("honest claims", f"activation_quant is {spec}, and the scheme says {bench.scheme.activation}")


def needs_the_weight(bench: QuantBench) -> None:
    for packed in (False, True):
        kinds = bench.entry.factory().required_kinds(packed)
        if "" not in kinds or not all(kind == "" or kind.startswith("_") for kind in kinds):
            raise Violation(
                "honest claims", f"required_kinds({packed}) is {kinds}; it holds '' and kinds like '_scale'"
            )


def declines(bench: QuantBench, kind: str) -> None:
    claim = bench.entry.from_checkpoint_config
    if claim is None:
        raise Skip("reads no checkpoint configs")
    config = dict(FOREIGN_CONFIGS[kind])
    answer = claim(config)
    if config != FOREIGN_CONFIGS[kind]:
        raise Violation("read-only inputs", "from_checkpoint_config changed the config")
    if not isinstance(answer, str) or not answer.strip():
        raise Violation("refusals", f"{kind} was answered with {answer!r}; the contract is a reason")


def values(bench: QuantBench, setting: Setting) -> None:
    duty = "expert biases" if setting.activation.bias else "values"
    bench.check(bench.read(bench.filled(setting)), setting.tensors(), setting.dtype, duty)


def unusual_values(bench: QuantBench, setting: Setting, kind: str) -> None:
    tensors = {key: SOURCES[kind](tensor) for key, tensor in setting.tensors().items()}
    bench.check(bench.read(bench.fill(bench.layer(setting), tensors)), tensors, setting.dtype, "values")


def strided_source(bench: QuantBench, setting: Setting, layout: str) -> None:
    tensors = {key: LAYOUTS[layout](tensor) for key, tensor in setting.tensors().items()}
    layer = bench.fill(bench.layer(setting), tensors)
    _same(layer, bench.filled(setting), "strides", f"from tensors that lie {layout}")


def any_order(bench: QuantBench, setting: Setting) -> None:
    tensors = dict(reversed(setting.tensors().items()))
    _same(bench.fill(bench.layer(setting), tensors), bench.filled(setting), "values", "loaded in the other order")


def padded(bench: QuantBench, setting: Setting) -> None:
    """Rows and columns that pad H are zero, before and after a reload, and the rest is as without them."""
    unit = 2 * setting.hidden
    wide = attrs.evolve(setting, padded=unit)
    layer = bench.filled(wide)
    bench.fill(layer, setting.tensors(1))
    bench.fill(layer, setting.tensors(0))
    weights: ExpertWeights = layer.weights
    if bench.scheme.weight is not None:
        weights = dequantize_weights(weights, bench.scheme.weight)
    beside = (weights.w13[:, :, setting.hidden :], weights.w2[:, setting.hidden :])
    if any(bool((part != 0).any()) for part in beside):  # NaN is not 0
        raise Violation("padding", "what pads H is not zero")
    bench.check(bench.read(layer), setting.tensors(), setting.dtype, "padding")


def storage_form(bench: QuantBench, setting: Setting) -> None:
    layer = bench.layer(setting)
    legal = {field.name for field in attrs.fields(ExpertWeights)} - {"gate_up_layout"}
    names = dict(layer.named_parameters())
    if not {"w13", "w2"} <= names.keys() or names.keys() - legal:
        raise Violation(
            "shapes and dtypes", f"registered {sorted(names)}; the contract is w13, w2 and others of {legal}"
        )
    for name, tensor in names.items():
        if (
            tensor.shape[0] != layer.num_local_experts
            or tensor.requires_grad
            or tensor.device.type != bench.device.type
        ):
            raise Violation(
                "shapes and dtypes",
                f"{name} is {tuple(tensor.shape)} on {tensor.device}; the contract is "
                f"(E_l = {layer.num_local_experts}, …) on {bench.device}, without a gradient",
            )
    if setting.activation.bias != ("w13_bias" in names and "w2_bias" in names):
        raise Violation("expert biases", f"bias = {setting.activation.bias}, and {sorted(names)} are registered")


def reloads(bench: QuantBench, setting: Setting) -> None:
    layer = bench.filled(setting, 0)
    before = _addresses(layer)
    bench.fill(layer, setting.tensors(1))
    if _addresses(layer) != before:
        raise Violation("reload", "loading again moved the weights")
    _same(layer, bench.filled(setting, 1), "reload", "loaded again")


def reloads_one(bench: QuantBench, setting: Setting) -> None:
    """One expert is replaced: the others keep every byte."""
    layer, fresh = bench.filled(setting, 0), setting.tensors(1)
    mixed = {key: fresh[key] if key[0] == 2 else tensor for key, tensor in setting.tensors(0).items()}
    before = stored(layer)
    bench.fill(layer, {key: tensor for key, tensor in fresh.items() if key[0] == 2})
    for name, tensor in stored(layer).items():
        for expert in (0, 1, 3):
            if not same_bits(tensor[expert], before[name][expert]):
                raise Violation("reload", f"replacing expert 2 changed {name} of expert {expert}")
    bench.check(bench.read(layer), mixed, setting.dtype, "reload")


def packs_again(bench: QuantBench, setting: Setting) -> None:
    layer, once = bench.filled(setting), bench.filled(setting)
    before = _addresses(layer)
    layer.pack_weights()
    if _addresses(layer) != before:
        raise Violation("reload", "packing again moved the weights")
    _same(layer, once, "reload", "packed twice")


def state_dict(bench: QuantBench, setting: Setting) -> None:
    layer, other = bench.filled(setting, 0), bench.filled(setting, 1)
    before = _addresses(other)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    if _addresses(other) != before:
        raise Violation("reload", "load_state_dict moved the weights")
    _same(layer, other, "reload", "through a state dict")


def two_layers(bench: QuantBench, setting: Setting) -> None:
    """One method object serves several layers."""
    method = bench.entry.factory()
    first, second = (bench.layer(setting, method=method) for _ in range(2))
    bench.fill(first, setting.tensors(0))
    bench.fill(second, setting.tensors(1))
    _same(first, bench.filled(setting, 0), "no state between layers", "the first of two layers")
    _same(second, bench.filled(setting, 1), "no state between layers", "the second of two layers")


def leaves_the_layer(bench: QuantBench, setting: Setting) -> None:
    """`create_weights`, `load_expert` and `pack_weights` assign nothing that is the layer's."""
    layer = bench.layer(setting)
    own = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    views = {id(parameter) for parameter in layer.parameters()}
    bench.fill(layer, setting.tensors())
    now = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    changed = sorted({name for name in now.keys() | own.keys() if now.get(name) is not own.get(name)})
    if changed:
        raise Violation("read-only inputs", f"the layer's {changed} are others now")
    if {id(parameter) for parameter in layer.parameters()} != views:
        raise Violation("reload", "loading bound other parameters")


def reads_only(bench: QuantBench, setting: Setting) -> None:
    tensors = setting.tensors()
    seen = Untouched(**{f"{name} of expert {expert}": tensor for (expert, name), tensor in tensors.items()})
    layer = bench.fill(bench.layer(setting), tensors)
    seen.check("loading")
    for (expert, name), tensor in tensors.items():
        tensor.add_(1)  # what was loaded is a copy
        if not tensor.numel():
            raise Skip(f"{name} of expert {expert} is empty")
    _same(layer, bench.filled(setting), "read-only inputs", "after the checkpoint's tensors changed")


def same_each_time(bench: QuantBench, setting: Setting) -> None:
    _same(bench.filled(setting), bench.filled(setting), "determinism", "loaded into two layers")


def moved(bench: QuantBench, setting: Setting) -> None:
    """`model.to(dtype)` converts whatever is floating point, and packed weights and scales must stay as they are."""
    layer = bench.filled(setting)
    layer.to(setting.dtype)
    _same(layer, bench.filled(setting), "reload", "after .to(its own dtype)")


def of_ranks(bench: QuantBench, setting: Setting, world: int) -> None:
    seen: Tensors = {}
    for rank in range(world):
        part = bench.read(bench.filled(setting, parallel=MoEParallelConfig(ep_size=world, ep_rank=rank)))
        if part.keys() & seen.keys():
            raise Violation("expert map", f"rank {rank} holds {sorted(part.keys() & seen.keys())}, as another does")
        seen |= part
    bench.check(seen, setting.tensors(), setting.dtype, "expert map")


def of_parts(bench: QuantBench, setting: Setting) -> None:
    """The parts of two tp ranks, put together; the second projection's bias is in one of them only."""
    wide, parts = _in_two(bench, setting)
    whole: Tensors = {}
    for key in parts[0]:
        if key[1] == "down_bias":
            whole[key] = parts[0][key] + parts[1][key]
        else:
            whole[key] = torch.cat([part[key] for part in parts], dim=1 if key[1] == "down" else 0)
    bench.check(whole, wide.tensors(), wide.dtype, "tensor-parallel parts")


def _in_two(bench: QuantBench, setting: Setting) -> tuple[Setting, list[Tensors]]:
    """The narrowest layer whose experts can be split in two, and what both ranks hold."""
    reason = ""
    for inner in (setting.inner, *(inner for _, inner in SIZES)):
        wide = attrs.evolve(setting, inner=2 * inner)
        try:
            halves = [MoEParallelConfig(tp_size=2, tp_rank=rank) for rank in range(2)]
            return wide, [bench.read(bench.filled(wide, parallel=half)) for half in halves]
        except MoEError as error:
            reason = str(error)
    raise Skip(reason)


def refuses_tensor(bench: QuantBench, setting: Setting, what: str) -> None:
    hidden, inner = setting.hidden, setting.inner
    name, tensor = "up", torch.zeros(inner, hidden, dtype=setting.dtype)
    if what == "a wrong shape":
        tensor = tensor[:-1]
    elif what == "a transposed tensor":
        name, tensor = "down", torch.zeros(inner, hidden, dtype=setting.dtype)
    elif what == "an unknown name":
        name = "sideways"
    elif what == "a bias that is not declared":
        name, tensor = "up_bias", torch.zeros(inner, dtype=setting.dtype)
    else:
        name, setting = "gate", attrs.evolve(setting, activation=ActivationSpec("relu2", None))
    layer = bench.layer(setting)
    try:
        layer.load_expert(0, name, tensor)
    except (MoEError, ValueError) as error:
        if name not in str(error):
            raise Violation("refusals", f"{what} ({name!r}) is refused without naming it: {error}") from None
        return
    raise Violation("refusals", f"{what} ({name!r}, {tuple(tensor.shape)}) was taken")


def packed(bench: QuantBench, setting: Setting) -> None:
    """Stored bytes, loaded as a checkpoint's tensors, are the same bytes again."""
    source, target = bench.filled(setting), bench.layer(setting)
    weights, inner = source.weights, setting.inner
    for expert in range(setting.experts):
        for half, name in enumerate(("gate", "up", "down")):
            prefix, down = ("w2" if name == "down" else "w13"), name == "down"
            rows = slice(None) if down else slice(half * inner, (half + 1) * inner)
            tensors = {"": getattr(weights, prefix)[expert][rows]}
            scale = getattr(weights, f"{prefix}_scale")[expert]
            tensors["_scale"] = scale if down else scale[half] if scale.dim() == 3 else scale[rows]
            for kind in ("_global_scale", "_input_scale"):
                value = getattr(weights, prefix + kind)
                if value is not None:
                    tensors[kind] = value[expert][0 if down else half]
            for kind, tensor in tensors.items():
                target.load_expert(expert, name + kind, tensor)
    target.pack_weights()
    _same(source, target, "values", "a packed checkpoint")


def misses(bench: QuantBench, setting: Setting, part: str) -> None:
    tensors = {key: tensor for key, tensor in setting.tensors().items() if key != (1, part)}
    try:
        bench.fill(bench.layer(setting), tensors)
    except MoEError:
        return
    raise Violation("refusals", f"{part!r} of expert 1 was never loaded, and pack_weights said nothing")


def hides_nothing(bench: QuantBench, setting: Setting, value: float) -> None:
    """NaN and Inf come out as something that is not finite, or are refused; no other expert is touched."""
    tensors = setting.tensors()
    tensors[1, "up"] = tensors[1, "up"].clone()
    tensors[1, "up"][3, 5] = value
    try:
        got = bench.read(bench.fill(bench.layer(setting), tensors))
    except (MoEError, ValueError):
        return
    if bool(got[1, "up"][3, 5].isfinite()):
        raise Violation("values", f"{value} came back as {float(got[1, 'up'][3, 5]):.3g}")
    clean = {key: tensor for key, tensor in setting.tensors().items() if key != (1, "up")}
    bench.check({key: got[key] for key in clean}, clean, setting.dtype, "values")


def laid_out(bench: QuantBench, setting: Setting, layout: str) -> None:
    """A weight layout is another order of the same bytes, in the same storage, and there is an exact way back."""
    for hidden, inner in ((setting.hidden, setting.inner), *SIZES, (512, 256)):
        plain = attrs.evolve(setting, hidden=hidden, inner=inner)
        moved_layer = attrs.evolve(plain, weight_layout=layout)
        try:
            wanted, layer = bench.filled(plain), bench.layer(moved_layer)
            addresses = _addresses(layer)
            bench.fill(layer, moved_layer.tensors())
            break
        except (MoEError, RuntimeError) as error:
            reason = str(error)  # sizes that the layout doesn't have: its experts refuse them
    else:
        raise Skip(reason)
    packed_bytes = stored(layer)
    layer.pack_weights()
    if any(not same_bits(packed_bytes[name], tensor) for name, tensor in stored(layer).items()):
        raise Violation("weight layout", "packing again changed the bytes")
    layer.unpack_weights()
    _same(layer, wanted, "weight layout", f"out of layout {layout}")
    bench.fill(layer, {key: tensor for key, tensor in moved_layer.tensors(1).items() if key[0] == 2})
    layer.unpack_weights()
    mixed = {key: moved_layer.tensors(1 if key[0] == 2 else 0)[key] for key in moved_layer.tensors()}
    bench.check(bench.read(layer), mixed, setting.dtype, "weight layout")
    if _addresses(layer) != addresses:
        raise Violation("reload", f"layout {layout} moved the weights")
