"""A quantization method in a layer of its own: what every case of one stands on.

Shape letters: E_l local experts · H hidden · I intermediate per rank.
"""

from __future__ import annotations

import attrs
import torch

from moe_core.config import ActivationSpec, MoEConfig, MoEParallelConfig, Problem
from moe_core.emulated import dequantize_weights
from moe_core.errors import MoEError
from moe_core.plugins import QuantMethodEntry
from moe_core.quant import QuantMethod, QuantScheme
from moe_core.routed_experts import RoutedExperts
from moe_core.select import CANONICAL_LAYOUT, select
from moe_core.testing import material
from moe_core.testing.case import Skip, Violation
from moe_core.testing.oracle import oracle_experts, pass_through
from moe_core.types import MODEL_DTYPE_PAYLOAD, ActivationFormat, Device, ExpertPlacement

PLAIN = ActivationSpec("silu")
ONE_RANK = MoEParallelConfig()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRECISION = {"float8_e4m3fn": 0.04, "float4_e2m1": 0.13}
"""Relative Frobenius error that a format may make of normal random numbers."""
SIZES = ((24, 20), (32, 48), (64, 96), (256, 128))
"""(H, I), never equal: a transposed tensor has another shape."""
Tensors = dict[tuple[int, str], torch.Tensor]
"""(global expert, name) → what is loaded, or what was read back."""


@attrs.frozen(kw_only=True)
class Setting:
    """One layer.

    Attributes:
        source: dtype of the tensors that are loaded; None: the layer's.
        padded: H of the weights, where they are stored wider.
        weight_layout: what the plan's experts read.
    """

    experts: int = 4
    hidden: int = 24
    inner: int = 20
    dtype: torch.dtype = torch.float32
    source: torch.dtype | None = None
    activation: ActivationSpec = PLAIN
    placement: ExpertPlacement = ExpertPlacement.LINEAR
    padded: int | None = None
    weight_layout: str = CANONICAL_LAYOUT

    @property
    def config(self) -> MoEConfig:
        return MoEConfig(
            num_experts=self.experts,
            top_k=1,
            hidden_size=self.hidden,
            padded_hidden_size=self.padded,
            intermediate_size=self.inner,
            dtype=self.dtype,
            activation=self.activation,
            placement=self.placement,
        )

    def tensors(self, seed: int = 0) -> Tensors:
        dtype = self.source or self.dtype
        made = material.random_weights(self.experts, self.hidden, self.inner, self.activation, dtype, seed)
        return {(e, name): t for e in range(self.experts) for name, t in material.gate_and_up(made, e).items()}


@attrs.frozen(eq=False)
class QuantBench:
    """The method under test."""

    entry: QuantMethodEntry
    device: torch.device

    @property
    def scheme(self) -> QuantScheme:
        return self.entry.factory().scheme

    def fit(self, setting: Setting) -> Setting:
        """The smallest sizes that the scheme's groups allow."""
        for hidden, inner in SIZES:
            tried = attrs.evolve(setting, hidden=hidden, inner=inner)
            try:
                self.layer(tried)
            except (MoEError, Skip):
                continue
            return tried
        return setting

    def layer(
        self, setting: Setting, parallel: MoEParallelConfig = ONE_RANK, *, method: QuantMethod | None = None
    ) -> RoutedExperts:
        """A layer with empty weights, as one rank has it."""
        method = method or self.entry.factory()
        problem = Problem(
            config=setting.config,
            parallel=parallel,
            scheme=method.scheme,
            device=Device.of(self.device),
        )
        candidates = (
            [pass_through(ActivationFormat.STANDARD, frozenset({MODEL_DTYPE_PAYLOAD}))],
            [oracle_experts(setting.activation, method.scheme, weight_layout=setting.weight_layout)],
        )
        return RoutedExperts(select(problem, *candidates), method, self.device)

    def filled(self, setting: Setting, seed: int = 0, parallel: MoEParallelConfig = ONE_RANK) -> RoutedExperts:
        return self.fill(self.layer(setting, parallel), setting.tensors(seed))

    def fill(self, layer: RoutedExperts, tensors: Tensors) -> RoutedExperts:
        activation = self.scheme.activation
        needs_scale = activation is not None and (activation.second_level or not activation.dynamic)
        for (expert, name), tensor in tensors.items():
            layer.load_expert(expert, name, tensor)
            if needs_scale and "bias" not in name:
                layer.load_expert(expert, f"{name}_input_scale", torch.tensor(0.01))
        layer.pack_weights()
        return layer

    def read(self, layer: RoutedExperts) -> Tensors:
        """What the experts would read, dequantized, without what pads H; keyed by global expert."""
        weights = layer.weights
        if self.scheme.weight is not None:
            weights = dequantize_weights(weights, self.scheme.weight)
        hidden = layer.config.hidden_size
        found = {}
        for local, expert in enumerate(layer.expert_map.local_experts):
            for name, tensor in material.gate_and_up(weights, local).items():
                if name == "down_bias" or name == "down":
                    tensor = tensor[:hidden]
                elif not name.endswith("_bias"):
                    tensor = tensor[:, :hidden]
                found[expert, name] = tensor.cpu()
        return found

    def bound(self, name: str, dtype: torch.dtype) -> float:
        spec = self.scheme.weight
        if spec is None or name.endswith("_bias"):
            return {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
        return PRECISION.get(spec.dtype, 0.2)

    def check(self, got: Tensors, wanted: Tensors, dtype: torch.dtype, duty: str) -> None:
        """Every tensor, within what its format can hold."""
        if got.keys() != wanted.keys():
            raise Violation("expert map", f"experts and tensors {sorted(got)} are there, not {sorted(wanted)}")
        for key, tensor in wanted.items():
            off = float((got[key].double() - tensor.double()).norm())
            allowed = self.bound(key[1], dtype) * float(tensor.double().norm())
            if off <= allowed:
                continue
            twin = next(
                (
                    other
                    for other in wanted
                    if other != key
                    and wanted[other].shape == tensor.shape
                    and float((got[key].double() - wanted[other].double()).norm()) <= 2 * allowed + 1e-9
                ),
                None,
            )
            if twin is not None:
                duty = "gate/up layout" if twin[0] == key[0] else "expert map"
                raise Violation(duty, f"where {key[1]!r} of expert {key[0]} should be is {twin[1]!r} of {twin[0]}")
            raise Violation(
                duty,
                f"{key[1]!r} of expert {key[0]} comes back with a relative error of "
                f"{off / max(float(tensor.double().norm()), 1e-30):.3g}, allowed "
                f"{self.bound(key[1], dtype):.3g}",
            )
