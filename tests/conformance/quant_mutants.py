"""Quantization methods that are wrong in one way each: thin wrappers around `fp8_channel`, `nvfp4`, `unquantized`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import attrs
import torch

from moe_core.quant import QuantMethod, QuantScheme
from moe_core.testing import registered
from moe_core.testing.quant import quant_cases
from moe_core.types import WeightLayout
from tests.conformance.mutant import Mutant


class Wrapped(QuantMethod):
    """A method around another one; a mutant overrides one step."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.scheme = inner, inner.scheme
        self.layouts = type(self).__dict__.get("layouts", inner.layouts)

    def create_weights(self, layer):
        self.inner.create_weights(layer)

    def load_expert(self, layer, expert, name, tensor):
        self.inner.load_expert(layer, expert, name, tensor)

    def pack_weights(self, layer):
        self.inner.pack_weights(layer)

    def unpack_weights(self, layer):
        self.inner.unpack_weights(layer)

    def required_kinds(self, packed):
        return self.inner.required_kinds(packed)

    def shard_index(self, layer, name, shape, tp_rank, tp_size):
        return self.inner.shard_index(layer, name, shape, tp_rank, tp_size)

    def activation_quant(self, layer):
        return self.inner.activation_quant(layer)


MUTANTS: list[Mutant] = []


def wrong(base: str, name: str, *duties: str, **changes: Any) -> Callable[[type[Wrapped]], type[Wrapped]]:
    def register(kind: type[Wrapped]) -> type[Wrapped]:
        MUTANTS.append(Mutant(name, duties, functools.partial(cases_of, base, kind, changes)))
        return kind

    return register


def cases_of(base: str, kind: Callable[..., Any], changes: dict[str, Any]) -> list[Any]:
    entry = registered("scheme", base)
    return quant_cases(attrs.evolve(entry, **{"factory": lambda: kind(entry.factory()), **changes}))


@wrong("unquantized", "is none", "honest claims", factory=lambda: None)
class NoMethod(Wrapped):
    pass


@wrong("unquantized", "stores gate as up and up as gate", "gate/up layout", "values")
class SwapsGateAndUp(Wrapped):
    def load_expert(self, layer, expert, name, tensor):
        if layer.config.activation.gated:
            part, _, rest = name.partition("_")
            part = {"gate": "up", "up": "gate"}.get(part, part)
            name = f"{part}_{rest}" if rest else part
        self.inner.load_expert(layer, expert, name, tensor)


@wrong("unquantized", "stores interleaved weights as halves", "gate/up layout", "values")
class HalvesOnly(Wrapped):
    def pack_weights(self, layer):
        from moe_core.types import GateUpLayout

        self.inner.pack_weights(layer)
        if layer.config.activation.gate_up_layout is GateUpLayout.INTERLEAVED:
            w13 = layer.get_parameter("w13").data
            w13.copy_(torch.cat([w13[:, 0::2], w13[:, 1::2]], dim=1))


@wrong("fp8_channel", "loads every expert into the next one's place", "expert map", "values")
class WrongExpert(Wrapped):
    def load_expert(self, layer, expert, name, tensor):
        self.inner.load_expert(layer, (expert + 1) % layer.num_local_experts, name, tensor)


@wrong("fp8_channel", "forgets biases", "expert biases")
class NoBias(Wrapped):
    def load_expert(self, layer, expert, name, tensor):
        self.inner.load_expert(layer, expert, name, tensor * 0 if name.endswith("_bias") else tensor)


@wrong("fp8_channel", "has a third of the precision", "values")
class LowPrecision(Wrapped):
    def load_expert(self, layer, expert, name, tensor):
        if name in ("gate", "up", "down") and tensor.element_size() > 1:
            top = tensor.float().abs().max().clamp(min=1e-9)
            tensor = ((tensor.float() * 4 / top).round() / 4 * top).to(tensor.dtype)
        self.inner.load_expert(layer, expert, name, tensor)


@wrong("unquantized", "rounds to bfloat16", "values", "expert biases")
class RoundsToBfloat16(Wrapped):
    def load_expert(self, layer, expert, name, tensor):
        self.inner.load_expert(layer, expert, name, tensor.bfloat16())


@wrong("fp8_channel", "binds new storage when it packs", "reload")
class Rebinds(Wrapped):
    def pack_weights(self, layer):
        self.inner.pack_weights(layer)
        w2 = layer.get_parameter("w2")
        w2.data = w2.data.clone()


@wrong("unquantized", "packs once only", "reload")
class PacksOnce(Wrapped):
    def pack_weights(self, layer):
        w2 = layer.get_parameter("w2").data
        w2.mul_(2)
        packed = getattr(layer, "_kit_packed", None)
        w2.mul_(0.5 if packed is None else 1.0)
        layer._kit_packed = True


@wrong("unquantized", "keeps the first load of an expert", "reload")
class KeepsFirst(Wrapped):
    def __init__(self, inner):
        super().__init__(inner)
        self.loaded = set()

    def load_expert(self, layer, expert, name, tensor):
        key = (id(layer), expert, name)
        if key not in self.loaded:
            self.inner.load_expert(layer, expert, name, tensor)
        self.loaded.add(key)


@wrong("fp8_channel", "clears the layer when one expert is loaded", "reload")
class ClearsLayer(Wrapped):
    def load_expert(self, layer, expert, name, tensor):
        if (expert, name) == (2, "up"):
            layer.get_parameter("w13").data[3:4].view(torch.uint8).zero_()
        self.inner.load_expert(layer, expert, name, tensor)


@wrong("unquantized", "keeps the checkpoint's tensor", "read-only inputs")
class KeepsTensor(Wrapped):
    def __init__(self, inner):
        super().__init__(inner)
        self.kept = {}

    def load_expert(self, layer, expert, name, tensor):
        self.inner.load_expert(layer, expert, name, tensor)
        tensor.mul_(1)


@wrong("unquantized", "assigns the layer's own attributes", "read-only inputs")
class AssignsAttributes(Wrapped):
    def pack_weights(self, layer):
        self.inner.pack_weights(layer)
        layer.hidden_size = int(f"{layer.hidden_size}")
        layer.kit_was_here = True


@wrong("fp8_channel", "shares storage between layers", "no state between layers")
class SharesStorage(Wrapped):
    def __init__(self, inner):
        super().__init__(inner)
        self.first = None

    def create_weights(self, layer):
        self.inner.create_weights(layer)
        if self.first is None:
            self.first = layer.get_parameter("w2").data
        elif self.first.shape == layer.get_parameter("w2").shape:
            layer.get_parameter("w2").data = self.first


_calls = iter(range(10**9))


@wrong("unquantized", "other bytes each time", "determinism")
class NotDeterministic(Wrapped):
    def pack_weights(self, layer):
        self.inner.pack_weights(layer)
        w2 = layer.get_parameter("w2").data
        w2[0, 0, 0] += next(_calls) % 2 * w2[0, 0, 0] * 2 * torch.finfo(w2.dtype).eps


@wrong("unquantized", "thinks that tensors lie side by side", "strides")
class ContiguousSource(Wrapped):
    def load_expert(self, layer, expert, name, tensor):
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        read = whole[tensor.storage_offset() :][: tensor.numel()].view(tensor.shape)
        self.inner.load_expert(layer, expert, name, read)


@wrong("unquantized", "leaves garbage where H is padded", "padding")
class PaddedGarbage(Wrapped):
    def create_weights(self, layer):
        self.inner.create_weights(layer)
        layer.get_parameter("w2").data.fill_(1.0)


@wrong("unquantized", "splits the wrong dim", "tensor-parallel parts", "refusals", "gate/up layout")
class SplitsWrongDim(Wrapped):
    def shard_index(self, layer, name, shape, tp_rank, tp_size):
        index = self.inner.shard_index(layer, name, shape, tp_rank, tp_size)
        other = self.inner.shard_index(layer, name, shape, (tp_rank + 1) % tp_size, tp_size)
        return other if name == "down" else index


@wrong("unquantized", "takes any shape", "refusals")
class TakesAnyShape(Wrapped):
    def load_expert(self, layer, expert, name, tensor):
        try:
            self.inner.load_expert(layer, expert, name, tensor)
        except Exception:  # noqa: BLE001 - that is the mutation
            return


@wrong("unquantized", "refuses without a name", "refusals")
class RefusesNameless(Wrapped):
    def load_expert(self, layer, expert, name, tensor):
        try:
            self.inner.load_expert(layer, expert, name, tensor)
        except Exception as error:
            raise ValueError("bad tensor") from error


@wrong("nvfp4", "misses nothing", "refusals")
class MissesNothing(Wrapped):
    def pack_weights(self, layer):
        return


@wrong("fp8_channel", "hides NaN and Inf", "values")
class HidesNan(Wrapped):
    def load_expert(self, layer, expert, name, tensor):
        clean = tensor.nan_to_num(0.0, 0.0, 0.0) if tensor.element_size() > 1 else tensor
        self.inner.load_expert(layer, expert, name, clean)


@wrong("fp8_channel", "takes stored scales for their inverse", "values")
class InvertsScales(Wrapped):
    def load_expert(self, layer, expert, name, tensor):
        self.inner.load_expert(layer, expert, name, 1 / tensor if name.endswith("_scale") else tensor)


@wrong("fp8_channel", "claims another scheme", "honest claims")
class OtherScheme(Wrapped):
    def __init__(self, inner):
        super().__init__(inner)
        self.scheme = QuantScheme("another", inner.scheme.weight, inner.scheme.activation)


@wrong("fp8_channel", "says nothing of its activations", "honest claims")
class SilentActivations(Wrapped):
    def activation_quant(self, layer):
        return None


@wrong("fp8_channel", "needs no weight", "honest claims")
class NeedsNothing(Wrapped):
    def required_kinds(self, packed):
        return ("_scale",)


@wrong("fp8_channel", "claims every checkpoint", "refusals", from_checkpoint_config=lambda config: object())
class ClaimsEverything(Wrapped):
    pass


@wrong("fp8_channel", "registers storage on demand", "shapes and dtypes", "expert biases")
class ExtraStorage(Wrapped):
    def create_weights(self, layer):
        self.inner.create_weights(layer)
        layer.register_weight("kit_cache", torch.zeros(layer.num_local_experts))


@wrong("unquantized", "registers no bias", "expert biases", "reload", "shapes and dtypes")
class NoBiasStorage(Wrapped):
    def create_weights(self, layer):
        self.inner.create_weights(layer)
        if layer.config.activation.bias:
            del layer._parameters["w2_bias"]


@wrong("fp8_channel", "converts its scales with the model", "reload")
class MovesScales(Wrapped):
    def __init__(self, inner):
        super().__init__(inner)

    def create_weights(self, layer):
        self.inner.create_weights(layer)
        apply = layer._apply

        def forgets(fn, recurse=True):
            made = apply(fn, recurse)
            layer.get_parameter("w13_scale").data.mul_(2)
            return made

        layer._apply = forgets


def _half_way(tensors, gate_up):
    tensors["w2"].copy_(tensors["w2"].roll(1, dims=0))


@wrong("nvfp4", "its layout is lost on the way back", "weight layout")
class LosesLayout(Wrapped):
    layouts = {"kit": WeightLayout("kit", _half_way, lambda tensors, gate_up: None)}  # noqa: RUF012 - read only

    def __init__(self, inner):
        super().__init__(inner)
        inner.layouts = self.layouts
