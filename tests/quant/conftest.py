"""Layers with packed experts, filled from one set of random weights, and the truth about what they compute.

Shape letters: T tokens · H hidden · I intermediate · E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import moe_core
from moe_core import MoEConfig, MoEParallelConfig, Routing
from moe_core.emulated import dequantize_weights
from moe_core.kernel import MoEKernel
from moe_core.plugins import registry
from moe_core.reference import moe_reference
from moe_core.routed_experts import RoutedExperts

SIZES = {"num_experts": 5, "top_k": 2, "hidden_size": 208, "intermediate_size": 176}
"""Ragged against blocks of 128 in both directions, whole groups of 16."""


def config_of(**changes: Any) -> MoEConfig:
    return MoEConfig(**{**SIZES, "dtype": torch.float32, **changes})


def expert_tensors(config: MoEConfig, seed: int = 0) -> Iterator[tuple[int, str, torch.Tensor]]:
    """(expert, name, tensor), the same for every scheme and split. Up is much smaller than gate: own scales matter."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    for expert in range(config.num_experts):
        for name, shape in shapes.items():
            if name == "gate" and not config.activation.gated:
                continue
            size = {"gate": 1.0, "up": 0.05, "down": 1.0}[name]
            yield expert, name, torch.randn(shape, generator=generator) * size / shape[1] ** 0.5
            if config.activation.bias:
                yield expert, f"{name}_bias", torch.randn(shape[0], generator=generator) * 0.1


def fill(layer: RoutedExperts, seed: int = 0) -> RoutedExperts:
    """Quantize on the way in; schemes that need calibrated inputs get a plausible scale for each projection."""
    activation = layer.quant_method.scheme.activation
    for expert, name, tensor in expert_tensors(layer.config, seed):
        layer.load_expert(expert, name, tensor)
        if activation is not None and (activation.second_level or not activation.dynamic) and "bias" not in name:
            largest = 448 if activation.dtype == "float8_e4m3fn" else 6 * 448
            small = name == "down" and not layer.config.activation.bias  # silu(gate) · up, with up as small as it is
            layer.load_expert(expert, f"{name}_input_scale", torch.tensor((0.5 if small else 4.0) / largest))
    layer.pack_weights()
    return layer


class Layer:
    """A plan, its experts' weights and one kernel, on the CPU."""

    def __init__(self, config: MoEConfig, scheme: str, seed: int = 0, **plan: Any) -> None:
        self.plan = moe_core.plan(config, scheme=scheme, device="cpu", **plan)
        method = registry().find("quant_methods", scheme).factory()
        self.experts = fill(RoutedExperts(self.plan, method, torch.device("cpu")), seed)
        self.kernel = MoEKernel(self.plan)

    def __call__(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self.kernel(x, routing, self.experts.weights)[0]

    def truth(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """In fp64, with the weights as they are packed and the input as it is."""
        spec = self.plan.scheme.weight
        assert spec is not None
        return moe_reference(
            x,
            routing.topk_ids,
            routing.topk_weights,
            dequantize_weights(self.experts.weights, spec),
            self.plan.config.activation,
            compute_dtype=torch.float64,
        )


def routing_of(tokens: int, config: MoEConfig, seed: int = 1) -> Routing:
    """With dropped ids, and an expert that gets nothing."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, config.num_experts - 1, (tokens, config.top_k), generator=generator)
    return Routing(ids, torch.rand(ids.shape, generator=generator))


def tokens_of(tokens: int, config: MoEConfig, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, config.hidden_size, generator=generator).to(config.dtype)


def relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float((got.double() - truth).norm() / truth.norm())


@pytest.fixture(scope="session")
def nvfp4_of_the_library() -> Callable[[torch.Tensor, float], torch.Tensor]:
    """(x, inverse global scale) → what compressed-tensors makes of a linear layer's NVFP4 input, fp32."""
    pytest.importorskip("loguru", reason="compressed-tensors is not installed whole: pip install moe-core[oracles]")
    pytest.importorskip("compressed_tensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.lifecycle import forward
        from compressed_tensors.quantization.utils import calculate_qparams
    args = QuantizationArgs(
        num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    )  # fmt: skip

    def through(x: torch.Tensor, inverse: float) -> torch.Tensor:
        top = torch.tensor([inverse])
        groups = x.unflatten(-1, (-1, 16))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=top)
        codes = forward.quantize(x, scale, zero, args, global_scale=top)
        return forward.dequantize(codes, scale, zero, args, global_scale=top).float()

    return through


@pytest.fixture
def layer() -> Callable[..., Layer]:
    """`layer(scheme, experts=…, dispatch=…, **changes of the config)`"""

    def make(scheme: str, *, seed: int = 0, dispatch: str = "local", experts: str | None = None, parallel: Any = None,
             **changes: Any) -> Layer:  # fmt: skip
        parallel = parallel or MoEParallelConfig()
        config = config_of(**changes)
        return Layer(config, scheme, seed, dispatch=dispatch, experts=experts, parallel=parallel)

    return make
