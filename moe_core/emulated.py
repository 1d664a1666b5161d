"""`EmulatedExperts`: experts of any packed scheme in plain torch, by the formulas of `formats`. Right, not fast.

Shape letters: H hidden · I intermediate per rank · E_l local experts · K top-k · R received rows · C row capacity per
local expert · N rows of one expert · P halves of w13.

Weights are dequantized expert by expert to fp32, and both GEMMs run in fp32. Where the scheme quantizes activations,
the input of each GEMM goes through the format's quantizer first, as the rows of one expert: what that expert's own
linear layers would see. It is the answer on machines without a kernel, and what kernels are tested against.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch

from moe_core import formats
from moe_core.config import MoEConfig
from moe_core.interfaces import Experts, WorkspaceShapes
from moe_core.packed import half_rows
from moe_core.quant import QuantScheme, QuantSpec
from moe_core.reference import activation_reference
from moe_core.types import ActivationFormat, Dispatched, ExpertWeights


class EmulatedExperts(Experts):
    """STANDARD and BATCHED, every activation, any device.

    Args:
        config: the layer.
        scheme: its weights' and activations' formats.
        cached: keep each expert's dequantized weights (fp32: four to eight times the packed size) until they change.
    """

    def __init__(self, config: MoEConfig, scheme: QuantScheme, *, cached: bool = False) -> None:
        assert scheme.weight is not None, "unquantized weights need no emulation"
        self._config = config
        self._weight: QuantSpec = scheme.weight
        self._activation = scheme.activation
        self._weight_on_input = config.router_weight_on_input and config.top_k > 1  # K = 1 is done by the kernel
        self._cache: _Cache | None = _Cache() if cached else None

    def workspace_shapes(self, rows: int, activation_format: ActivationFormat) -> WorkspaceShapes:
        """None: sizes depend on how many rows each expert gets, which only the device knows."""
        return {}

    @torch.no_grad()
    def apply(
        self,
        dispatched: Dispatched,
        weights: ExpertWeights,
        workspaces: Mapping[str, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        """See `Experts.apply`. Choices of the same expert in one row are computed one by one and add up."""
        if out.numel() == 0:
            return
        received = dispatched.x
        quantized = dispatched.x_scale is not None
        if dispatched.x_scale is not None:
            assert self._activation is not None, "a quantized payload comes with its spec"
            received = formats.dequantize(dispatched.x, dispatched.x_scale, self._activation)
        if dispatched.tokens_per_expert is not None:
            for expert, count in enumerate(dispatched.tokens_per_expert.tolist()):
                if count:
                    y = self._run(received[expert, :count], expert, weights, quantized)
                    out[expert, :count] = y.to(out.dtype)
            return
        ids, router_weights = dispatched.topk_ids, dispatched.topk_weights
        assert ids is not None and router_weights is not None, "STANDARD format comes with ids and weights"
        if dispatched.num_rows is not None:
            valid = int(dispatched.num_rows)
            ids, router_weights = ids[:valid], router_weights[:valid]
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        for expert in range(weights.w13.shape[0]):
            row, choice = torch.where(ids == expert)
            if not row.shape[0]:
                continue
            x, scale = received[row], router_weights[row, choice].to(torch.float32).unsqueeze(-1)
            if self._weight_on_input:
                y = self._run((x * scale).to(x.dtype), expert, weights)
            else:
                y = self._run(x, expert, weights, quantized) * scale
            if total.device.type == "cpu":
                total.index_add_(0, row, y)
                continue
            for k in range(ids.shape[1]):  # elsewhere the order of additions is fixed only where no row stands twice
                mine = choice == k
                total.index_add_(0, row[mine], y[mine])
        out.copy_(total)

    def _run(self, x: torch.Tensor, expert: int, weights: ExpertWeights, quantized: bool = False) -> torch.Tensor:
        """`[N, H]` through one expert → `[N, H]` fp32. `quantized`: the dispatch has quantized x already."""
        w13, w2 = self._matrices(weights, expert)
        layout = weights.gate_up_layout
        h = x.to(torch.float32) @ w13.T if quantized else self._first_gemm(x, w13, expert, weights)
        if weights.w13_bias is not None:
            h = h + weights.w13_bias[expert].to(torch.float32)
        act = activation_reference(h, attrs.evolve(self._config.activation, gate_up_layout=layout))
        if self._activation is not None:
            act = act.to(self._config.dtype)  # a linear layer's input is in the model dtype; that is what is quantized
        y = self._input(act, _of(weights.w2_input_scale, expert, 0)) @ w2.T
        return y if weights.w2_bias is None else y + weights.w2_bias[expert].to(torch.float32)

    def _first_gemm(self, x: torch.Tensor, w13: torch.Tensor, expert: int, weights: ExpertWeights) -> torch.Tensor:
        """`[N, H]` → `[N, 2I]`. Gate and up quantize it each for itself where their input scales differ."""
        scales = weights.w13_input_scale
        if scales is None or scales.shape[1] == 1 or bool(scales[expert, 0] == scales[expert, 1]):
            return self._input(x, _of(scales, expert, 0)) @ w13.T
        h = x.new_empty((x.shape[0], w13.shape[0]), dtype=torch.float32)
        for half in range(2):
            rows = half_rows(weights.gate_up_layout, w13.shape[0] // 2, half)
            h[:, rows] = self._input(x, _of(scales, expert, half)) @ w13[rows].T
        return h

    def _input(self, x: torch.Tensor, input_scale: torch.Tensor | None) -> torch.Tensor:
        """A GEMM's input, quantized and dequantized as the format says, fp32."""
        spec = self._activation
        if spec is None:
            return x.to(torch.float32)
        if spec.second_level:
            return formats.quantize_dequantize(x, spec, global_scale=input_scale)
        static = None if spec.dynamic else input_scale
        return formats.quantize_dequantize(x, spec, scale=None if static is None else static.reshape(1, 1))

    def _matrices(self, weights: ExpertWeights, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._cache is None:
            return dequantize_expert(weights, expert, self._weight)
        return self._cache.matrices(weights, expert, self._weight)


def dequantize_expert(weights: ExpertWeights, expert: int, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert's w13 `[2I, H]` (rows as they are stored) and w2 `[H, I]` in fp32."""
    assert weights.w13_scale is not None and weights.w2_scale is not None, "packed weights come with scales"
    names = ("w13", "w13_scale", "w2", "w2_scale")
    own = {name: getattr(weights, name)[expert] for name in names}
    if weights.layout is not None:
        own = {name: tensor.clone() for name, tensor in own.items()}
        weights.layout.unpack(own, weights.gate_up_layout)
    q, scale = own["w13"], own["w13_scale"]
    halves = 1 if weights.gate_up_layout is None else 2
    inner = q.shape[0] // halves
    w13 = torch.empty((q.shape[0], q.shape[1] * formats.codes_per_byte(spec)), dtype=torch.float32, device=q.device)
    for half in range(halves):
        rows = half_rows(weights.gate_up_layout, inner, half)
        grid = scale[rows] if spec.group_shape[0] == 1 else scale[half]
        w13[rows] = formats.dequantize(q[rows], grid, spec, _of(weights.w13_global_scale, expert, half))
    top = _of(weights.w2_global_scale, expert, 0)
    return w13, formats.dequantize(own["w2"], own["w2_scale"], spec, top)


def dequantize_weights(weights: ExpertWeights, spec: QuantSpec) -> ExpertWeights:
    """All experts in fp32, as the reference reads them."""
    matrices = [dequantize_expert(weights, expert, spec) for expert in range(weights.w13.shape[0])]
    return ExpertWeights(
        w13=torch.stack([w13 for w13, _ in matrices]),
        w2=torch.stack([w2 for _, w2 in matrices]),
        gate_up_layout=weights.gate_up_layout,
        w13_bias=weights.w13_bias,
        w2_bias=weights.w2_bias,
    )


class _Cache:
    """Dequantized experts of one layer, dropped as soon as a packed tensor is another or was written to."""

    def __init__(self) -> None:
        self._state: tuple[tuple[int, int], ...] = ()
        self._experts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def matrices(self, weights: ExpertWeights, expert: int, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = [
            tensor
            for name in ("w13", "w2", "w13_scale", "w2_scale", "w13_global_scale", "w2_global_scale")
            if (tensor := getattr(weights, name)) is not None
        ]
        if any(tensor.is_inference() for tensor in tensors):  # they count no writes, so nobody knows when to drop
            return dequantize_expert(weights, expert, spec)
        state = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if state != self._state:
            self._state, self._experts = state, {}
        if expert not in self._experts:
            self._experts[expert] = dequantize_expert(weights, expert, spec)
        return self._experts[expert]


def _of(scales: torch.Tensor | None, expert: int, half: int) -> torch.Tensor | None:
    return None if scales is None else scales[expert, half]
