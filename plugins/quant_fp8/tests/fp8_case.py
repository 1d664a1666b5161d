"""FP8 layers without a plan, that the interpreter and the GPU tests share: packed weights, inputs, the two truths.

T tokens · H hidden · I intermediate · E experts · K top-k · C capacity · P halves of w13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_core import ActivationSpec, GateUpLayout, MoEConfig, formats
from moe_core.emulated import EmulatedExperts, dequantize_weights
from moe_core.ops import (
    Activation,
    AlternatingConfig,
    Fp8BatchedLauncher,
    Fp8ExpertsLauncher,
    Fp8StreamConfig,
    Fp8Weights,
    SlotsConfig,
)
from moe_core.ops._fp8_quantize import QuantizeByExpert, QuantizeRows
from moe_core.quant import QuantScheme
from moe_core.reference import moe_reference
from moe_core.types import Dispatched, ExpertWeights
from quant_fp8 import schemes
from quant_fp8.formats import format_of
from tests.quant.hopper_fp8 import HopperStep, Multiply, Tiles, in_float64, matrix_unit

POISON = -(2**30) - 12345  # an index that no kernel may follow
SCHEMES: dict[str, QuantScheme] = {scheme.name: scheme for scheme in schemes.SCHEMES} | {
    "weight_only_block": schemes.weight_only(schemes.FP8_BLOCK),
    "weight_only_tensor": schemes.weight_only(schemes.FP8_TENSOR),
}
OAI = ActivationSpec("swiglu_oai", GateUpLayout.INTERLEAVED, limit=2.0, bias=True)


@dataclass
class Case:
    """`routing`: "random" (with -1 and duplicates), "one" (all to one expert), "none" (all -1) or "distinct"."""

    scheme: str
    tokens: int = 6
    hidden: int = 144
    intermediate: int = 160
    experts: int = 5
    top_k: int = 2
    activation: ActivationSpec = ActivationSpec("silu", GateUpLayout.GATE_UP)  # noqa: RUF009 - frozen
    ids_dtype: torch.dtype = torch.int32
    num_rows: int | None = None
    routing: str = "random"
    halves_differ: bool = False
    dtype: torch.dtype = torch.float16
    device: str = "cpu"

    @property
    def spec(self) -> QuantScheme:
        return SCHEMES[self.scheme]

    def _draw(self, *shape: int, seed: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def record(self) -> ExpertWeights:
        """Packed weights; up is 20 times smaller than gate, so scales that were mixed up would show."""
        spec, gated = self.spec.weight, self.activation.gated
        halves, experts, inner, hidden = 2 if gated else 1, self.experts, self.intermediate, self.hidden
        assert spec is not None
        parts = self._draw(experts, halves, inner, hidden, seed=1) * hidden**-0.5
        parts[:, -1] *= 0.3
        parts[:, :, :, hidden // 2 : hidden // 2 + 16] *= 3
        if self.activation.gate_up_layout is GateUpLayout.UP_GATE:
            parts = parts.flip(1)
        q13, s13 = formats.quantize(parts, spec)
        interleaved = self.activation.gate_up_layout is GateUpLayout.INTERLEAVED
        if interleaved:
            q13 = q13.view(torch.uint8).transpose(1, 2).contiguous().view(torch.float8_e4m3fn)
        if spec.group_shape[0] == 1:
            s13 = (s13.transpose(1, 2) if interleaved else s13).reshape(experts, halves * inner, -1)
        q2, s2 = formats.quantize(self._draw(experts, hidden, inner, seed=2) * inner**-0.5, spec)
        tensors: dict[str, Any] = {
            "w13": q13.reshape(experts, halves * inner, hidden), "w2": q2, "w13_scale": s13, "w2_scale": s2,
        }  # fmt: skip
        activation = self.spec.activation
        if activation is not None and not activation.dynamic:
            steps = torch.linspace(1, 1.5, experts)[:, None]
            tensors["w13_input_scale"] = steps * torch.full((experts, halves), 5.0 / 448)
            if self.halves_differ:
                tensors["w13_input_scale"][::2, -1] *= 3
            tensors["w2_input_scale"] = steps * 8.0 / 448
        if self.activation.bias:
            tensors["w13_bias"] = self._draw(experts, halves * inner, seed=3).to(self.dtype)
            tensors["w2_bias"] = self._draw(experts, hidden, seed=4).to(self.dtype)
        tensors = {name: tensor.contiguous().to(self.device) for name, tensor in tensors.items()}
        return ExpertWeights(gate_up_layout=self.activation.gate_up_layout, **tensors)

    def weights(self, record: ExpertWeights) -> Fp8Weights:
        form, spec = format_of(self.spec), self.activation
        assert not isinstance(form, str)
        layout = spec.gate_up_layout
        return Fp8Weights(
            record.w13, record.w2, record.w13_scale, record.w2_scale, form,
            Activation(spec.function, layout and layout.value, spec.limit, spec.alpha), record.w13_bias, record.w2_bias,
            record.w13_input_scale, record.w2_input_scale,
        )  # fmt: skip

    def inputs(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, ids, router weights; weights at id -1 are NaN."""
        generator = torch.Generator().manual_seed(1000 + seed)
        x = torch.randn(self.tokens, self.hidden, generator=generator).to(self.dtype)
        shape = (self.tokens, self.top_k)
        if self.routing == "random":
            ids = torch.randint(-1, self.experts, shape, generator=generator)
        elif self.routing == "distinct":
            ids = torch.rand(self.tokens, self.experts, generator=generator).topk(self.top_k, dim=1).indices
        else:
            ids = torch.full(shape, self.experts - 1 if self.routing == "one" else -1)
        router = torch.rand(shape, generator=generator).masked_fill(ids < 0, float("nan"))
        return x.to(self.device), ids.to(self.device, self.ids_dtype), router.to(self.device)

    def config(self) -> MoEConfig:
        return MoEConfig(
            num_experts=self.experts, top_k=self.top_k, hidden_size=self.hidden, dtype=self.dtype,
            intermediate_size=self.intermediate, activation=self.activation,
        )  # fmt: skip

    def row_count(self) -> torch.Tensor | None:
        return None if self.num_rows is None else torch.tensor([self.num_rows], dtype=torch.int32, device=self.device)

    def emulated(self, record: ExpertWeights, **dispatched: Any) -> torch.Tensor:
        """By `EmulatedExperts`: the same quantization at the same points, in torch."""
        out = torch.zeros(dispatched["x"].shape, dtype=self.dtype, device=self.device)
        EmulatedExperts(self.config(), self.spec).apply(Dispatched(handle=None, **dispatched), record, {}, out)
        return out

    def expected(self, record: ExpertWeights, launch: Any, **dispatched: Any) -> torch.Tensor:
        """The step as this device computes it with this launch configuration, as far as its arithmetic is known."""
        if not self.is_known:
            return self.emulated(record, **dispatched)
        x, x_scale, counts = dispatched["x"], dispatched.get("x_scale"), dispatched.get("tokens_per_expert")
        if counts is None:
            ids, router = dispatched["topk_ids"], dispatched["topk_weights"]
            if dispatched.get("num_rows") is not None:
                ids = ids.masked_fill(torch.arange(len(ids), device=ids.device)[:, None] >= dispatched["num_rows"], -1)
        else:
            ids = ids_of_rows(counts, x.shape[1])
            router = torch.ones(ids.shape, device=ids.device)
            x, x_scale = x.flatten(0, 1), None if x_scale is None else x_scale.flatten(0, 1)
        step = self.step(record, launch)
        if not isinstance(launch, SlotsConfig | Fp8StreamConfig):
            out = step(x, ids, router, x_scale)
        else:  # y stays in registers
            out = step.out(step.y(*step.codes(step.act(x, ids, x_scale), ids), ids), ids, router)
        return out.reshape(dispatched["x"].shape)

    @property
    def is_known(self) -> bool:
        """Whether `HopperStep` says what is computed here."""
        if self.device == "cpu" or self.spec.activation is None:
            return False
        return torch.cuda.get_device_capability() == (9, 0)

    def step(self, record: ExpertWeights, launch: Any) -> HopperStep:
        """The arithmetic of a launch configuration."""

        def multiply(tile: Any) -> Multiply:
            if isinstance(tile, AlternatingConfig):
                return matrix_unit
            return Tiles(tile.block_m, getattr(tile, "small_m", 0))

        if isinstance(launch, SlotsConfig):
            return HopperStep(self.config(), self.spec, record, in_float64, in_float64)
        if isinstance(launch, Fp8StreamConfig):
            return HopperStep(self.config(), self.spec, record, matrix_unit, matrix_unit)
        return HopperStep(self.config(), self.spec, record, multiply(launch.up), multiply(launch.down))

    def exact(self, record: ExpertWeights, x: torch.Tensor, ids: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
        """In float64 on the dequantized weights, activations as they are."""
        assert self.spec.weight is not None
        plain = dequantize_weights(record, self.spec.weight)
        return moe_reference(x, ids, router, plain, self.activation, compute_dtype=torch.float64)


def ids_of_rows(counts: torch.Tensor, capacity: int) -> torch.Tensor:
    """Every row of the batched format as a token with one choice: `[E·C, 1]`, -1 from the counts on."""
    row = torch.arange(capacity, device=counts.device)
    expert = torch.arange(len(counts), device=counts.device)[:, None]
    return torch.where(row < counts[:, None], expert, -1).reshape(-1, 1)


def poisoned(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], device: str) -> dict[str, torch.Tensor]:
    """Workspace tensors full of NaN and of indices that must never be followed."""
    space = {}
    for name, (shape, dtype) in shapes.items():
        if dtype is torch.float8_e4m3fn:
            space[name] = torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(dtype)
        else:
            fill = float("nan") if dtype.is_floating_point else POISON
            space[name] = torch.full(shape, fill, dtype=dtype, device=device)
    return space


def run(
    case: Case, config: Any = None, given: bool = False, steps: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(result, what it should be, float64) of steps on poisoned memory; rows from `num_rows` on must be zeros.

    `given`: a dispatch has quantized x already.
    """
    record = case.record()
    launcher = Fp8ExpertsLauncher(
        case.weights(record), top_k=case.top_k, dtype=case.dtype, plan=None if config is None else ((None, config),)
    )
    launch, count, results = launcher.config(case.tokens), case.row_count(), []
    for seed in range(steps):
        x, ids, router = case.inputs(seed)
        out = torch.full_like(x, float("nan"))
        sent, scale = x, None
        if given:
            assert case.spec.activation is not None
            sent, scale = (part.to(case.device) for part in formats.quantize(x.cpu(), case.spec.activation))
        launcher(sent, ids, router, poisoned(launcher.workspace(case.tokens), case.device), out, count, scale)
        expected = case.expected(
            record, launch, x=sent, x_scale=scale, topk_ids=ids, topk_weights=router, num_rows=count
        )  # fmt: skip
        exact = case.exact(record, x, ids, torch.nan_to_num(router))
        assert case.num_rows is None or not bool(out[case.num_rows :].any())
        results.append([rows[: case.num_rows] for rows in (out, expected, exact)])
    out, expected, exact = (torch.cat(rows) for rows in zip(*results, strict=True))
    return out, expected, exact


def run_batched(
    case: Case, counts: tuple[int, ...], capacity: int, config: Any = None, given: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, what it should be) of one batched step; rows past the counts are NaN."""
    record = case.record()
    launcher = Fp8BatchedLauncher(case.weights(record), dtype=case.dtype, config=config)
    # A padded hidden dim: rows are views of longer ones.
    x = torch.full((case.experts, capacity, case.hidden + 16), float("nan"), dtype=case.dtype)
    for expert, rows in enumerate(counts):
        x[expert, :rows, : case.hidden] = case._draw(rows, case.hidden, seed=50 + expert)
    x = x[:, :, : case.hidden].to(case.device)
    count = torch.tensor(counts, dtype=torch.int32, device=case.device)
    out = torch.full_like(x, float("nan"))
    sent, scale = x, None
    if given:
        assert case.spec.activation is not None
        sent, scale = (part.to(case.device) for part in formats.quantize(x.cpu(), case.spec.activation))
    launcher(sent, count, poisoned(launcher.workspace(capacity), case.device), out, scale)
    launch = launcher.config(capacity)
    return out, case.expected(record, launch, x=sent, x_scale=scale, tokens_per_expert=count)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error; the norm of `out` where zeros are expected; NaN if anything is not finite."""
    if not torch.isfinite(out).all():
        return float("nan")
    scale = expected.double().norm()
    return float((out.double() - expected.double()).norm() / (scale if scale > 0 else 1.0))


def check_row_quantizer(scheme: str, device: str) -> None:
    """The kernel against `formats`, bit by bit: all magnitudes, a ragged last group, zeros, Inf and NaN."""
    spec = SCHEMES[scheme].activation
    assert spec is not None
    x = torch.randn(64, 720, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 64)[:, None]
    x[1], x[2, 5], x[3, 700], x[4, :128] = 0, torch.inf, torch.nan, 448.0
    x = x.to(torch.bfloat16)
    wanted, wanted_scale = formats.quantize(x, spec)
    q = torch.zeros(64, 720, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(wanted_scale.shape, device=device)
    by_group = spec.group_shape[1] != -1
    launch = QuantizeRows(720, by_group=by_group, power_of_two=scheme.endswith("ue8m0"), pdl=False)
    launch(x.to(device), q, scale, None)
    q, scale, there = q.cpu().float(), scale.cpu(), wanted.float().isfinite()
    assert torch.equal(q[there], wanted.float()[there])
    assert torch.equal(q.isfinite(), there)
    assert torch.equal(scale.nan_to_num(-1), wanted_scale.nan_to_num(-1))


def check_static_quantizer(device: str) -> None:
    """The same under scales that are not made from the data: finite values saturate, Inf and NaN become NaN."""
    x = torch.tensor([[1e30, -1e30, 448.0, 464.0, 0.01, torch.inf, torch.nan, 0.0] * 2], dtype=torch.bfloat16)
    scales = torch.tensor([0.02, 1e-6])
    q = torch.empty(2, 16, dtype=torch.float8_e4m3fn, device=device)
    ids = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    launch = QuantizeByExpert(16, 2, 2, 1, pdl=False)
    launch(x.to(device), ids, None, None, q, None, scales.to(device), None, None, 0, None)
    wanted = torch.cat([formats.to_e4m3(x.float() / scale) for scale in scales]).float()
    torch.testing.assert_close(q.cpu().float(), wanted, rtol=0, atol=0, equal_nan=True)
