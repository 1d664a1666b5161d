"""What FP8 checkpoints call their tensors, and which of the Hub's quantization configs hold FP8 experts.

Sources: DeepSeek-V3's and transformers' `quant_method: fp8`, compressed-tensors' `float-quantized`, ModelOpt's FP8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moe_core.packed import PackedMethod
from moe_core.quant import QuantScheme, ScaleFormat
from quant_fp8 import schemes

Config = Mapping[str, Any]


class Fp8Method(PackedMethod):
    """FP8 experts of any scheme in `schemes`."""

    checkpoint_suffixes: ClassVar[Mapping[str, str]] = {
        "weight_scale_inv": "_scale",  # DeepSeek: despite the name it is multiplied
        "weight_scale": "_scale",  # compressed-tensors, ModelOpt
        "scale": "_scale",  # DeepSeek's own inference code
        "qscale_weight": "_scale",
        "input_scale": "_input_scale",
    }


def claim(name: str, config: Config) -> Fp8Method | str:
    """A method of scheme `name` for a checkpoint's `quantization_config`, or why not."""
    own = scheme_of(config)
    if isinstance(own, str):
        return own
    if name == own.name:
        return Fp8Method(own, online=False)
    if name == schemes.FP8_WEIGHT_ONLY.name:
        return Fp8Method(schemes.weight_only(own), online=False)
    return f"the checkpoint is of scheme {own.name}"


def scheme_of(config: Config) -> QuantScheme | str:
    """The scheme that a `quantization_config` describes, or why it is none of FP8's."""
    method = config.get("quant_method")
    method = str(getattr(method, "value", method))
    readers = {"fp8": _deepseek, "compressed-tensors": _compressed_tensors, "modelopt": _modelopt}
    if method not in readers:
        return f"quant_method {method!r}; FP8 is read from {', '.join(sorted(readers))}"
    return readers[method](config)


def _deepseek(config: Config) -> QuantScheme | str:
    """`{"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": …, "weight_block_size": [128, 128]}`"""
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        return f"fmt {config['fmt']!r}; only e4m3 is read"
    if config.get("expert_dtype", "fp8") != "fp8":
        return f"expert_dtype {config['expert_dtype']!r}: its experts are not FP8"
    activation, block = config.get("activation_scheme", "dynamic"), config.get("weight_block_size")
    if activation not in ("static", "dynamic"):
        return f"activation_scheme {activation!r}; static and dynamic are read"
    if block is None:
        return schemes.FP8_TENSOR if activation == "static" else schemes.FP8_TENSOR_DYNAMIC
    if activation == "static":
        return "activation_scheme 'static' with weight_block_size; activations of blocks have dynamic scales"
    scale = ScaleFormat.UE8M0 if config.get("scale_fmt") == "ue8m0" else ScaleFormat.FP32
    return _block(block, scale)


def _modelopt(config: Config) -> QuantScheme | str:
    """`{"quant_method": "modelopt", "quant_algo": "FP8"}`, or the channel-wise variant."""
    known = {"FP8": schemes.FP8_TENSOR, "FP8_PER_CHANNEL_PER_TOKEN": schemes.FP8_CHANNEL}
    algo = config.get("quant_algo")
    return known.get(str(algo), f"ModelOpt quant_algo {algo!r}; of FP8 are read {', '.join(known)}")


def _compressed_tensors(config: Config) -> QuantScheme | str:
    """`config_groups` with 8-bit float weights of strategy channel, tensor or block."""
    groups = list((config.get("config_groups") or {}).values())
    first = groups[0] if groups else {}
    for key in ("weights", "input_activations"):
        if any(group.get(key) != first.get(key) for group in groups):
            return f"its config_groups differ in {key}; one format for all experts is read"
    weights, activations = first.get("weights") or {}, first.get("input_activations")
    if (weights.get("num_bits"), weights.get("type")) != (8, "float") or not weights.get("symmetric", True):
        return f"weights of {weights.get('num_bits')} bits, type {weights.get('type')!r}; symmetric 8-bit float is read"
    strategy = weights.get("strategy")
    if strategy == "block":
        own = _block(weights.get("block_structure") or [128, 128], ScaleFormat.FP32)
        expected: list[tuple[Any, Any]] = [("group", True)]
    elif strategy == "channel":
        own, expected = schemes.FP8_CHANNEL, [("token", True)]
    elif strategy == "tensor":
        static = activations is not None and not activations.get("dynamic")
        own = schemes.FP8_TENSOR if static else schemes.FP8_TENSOR_DYNAMIC
        expected = [("tensor", True), ("tensor", False)]
    else:
        return f"weights of strategy {strategy!r}; channel, tensor and block are read"
    if isinstance(own, str) or activations is None:
        return own if isinstance(own, str) else schemes.weight_only(own)
    asked = (activations.get("strategy"), bool(activations.get("dynamic")))
    if asked not in expected or (asked[0] == "group" and activations.get("group_size") != _columns(own)):
        return (
            f"weights of strategy {strategy!r} with input_activations {dict(activations)}; with these weights are read "
            f"(strategy, dynamic) {' or '.join(map(str, expected))}"
        )
    return own


def _block(block: Any, scale: ScaleFormat) -> QuantScheme | str:
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        return f"weight blocks of {block!r}; expected two positive ints"
    return schemes.block_scheme((block[0], block[1]), scale)


def _columns(scheme: QuantScheme) -> int:
    assert scheme.activation is not None, "a block scheme quantizes activations"
    return scheme.activation.group_shape[1]
