"""What NVFP4 checkpoints call their tensors, and which of the Hub's quantization configs hold NVFP4 experts.

Two conventions for one format. ModelOpt: `weight` uint8, `weight_scale` e4m3, `weight_scale_2` and `input_scale`, which
are multiplied. compressed-tensors: `weight_packed`, `weight_scale`, and their *inverses*, `weight_global_scale` and
`input_global_scale`, which are divided by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from moe_core import ops
from moe_core.packed import PackedMethod
from moe_core.quant import QuantScheme
from moe_core.types import GateUpLayout, WeightLayout
from quant_nvfp4.schemes import GROUP, MMA_LAYOUT, NVFP4, NVFP4_W4A4

Config = Mapping[str, Any]


def _pack(weights: Mapping[str, torch.Tensor], layout: GateUpLayout | None) -> None:
    ops.pack_nvfp4_matrix(weights["w13"], weights["w13_scale"], layout and layout.value)
    ops.pack_nvfp4_matrix(weights["w2"], weights["w2_scale"], None)


def _unpack(weights: Mapping[str, torch.Tensor], layout: GateUpLayout | None) -> None:
    ops.unpack_nvfp4_matrix(weights["w13"], weights["w13_scale"], layout and layout.value)
    ops.unpack_nvfp4_matrix(weights["w2"], weights["w2_scale"], None)


class Nvfp4Method(PackedMethod):
    """NVFP4 experts, in either convention; the names of the tensors say which."""

    checkpoint_suffixes: ClassVar[Mapping[str, str]] = {
        "weight_packed": "",
        "weight_scale": "_scale",
        "weight_scale_2": "_global_scale",
        "weight_global_scale": "_inverse_global_scale",
        "input_scale": "_input_scale",
        "input_global_scale": "_inverse_input_scale",
    }
    layouts: ClassVar[Mapping[str, WeightLayout]] = {MMA_LAYOUT: WeightLayout(MMA_LAYOUT, _pack, _unpack)}


def claim(name: str, config: Config) -> Nvfp4Method | str:
    """A method of scheme `name` for a checkpoint's `quantization_config`, or why not."""
    own = scheme_of(config)
    if isinstance(own, str):
        return own
    if name == NVFP4.name:
        return Nvfp4Method(NVFP4, online=False)
    if own.name != name:
        return "the checkpoint quantizes no activations"
    return Nvfp4Method(own, online=False)


def scheme_of(config: Config) -> QuantScheme | str:
    """The scheme that a `quantization_config` describes, or why it is none of NVFP4's."""
    method = config.get("quant_method")
    method = str(getattr(method, "value", method))
    readers = {"compressed-tensors": _compressed_tensors, "modelopt": _modelopt}
    if method not in readers:
        return f"quant_method {method!r}; NVFP4 is read from {', '.join(sorted(readers))}"
    return readers[method](config)


def _modelopt(config: Config) -> QuantScheme | str:
    """`{"quant_method": "modelopt", "quant_algo": "NVFP4"}`"""
    known = {"NVFP4": NVFP4_W4A4, "W4A16_NVFP4": NVFP4}
    algo, group = config.get("quant_algo"), config.get("group_size") or GROUP
    if group != GROUP:
        return f"group_size {group}; NVFP4 has groups of {GROUP}"
    return known.get(str(algo), f"ModelOpt quant_algo {algo!r}; of NVFP4 are read {', '.join(known)}")


def _compressed_tensors(config: Config) -> QuantScheme | str:
    """`config_groups` with 4-bit float weights of strategy tensor_group, group_size 16."""
    groups = list((config.get("config_groups") or {}).values())
    first = groups[0] if groups else {}
    for key in ("weights", "input_activations"):
        if any(group.get(key) != first.get(key) for group in groups):
            return f"its config_groups differ in {key}; one format for all experts is read"
    weights, activations = first.get("weights") or {}, first.get("input_activations")
    wanted = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": GROUP}
    for what, args in (("weights", weights), ("input_activations", activations)):
        found = {key: args.get(key) for key in wanted} if args is not None else wanted
        if found != wanted:
            return f"{what} {found}; NVFP4 is {wanted}"
    if activations is None:
        return NVFP4
    if activations.get("dynamic") != "local":
        return f"input_activations with dynamic = {activations.get('dynamic')!r}; NVFP4 has 'local'"
    return NVFP4_W4A4
