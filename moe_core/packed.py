"""`PackedMethod`: the quantization method of any scheme whose weights a `QuantSpec` describes.

Shape letters: E_l local experts · H hidden (as stored) · I intermediate per rank · P halves of w13 (2, or 1 without a
gate) · G columns of a group.

Everything follows from the scheme: storage, names, shapes, how tensors are split over tp ranks, quantization of
floating-point weights. A plugin's method adds what its checkpoints call things (`checkpoint_suffixes`) and which of the
Hub's configs it claims. Gate and up always keep scales of their own.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from moe_core import formats
from moe_core.config import Problem
from moe_core.errors import CheckpointError, MoEError
from moe_core.quant import QuantMethod, QuantScheme, QuantSpec, ScaleFormat, WeightsOwner, split_part, upright
from moe_core.types import GateUpLayout

_PARTS = ("gate", "up", "down")
_PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CANONICAL = "canonical"
_CHUNK = 1 << 16
"""Weights that are quantized at once. 40 bytes of intermediates each, so a few MB beside an expert of tens."""


class PackedMethod(QuantMethod):
    """Creates, fills and checks packed weights as `ExpertWeights` describes them.

    Args:
        scheme: a scheme with quantized weights.
        online: floating-point weights are quantized as they are loaded. Off for a method made from a checkpoint's
            config: there they are an error, because what should have been packed would quietly lose precision.
    """

    def __init__(self, scheme: QuantScheme, *, online: bool = True) -> None:
        assert scheme.weight is not None, "a scheme without quantized weights has the core's own method"
        self.scheme = scheme
        self.weight: QuantSpec = scheme.weight
        self.online = online

    def create_weights(self, layer: WeightsOwner) -> None:
        check_sizes(self.scheme, layer)
        experts, hidden, inner = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
        halves, spec = _halves(layer), self.weight
        per_byte, dtype = formats.codes_per_byte(spec), formats.storage_dtype(spec)
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "w13": ((experts, halves * inner, hidden // per_byte), dtype),
            "w2": ((experts, hidden, inner // per_byte), dtype),
        }
        scale, own_rows = formats.scale_dtype(spec), spec.group_shape[0] == 1
        rows, groups = formats.scale_shape(spec.group_shape, inner, hidden)
        tensors["w13_scale"] = (
            (experts, halves * rows, groups) if own_rows else (experts, halves, rows, groups),
            scale,
        )
        tensors["w2_scale"] = ((experts, *formats.scale_shape(spec.group_shape, hidden, inner)), scale)
        if spec.second_level:
            tensors |= _per_half("global_scale", experts, halves, torch.float64)
        if self.reads_input_scale:
            second = self.scheme.activation is not None and self.scheme.activation.second_level
            tensors |= _per_half("input_scale", experts, halves, torch.float64 if second else torch.float32)
        if layer.config.activation.bias:
            bias = layer.config.dtype
            tensors |= {"w13_bias": ((experts, halves * inner), bias), "w2_bias": ((experts, hidden), bias)}
        for name, (shape, stored) in tensors.items():
            # zeros, not empty: rows and columns that pad H must be zero, scales included, and stay so
            layer.register_weight(name, torch.zeros(shape, dtype=stored, device=layer.device))
        self._forget_scales(layer)

    @property
    def reads_input_scale(self) -> bool:
        """Checkpoints of this scheme hold something about the input of each projection."""
        activation = self.scheme.activation
        return activation is not None and (activation.second_level or not activation.dynamic)

    def required_kinds(self, packed: bool) -> tuple[str, ...]:
        kinds = ["", "_scale"] if packed else [""]
        if packed and self.weight.second_level:
            kinds.append("_global_scale")
        if self.reads_input_scale:
            kinds.append("_input_scale")
        return tuple(kinds)

    def shard_index(
        self, layer: WeightsOwner, name: str, shape: tuple[int, ...], tp_rank: int, tp_size: int
    ) -> tuple[slice, ...]:
        part, kind = split_part(name)
        dim = 1 if part == "down" else 0
        if kind != "_scale" or dim >= len(shape) or shape[dim] == 1 or self.weight.group_shape[dim] == -1:
            return super().shard_index(layer, name, shape, tp_rank, tp_size)
        index = [slice(None)] * len(shape)
        size = shape[dim] // tp_size  # `check_sizes` saw to it that no rank's part cuts a group
        index[dim] = slice(tp_rank * size, (tp_rank + 1) * size)
        return tuple(index)

    def load_expert(self, layer: WeightsOwner, expert: int, name: str, tensor: torch.Tensor) -> None:
        part, kind = split_part(name)
        self._check_name(layer, name, part)
        kind = upright(kind)
        if expert in layer.packed_experts and kind in ("", "_scale"):
            self._unpack(layer, expert)
        if upright(name) != name:
            tensor = 1 / tensor.to(torch.float64)
        if kind == "":
            if tensor.dtype in _PLAIN_DTYPES:
                self._quantize(layer, expert, part, tensor)
            else:
                self._store(layer, expert, name, tensor)
        elif kind == "_input_scale" and not self.reads_input_scale:
            return  # checkpoints hold it also for a scheme that has no use for it: weight-only
        elif kind == "_scale" and self.weight.scale_format is not ScaleFormat.E4M3:
            is_power = tensor.dtype in (torch.uint8, torch.float8_e8m0fnu)
            self._store(layer, expert, name, formats.decode_ue8m0(tensor) if is_power else tensor)
        else:
            self._store(layer, expert, part + kind, tensor)

    @torch.no_grad()
    def pack_weights(self, layer: WeightsOwner) -> None:
        """Check that every expert has all its scales, and bring what was loaded since into the plan's layout."""
        layout = self.layouts.get(layer.weight_layout)
        if layout is None and layer.weight_layout != _CANONICAL:
            raise MoEError(
                f"scheme {self.scheme.name}: the plan's experts read the weight layout {layer.weight_layout!r}, and "
                f"{type(self).__name__} makes only {', '.join((_CANONICAL, *self.layouts))}; its `layouts` must hold "
                "what experts declare"
            )
        loaded = [expert for expert in range(layer.num_local_experts) if expert not in layer.packed_experts]
        self._check_loaded(layer, loaded)
        if layout is None:
            return
        for expert in loaded:
            try:
                layout.pack(_of_expert(layer, expert), layer.config.activation.gate_up_layout)
            except ValueError as error:
                raise CheckpointError(f"local expert {expert}, weight layout {layout.name}: {error}") from error
            layer.packed_experts.add(expert)

    def unpack_weights(self, layer: WeightsOwner) -> None:
        for expert in sorted(layer.packed_experts):
            self._unpack(layer, expert)

    @torch.no_grad()
    def _unpack(self, layer: WeightsOwner, expert: int) -> None:
        layout = self.layouts[layer.weight_layout]
        layout.unpack(_of_expert(layer, expert), layer.config.activation.gate_up_layout)
        layer.packed_experts.remove(expert)

    def _check_loaded(self, layer: WeightsOwner, experts: list[int]) -> None:
        for part in _parts(layer):
            for kind in self._scale_kinds():
                for expert in experts:
                    if bool(self._target(layer, expert, part, kind).to(torch.float32).isnan().all()):
                        raise CheckpointError(
                            f"local expert {expert}: {part + kind!r} is NaN throughout: it was never loaded, or the "
                            f"weights are NaN; scheme {self.scheme.name} needs {part!r} with "
                            f"{', '.join(part + k for k in self._scale_kinds())}"
                        )

    def _quantize(self, layer: WeightsOwner, expert: int, part: str, tensor: torch.Tensor) -> None:
        """One projection of floating-point weights, into the layer's storage."""
        if not self.online:
            raise CheckpointError(
                f"expert tensor {part!r} is {tensor.dtype}, where the checkpoint's quantization_config promises "
                f"{self.weight.dtype}; build the layer unquantized, or with scheme {self.scheme.name!r} by name, which "
                "quantizes on the way"
            )
        expected = _matrix_shape(layer, part)
        if tuple(tensor.shape) != expected:
            raise CheckpointError(f"expert tensor {part!r} has shape {tuple(tensor.shape)}; expected {expected}")
        self._quantize_rows(layer, expert, part, tensor)

    @torch.no_grad()
    def _quantize_rows(self, layer: WeightsOwner, expert: int, part: str, tensor: torch.Tensor) -> None:
        """Some rows at a time: the quantizer's intermediates are several times what it is given."""
        spec = self.weight
        group = max(spec.group_shape[0], 1)
        step = -(-max(_CHUNK // tensor.shape[1], 1) // group) * group
        chunks = tensor.split(step)
        top = static = None
        if spec.second_level or spec.group_shape[0] == -1:
            magnitudes = [formats.group_amax(rows.to(torch.float32), (-1, spec.group_shape[1])) for rows in chunks]
            amax = torch.stack(magnitudes).amax(dim=0).to(layer.device)
            if spec.second_level:
                top = formats.global_scale_of(amax.amax(), spec)
                self._store(layer, expert, f"{part}_global_scale", top)
            if spec.group_shape[0] == -1:
                static = formats.scale_of(amax, spec, top)
                self._store(layer, expert, f"{part}_scale", static)
        q_target, scale_target = (self._target(layer, expert, part, kind) for kind in ("", "_scale"))
        for first, rows in zip(range(0, tensor.shape[0], step), chunks, strict=True):
            q, scale = formats.quantize(rows.to(layer.device), spec, scale=static, global_scale=top)
            q_target[first : first + step].copy_(q)
            if static is None:
                scale_target[first // group : (first + step) // group].copy_(scale)

    @torch.no_grad()
    def _store(self, layer: WeightsOwner, expert: int, name: str, tensor: torch.Tensor) -> None:
        """Copy what has the storage's dtype and the expected shape; a scalar may be `[]` or `[1]`, a row `[N]`."""
        part, kind = split_part(name)
        target = self._target(layer, expert, part, kind)
        one_byte = target.dtype.itemsize == 1
        if one_byte and tensor.dtype != target.dtype and not (tensor.dtype, target.dtype) == (torch.int8, torch.uint8):
            raise CheckpointError(
                f"expert tensor {name!r} is {tensor.dtype}; scheme {self.scheme.name} expects {target.dtype}"
            )
        expected = tuple(target.shape)
        fits = tuple(tensor.shape) == expected or (kind not in ("", "_bias") and _same_but_ones(tensor, expected))
        if not fits:
            group = f" (groups of {self.weight.group_shape})" if kind == "_scale" else ""
            raise CheckpointError(
                f"expert tensor {name!r} has shape {tuple(tensor.shape)}; scheme {self.scheme.name} expects "
                f"{expected}{group}"
            )
        if tensor.dtype is torch.int8:
            tensor = tensor.view(torch.uint8)
        target.copy_(tensor.reshape(expected))

    def _target(self, layer: WeightsOwner, expert: int, part: str, kind: str) -> torch.Tensor:
        """The part of the layer's storage for one tensor of the checkpoint, without what pads H."""
        stored: torch.Tensor = layer.get_parameter(("w2" if part == "down" else "w13") + kind)[expert]
        rows, columns = _matrix_shape(layer, part)
        shape: tuple[int, ...]
        if kind in ("_global_scale", "_input_scale"):
            return stored[0 if part == "down" else _half_of(layer, part)]
        if kind == "_scale":
            shape = formats.scale_shape(self.weight.group_shape, rows, columns)
            if part != "down" and self.weight.group_shape[0] != 1:
                return stored[_half_of(layer, part)][: shape[0], : shape[1]]
        else:
            shape = (rows,) if kind == "_bias" else (rows, columns // formats.codes_per_byte(self.weight))
        if part != "down":
            stored = stored[half_rows(layer.config.activation.gate_up_layout, rows, _half_of(layer, part))]
        return stored[tuple(slice(extent) for extent in shape)]

    def _scale_kinds(self) -> list[str]:
        return [kind for kind in self.required_kinds(packed=True) if kind]

    @torch.no_grad()
    def _forget_scales(self, layer: WeightsOwner) -> None:
        """NaN in every scale that is to be loaded: an expert that was left out must not come out as zeros."""
        for part in _parts(layer):
            for kind in self._scale_kinds():
                for expert in range(layer.num_local_experts):
                    self._target(layer, expert, part, kind).copy_(torch.tensor(torch.nan))

    def _check_name(self, layer: WeightsOwner, name: str, part: str) -> None:
        activation = layer.config.activation
        kind = upright(split_part(name)[1])
        kinds = {*self.required_kinds(packed=True), "_input_scale", "_bias"}
        if part not in _PARTS or kind not in kinds:
            raise CheckpointError(
                f"expert tensor {name!r}: scheme {self.scheme.name} has {', '.join(_PARTS)}, each with "
                f"{', '.join(sorted(kinds - {''}))}"
            )
        if kind == "_bias" and not activation.bias:
            raise CheckpointError(f"expert tensor {name!r}, but the layer's activation declares no bias")
        if part == "gate" and not activation.gated:
            raise CheckpointError(f"expert tensor {name!r}, but the layer's activation has no gate")


def half_rows(layout: GateUpLayout | None, inner: int, half: int) -> slice:
    """The rows of half 0 or 1 among the 2I rows of w13; without a gate all are half 0's."""
    if layout is GateUpLayout.INTERLEAVED:
        return slice(half, None, 2)
    return slice(half * inner, (half + 1) * inner)


def cut_by(scheme: QuantScheme) -> int:
    """I of a tp rank must be a multiple of this, or a group of the scheme would be cut by the split."""
    assert scheme.weight is not None
    along = [*scheme.weight.group_shape]
    if scheme.activation is not None:
        along.append(scheme.activation.group_shape[1])
    return math.lcm(*(size for size in along if size > 0), formats.codes_per_byte(scheme.weight))


def refuse_sizes(problem: Problem) -> str | None:
    """For `ExpertsCapabilities.refuse`: sizes that the scheme's groups cannot have, with those that they can."""
    if problem.scheme.weight is None:
        return None
    config = problem.config
    return _size_complaint(
        problem.scheme,
        config.experts_hidden_size,
        config.hidden_size,
        config.intermediate_size,
        problem.local_intermediate_size,
    )


def check_sizes(scheme: QuantScheme, layer: WeightsOwner) -> None:
    """The same for a layer.

    Raises:
        MoEError: with the legal sizes.
    """
    config = layer.config
    inner = layer.intermediate_size
    complaint = _size_complaint(scheme, layer.hidden_size, config.hidden_size, config.intermediate_size, inner)
    if complaint is not None:
        raise MoEError(complaint)


def _size_complaint(scheme: QuantScheme, stored_hidden: int, hidden: int, whole: int, inner: int) -> str | None:
    assert scheme.weight is not None
    if formats.codes_per_byte(scheme.weight) > 1:
        # two codes share a byte and checkpoints know no ragged group here, so neither do we
        group = scheme.weight.group_shape[1]
        for name, size in (
            ("hidden size", hidden),
            ("padded hidden size", stored_hidden),
            ("intermediate size", whole),
        ):
            if size % group:
                return f"{name} {size}: scheme {scheme.name} needs a multiple of {group}"
    unit = cut_by(scheme)
    if inner != whole and inner % unit:
        legal = [n for n in range(1, whole + 1) if n == 1 or (whole % n == 0 and (whole // n) % unit == 0)]
        return (
            f"tp_size = {whole // inner} gives each rank {inner} of {whole} intermediate columns, which cuts a group "
            f"of scheme {scheme.name} (multiples of {unit}); legal tp sizes: {legal}"
        )
    return None


def _of_expert(layer: WeightsOwner, expert: int) -> dict[str, torch.Tensor]:
    """What a `WeightLayout` reorders: views on one expert's storage."""
    return {name: layer.get_parameter(name).data[expert] for name in ("w13", "w13_scale", "w2", "w2_scale")}


def _per_half(kind: str, experts: int, halves: int, dtype: torch.dtype) -> dict[str, Any]:
    return {f"w13_{kind}": ((experts, halves), dtype), f"w2_{kind}": ((experts, 1), dtype)}


def _halves(layer: WeightsOwner) -> int:
    return 2 if layer.config.activation.gated else 1


def _parts(layer: WeightsOwner) -> tuple[str, ...]:
    return _PARTS if layer.config.activation.gated else _PARTS[1:]


def _half_of(layer: WeightsOwner, part: str) -> int:
    """Which half of w13 gate or up is."""
    layout = layer.config.activation.gate_up_layout
    if layout is None:
        return 0
    return int((part == "gate") == (layout is GateUpLayout.UP_GATE))


def _matrix_shape(layer: WeightsOwner, part: str) -> tuple[int, int]:
    """A projection's `[N, K]` on this rank, as values, without what pads H."""
    inner, hidden = layer.intermediate_size, layer.config.hidden_size
    return (hidden, inner) if part == "down" else (inner, hidden)


def _same_but_ones(tensor: torch.Tensor, expected: tuple[int, ...]) -> bool:
    def extents(shape: tuple[int, ...]) -> list[int]:
        return [size for size in shape if size != 1]

    return extents(tuple(tensor.shape)) == extents(expected)
