"""NVFP4 layers without a plan, that several tests share: a checkpoint's bytes, inputs, launches, the float64 truth.

T tokens · H hidden · I intermediate · E experts · K top-k · C capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_core import ActivationSpec, formats
from moe_core.emulated import dequantize_weights
from moe_core.ops import Activation, Nvfp4BatchedLauncher, Nvfp4ExpertsLauncher, Nvfp4Weights, pack_nvfp4_matrix
from moe_core.reference import moe_reference
from moe_core.types import ExpertWeights, GateUpLayout
from quant_nvfp4.schemes import NVFP4

POISON = -(2**30) - 12345  # an index that no kernel may follow


@dataclass
class Case:
    """`routing`: "random" (with -1 and duplicates), "one" (all to one expert), "none" (all -1) or "distinct".
    `extreme`: groups of zeros and the largest codes, scales and spread between experts that the format has."""

    tokens: int
    hidden: int = 256
    intermediate: int = 192
    experts: int = 6
    top_k: int = 2
    activation: ActivationSpec = ActivationSpec()  # noqa: RUF009 - frozen
    ids_dtype: torch.dtype = torch.int32
    num_rows: int | None = None
    routing: str = "random"
    row_stride: int | None = None
    weight_on_input: bool = False
    extreme: bool = False
    device: str = "cuda"

    def _draw(self, *shape: int, seed: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device)

    def record(self) -> ExpertWeights:
        """Packed weights as a checkpoint has them; gate, up and experts have global scales of their own."""
        spec, halves = self.activation, 2 if self.activation.gated else 1
        tensors: dict[str, Any] = {}
        for name, rows, columns, parts in (
            ("w13", self.intermediate, self.hidden, halves),
            ("w2", self.hidden, self.intermediate, 1),
        ):
            values = self._draw(self.experts, parts, rows, columns, seed=columns) * columns**-0.5
            values[:, -1] *= 0.25
            top = formats.global_scale_of(values.abs().amax((2, 3)), NVFP4.weight)
            q, scale = formats.quantize(values, NVFP4.weight, global_scale=top[:, :, None, None])
            if self.extreme:
                q[:, :, :3], scale[:, :, 1:4] = 0x77, torch.tensor(448.0).to(scale.dtype)
                scale[:, :, 5:7], q[:, :, 8:9] = torch.tensor(0.0).to(scale.dtype), 0
                top = top * torch.logspace(-3, 1, self.experts, device=self.device)[:, None]
            if name == "w13" and spec.gate_up_layout is GateUpLayout.INTERLEAVED:
                q, scale = q.transpose(1, 2), scale.view(torch.uint8).transpose(1, 2).contiguous().view(scale.dtype)
            tensors[name] = q.reshape(self.experts, parts * rows, columns // 2).contiguous()
            tensors[f"{name}_scale"] = scale.reshape(self.experts, parts * rows, columns // 16).contiguous()
            tensors[f"{name}_global_scale"] = top
        if spec.bias:
            tensors["w13_bias"] = self._draw(self.experts, halves * self.intermediate, seed=5).to(torch.bfloat16)
            tensors["w2_bias"] = self._draw(self.experts, self.hidden, seed=6).to(torch.bfloat16)
        return ExpertWeights(gate_up_layout=spec.gate_up_layout, **tensors)

    def packed(self, record: ExpertWeights) -> Nvfp4Weights:
        """The same in the kernels' order."""
        spec, layout = self.activation, self.activation.gate_up_layout
        tensors = [getattr(record, name).clone() for name in ("w13", "w13_scale", "w2", "w2_scale")]
        for expert in range(self.experts):
            pack_nvfp4_matrix(tensors[0][expert], tensors[1][expert], layout and layout.value)
            pack_nvfp4_matrix(tensors[2][expert], tensors[3][expert], None)
        return Nvfp4Weights(
            *tensors[:2], record.w13_global_scale, *tensors[2:], record.w2_global_scale,
            Activation(spec.function, layout and layout.value, spec.limit, spec.alpha), record.w13_bias, record.w2_bias,
        )  # fmt: skip

    def inputs(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, ids, router weights; weights at id -1 are NaN, as are the columns between rows."""
        stride = self.row_stride or self.hidden
        x = torch.full((self.tokens, stride), float("nan"), dtype=torch.bfloat16, device=self.device)
        x[:, : self.hidden] = self._draw(self.tokens, self.hidden, seed=1000 + seed).to(torch.bfloat16)
        generator = torch.Generator().manual_seed(2000 + seed)
        shape = (self.tokens, self.top_k)
        if self.routing == "random":
            ids = torch.randint(-1, self.experts, shape, generator=generator)
        elif self.routing == "distinct":
            ids = torch.rand(self.tokens, self.experts, generator=generator).topk(self.top_k, dim=1).indices
        else:
            ids = torch.full(shape, self.experts - 1 if self.routing == "one" else -1)
        router = torch.rand(shape, generator=generator).masked_fill(ids < 0, float("nan"))
        return x[:, : self.hidden], ids.to(self.device, self.ids_dtype), router.to(self.device)

    def row_count(self) -> torch.Tensor | None:
        if self.num_rows is None:
            return None
        return torch.tensor([self.num_rows], dtype=torch.int32, device=self.device)

    def expected(self, record: ExpertWeights, x: torch.Tensor, ids: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
        """The layer on dequantized weights in float64."""
        plain = dequantize_weights(record, NVFP4.weight)
        return moe_reference(
            x, ids, router.nan_to_num(0.0), plain, self.activation, compute_dtype=torch.float64,
            router_weight_on_input=self.weight_on_input,
        )  # fmt: skip


def poisoned(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], device: str) -> dict[str, torch.Tensor]:
    """Workspace tensors full of NaN and of indices that must never be followed."""
    return {
        name: torch.full(shape, float("nan") if dtype.is_floating_point else POISON, dtype=dtype, device=device)
        for name, (shape, dtype) in shapes.items()
    }


def run(case: Case, config: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, float64 truth) of one step on poisoned memory; only the rows that must be written."""
    record = case.record()
    plan = None if config is None else ((None, config),)
    launcher = Nvfp4ExpertsLauncher(
        case.packed(record), top_k=case.top_k, weight_on_input=case.weight_on_input, plan=plan
    )
    x, ids, router = case.inputs()
    out = torch.full((case.tokens, case.hidden), float("nan"), dtype=torch.bfloat16, device=case.device)
    launcher(x, ids, router, poisoned(launcher.workspace(case.tokens), case.device), out, case.row_count())
    if case.num_rows is not None:
        assert not out[case.num_rows :].any(), "zero from num_rows on"
    return out[: case.num_rows], case.expected(record, x, ids, router)[: case.num_rows]


def run_batched(
    case: Case, counts: list[int], capacity: int, config: Any = None, gap: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, float64 truth) of the valid rows; the others hold NaN. `gap`: values between two experts' rows."""
    record = case.record()
    launcher = Nvfp4BatchedLauncher(case.packed(record), config=config)
    shape, strides = (case.experts, capacity, case.hidden), (capacity * case.hidden + gap, case.hidden, 1)
    memory = torch.full((2, case.experts, strides[0]), float("nan"), dtype=torch.bfloat16, device=case.device)
    x, out = (part.as_strided(shape, strides) for part in memory)
    valid = torch.arange(capacity, device=case.device) < torch.tensor(counts, device=case.device)[:, None]
    rows = case._draw(sum(counts), case.hidden, seed=3).to(torch.bfloat16).to(case.device)
    x[valid] = rows
    tokens_per_expert = torch.tensor(counts, dtype=torch.int32, device=case.device)
    launcher(x, tokens_per_expert, poisoned(launcher.workspace(capacity), case.device), out)
    ids = valid.nonzero()[:, :1]
    expected = case.expected(record, rows, ids, torch.ones(ids.shape, device=case.device))
    return out[valid], expected


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error; the norm of `out` where zeros are expected; NaN if anything is not finite."""
    if not torch.isfinite(out).all():
        return float("nan")
    scale = expected.double().norm()
    return ((out.double() - expected.double()).norm() / (scale if scale > 0 else 1.0)).item()
