"""Quantization schemes and the contract of a quantization method. The core itself knows one scheme: none.

Shape letters: E_l local experts · H hidden · I intermediate per rank · G quantization group.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import attrs
import torch

from moe_core.types import WeightLayout


class ScaleFormat(enum.Enum):
    """How a scale is stored. A scale always means x ≈ q · scale, never its inverse."""

    FP32 = "fp32"
    UE8M0 = "ue8m0"
    """A power of two: the byte b stands for 2^(b - 127)."""
    E4M3 = "e4m3"
    """An fp8 scale, under one fp32 second-level scale (NVFP4)."""


@attrs.frozen
class QuantSpec:
    """How one tensor is quantized.

    Attributes:
        dtype: the element format: a torch dtype's name without "torch.", or "float4_e2m1".
        group_shape: (rows, columns) that share a scale; -1 means the whole extent: (-1, -1) per tensor,
            (1, -1) per row, (1, 128) per group of 128, (128, 128) per block.
        scale_format: how the scale is stored.
        dynamic: scales are computed from the data at run time, rather than read from the checkpoint. A second-level
            scale is read from there all the same.
        second_level: there is one scale above the group scales: per projection of an expert, per input of one.
    """

    dtype: str
    group_shape: tuple[int, int]
    scale_format: ScaleFormat = ScaleFormat.FP32
    dynamic: bool = False
    second_level: bool = False

    @property
    def row_wise(self) -> bool:
        """A row's elements and scales follow from that row alone, so it may be quantized before it is dispatched."""
        return self.dynamic and self.group_shape[0] == 1 and not self.second_level


@attrs.frozen
class QuantScheme:
    """A named pair: how weights are stored, and how activations are quantized before they meet them.

    Attributes:
        name: what people type and what capability records list.
        weight: None: weights are in the model dtype.
        activation: None: activations are in the model dtype.
    """

    name: str
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None


UNQUANTIZED = QuantScheme("unquantized")


class WeightsOwner(Protocol):
    """What a quantization method sees of the layer whose weights it makes (`RoutedExperts` is one).

    Attributes:
        config: the layer's `MoEConfig`.
        num_local_experts: E_l.
        hidden_size: H as the weights are stored, padding included.
        intermediate_size: I of this rank.
        device: where the weights live.
        weight_layout: what the plan's experts read, to be made by `pack_weights`.
        packed_experts: local experts that stand in that layout now; kept by the method, not for the canonical layout.
    """

    config: Any  # config.py stands on this module
    num_local_experts: int
    hidden_size: int
    intermediate_size: int
    device: torch.device
    weight_layout: str
    packed_experts: set[int]

    def register_weight(self, name: str, tensor: torch.Tensor) -> None:
        """Give a tensor into the layer's care, under a name of `ExpertWeights`."""

    def get_parameter(self, target: str) -> torch.nn.Parameter:
        """A registered weight; write into its `.data`, never re-bind it."""


_INVERSE = "inverse_"
_ALONG_I = {"gate": 0, "up": 0, "down": 1, "gate_bias": 0, "up_bias": 0}
"""The dim of a plain tensor that runs along I, and is split over tp ranks. Others are whole on every rank."""


def split_part(name: str) -> tuple[str, str]:
    """A name of `load_expert` as (projection, kind): "gate_scale" is ("gate", "_scale"), "down" is ("down", "")."""
    part, _, kind = name.partition("_")
    return part, f"_{kind}" if kind else ""


def upright(name: str) -> str:
    """The name without "inverse_": what a tensor stands for, however the format stores it."""
    return name.replace(_INVERSE, "", 1)


class QuantMethod(abc.ABC):
    """Creates, fills and packs the weights of a `RoutedExperts` in one scheme.

    The order of calls is: create_weights → load_expert (any number of times) → pack_weights. Reloading is
    load_expert → pack_weights again, into the same storage: addresses never change, because CUDA graphs hold them.
    """

    scheme: QuantScheme
    checkpoint_suffixes: ClassVar[Mapping[str, str]] = {}
    """What checkpoints call a projection's further tensors → what `load_expert` does: {"weight_scale_inv": "_scale"}
    says that `….gate_proj.weight_scale_inv` is "gate_scale". A tensor that holds 1 / scale is "_inverse_…scale"."""

    layouts: ClassVar[Mapping[str, WeightLayout]] = {}
    """The layouts beside the canonical one that `pack_weights` can make, by name."""

    @abc.abstractmethod
    def create_weights(self, layer: WeightsOwner) -> None:
        """Allocate storage by `layer.register_weight(name, tensor)`. The layer's own attributes are not touched."""

    @abc.abstractmethod
    def load_expert(self, layer: WeightsOwner, expert: int, name: str, tensor: torch.Tensor) -> None:
        """Copy one local expert's checkpoint tensor into the layer's storage.

        Args:
            layer: whose weights.
            expert: local index, 0 ≤ expert < E_l.
            name: "gate", "up", "down", "gate_bias", …, or a scale of the scheme, such as "gate_scale"; where the
                checkpoint holds its inverse, "gate_inverse_global_scale".
            tensor: this rank's slice, in the checkpoint's dtype: gate and up `[I, H]`, down `[H, I]`.
        """

    @abc.abstractmethod
    def pack_weights(self, layer: WeightsOwner) -> None:
        """Bring the storage into the layout that the plan's experts read (`layer.weight_layout`). Re-runnable."""

    def unpack_weights(self, layer: WeightsOwner) -> None:
        """The way back: the bytes as they were loaded, in the same storage, for an export."""

    def required_kinds(self, packed: bool) -> tuple[str, ...]:
        """What a checkpoint must hold of every projection: "" (the weight) and kinds of scales, such as "_scale".

        Args:
            packed: the checkpoint's weights are packed; if not, they are floating point, to be quantized on the way.
        """
        return ("",)

    def shard_index(
        self, layer: WeightsOwner, name: str, shape: tuple[int, ...], tp_rank: int, tp_size: int
    ) -> tuple[slice, ...]:
        """Which part of a whole expert's tensor is a tp rank's, as an index; only that part need be read.

        Args:
            layer: whose weights.
            name: as for `load_expert`.
            shape: of the whole tensor.
            tp_rank, tp_size: the rank, of how many that share the expert's I.
        """
        index = [slice(None)] * len(shape)
        if name in _ALONG_I:
            dim = _ALONG_I[name]
            size = shape[dim] // tp_size
            index[dim] = slice(tp_rank * size, (tp_rank + 1) * size)
        return tuple(index)

    def activation_quant(self, layer: WeightsOwner) -> QuantSpec | None:
        """How the experts are to quantize their input."""
        return self.scheme.activation

    @classmethod
    def from_checkpoint_config(cls, config: Mapping[str, Any]) -> QuantMethod | str:
        """Claim a checkpoint's `quantization_config` by returning a method, or decline with a reason."""
        return f"{cls.__name__} reads no checkpoint format"
