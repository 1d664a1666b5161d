"""Experts cases that the interpreter and the GPU tests share: inputs, poisoned workspaces, comparison with the twin.

T tokens · H hidden · I intermediate · E experts · K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from moe_core.ops import Activation, ExpertsLauncher, experts_step_torch

POISON = -(2**30) - 12345  # an index that no kernel may follow


@dataclass
class ExpertsCase:
    """`routing`: "random" (with -1 and duplicates), "one" (all to one expert), "none" (all -1) or "distinct"."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    activation: Activation = field(default_factory=Activation)
    bias: bool = False
    transposed: bool = False
    weight_on_input: bool = False
    ids_dtype: torch.dtype = torch.int32
    num_rows: int | None = None
    routing: str = "random"
    row_stride: int | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def weights(self) -> dict[str, Any]:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        rows = self.intermediate * (2 if self.activation.gated else 1)

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=self.device).mul_(scale).to(self.dtype)

        w13 = draw(self.experts, rows, self.hidden, scale=self.hidden**-0.5)
        w2 = draw(self.experts, self.hidden, self.intermediate, scale=self.intermediate**-0.5)
        if self.transposed:
            w13 = w13.transpose(1, 2).contiguous().transpose(1, 2)
            w2 = w2.transpose(1, 2).contiguous().transpose(1, 2)
        bias13 = draw(self.experts, rows) if self.bias else None
        bias2 = draw(self.experts, self.hidden) if self.bias else None
        return {"w13": w13, "w2": w2, "bias13": bias13, "bias2": bias2}

    def inputs(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, ids, router weights; weights at id -1 are NaN, as are the columns between rows."""
        generator = torch.Generator(self.device).manual_seed(1000 + self.seed + seed)
        stride = self.row_stride or self.hidden
        x = torch.full((self.tokens, stride), float("nan"), device=self.device, dtype=self.dtype)[:, : self.hidden]
        x.copy_(torch.randn(self.tokens, self.hidden, generator=generator, device=self.device))
        shape = (self.tokens, self.top_k)
        if self.routing == "random":
            ids = torch.randint(-1, self.experts, shape, generator=generator, device=self.device)
        elif self.routing == "distinct":
            scores = torch.rand(self.tokens, self.experts, generator=generator, device=self.device)
            ids = scores.topk(self.top_k, dim=1).indices
        else:
            ids = torch.full(shape, self.experts - 1 if self.routing == "one" else -1, device=self.device)
        router = torch.rand(shape, generator=generator, device=self.device)
        return x, ids.to(self.ids_dtype), router.masked_fill(ids < 0, float("nan"))

    def launcher(self, config: Any = None) -> tuple[ExpertsLauncher, dict[str, Any]]:
        weights = self.weights()
        launcher = ExpertsLauncher(
            **weights, top_k=self.top_k, activation=self.activation, weight_on_input=self.weight_on_input,
            plan=None if config is None else ((None, config),),
        )  # fmt: skip
        return launcher, weights

    def row_count(self) -> torch.Tensor | None:
        if self.num_rows is None:
            return None
        return torch.tensor([self.num_rows], dtype=torch.int32, device=self.device)

    def expected(
        self, weights: dict[str, Any], x: torch.Tensor, ids: torch.Tensor, router: torch.Tensor
    ) -> torch.Tensor:
        return experts_step_torch(
            x, ids, router, **weights, activation=self.activation, weight_on_input=self.weight_on_input,
            num_rows=self.row_count(),
        )  # fmt: skip


def poisoned(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], device: str) -> dict[str, torch.Tensor]:
    """Workspace tensors full of NaN and of indices that must never be followed."""
    return {
        name: torch.full(shape, float("nan") if dtype.is_floating_point else POISON, dtype=dtype, device=device)
        for name, (shape, dtype) in shapes.items()
    }


def run(case: ExpertsCase, config: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, twin's result) of one step on poisoned memory."""
    launcher, weights = case.launcher(config)
    x, ids, router = case.inputs()
    out = torch.full((case.tokens, case.hidden), float("nan"), dtype=case.dtype, device=case.device)
    launcher(x, ids, router, poisoned(launcher.workspace(case.tokens), case.device), out, case.row_count())
    return out, case.expected(weights, x, ids, router)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error; the norm of `out` where zeros are expected; NaN if anything is not finite."""
    if not torch.isfinite(out).all():
        return float("nan")
    scale = expected.float().norm()
    return ((out.float() - expected.float()).norm() / (scale if scale > 0 else 1.0)).item()
