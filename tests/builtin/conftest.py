"""Layers and steps for the tests of the built-in backends. Everything that may be uninitialised is NaN.

Shape letters: T tokens · H hidden · I intermediate · E experts · K top-k · C row capacity per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import pytest
import torch

from moe_core.config import ActivationSpec
from moe_core.interfaces import Experts
from moe_core.types import ActivationFormat, Dispatched, ExpertWeights, GateUpLayout

NAN = float("nan")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error over largest value, against fp64 on the same rounded inputs."""

ACTIVATIONS = {
    "silu": ActivationSpec(),
    "silu, up first, clamped": ActivationSpec("silu", GateUpLayout.UP_GATE, limit=0.5),
    "gelu": ActivationSpec("gelu"),
    "gelu_tanh, interleaved": ActivationSpec("gelu_tanh", GateUpLayout.INTERLEAVED),
    "gpt-oss": ActivationSpec("swiglu_oai", GateUpLayout.INTERLEAVED, limit=0.7),
    "gpt-oss, halves": ActivationSpec("swiglu_oai", GateUpLayout.GATE_UP, alpha=1.3),
    "silu, no gate": ActivationSpec("silu", None),
    "gelu, no gate": ActivationSpec("gelu", None),
    "relu2": ActivationSpec("relu2", None),
}

ROUTINGS = ("random", "duplicates", "dropped", "one expert", "nobody")


@attrs.frozen
class Layer:
    """A layer's description and weights."""

    activation: ActivationSpec
    weights: ExpertWeights
    dtype: torch.dtype
    hidden: int
    intermediate: int


def make_layer(
    name: str, dtype: torch.dtype, *, experts: int = 4, hidden: int = 13, intermediate: int = 7,
    bias: bool = False, transposed: bool = False,
) -> Layer:  # fmt: skip
    activation = attrs.evolve(ACTIVATIONS[name], bias=bias)
    rows = intermediate * (2 if activation.gated else 1)
    w13, w2 = torch.randn(experts, rows, hidden) * 0.3, torch.randn(experts, hidden, intermediate) * 0.3
    w13, w2 = w13.to(dtype), w2.to(dtype)
    if transposed:
        w13, w2 = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (w13, w2))
    biases = (torch.randn(experts, rows).to(dtype), torch.randn(experts, hidden).to(dtype)) if bias else (None, None)
    weights = ExpertWeights(w13, w2, activation.gate_up_layout, *biases)
    return Layer(activation, weights, dtype, hidden, intermediate)


def make_routing(kind: str, tokens: int, experts: int, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 `[T, K]` and weights `[T, K]`; the weight beside a -1 is NaN."""
    ids = torch.rand(tokens, experts).argsort(dim=1)[:, :topk]
    if kind == "duplicates":
        ids = torch.randint(experts, (tokens, topk))
        ids[:, -1] = ids[:, 0]
    elif kind == "dropped":
        ids = torch.where(torch.rand(tokens, topk) < 0.4, -1, ids)
        ids[::3] = -1
    elif kind == "one expert":
        ids = torch.full((tokens, topk), experts - 1)
        ids[:, 1:] = -1
    elif kind == "nobody":
        ids = torch.full((tokens, topk), -1)
    weights = torch.rand(tokens, topk) + 0.1
    return ids, weights.masked_fill(ids < 0, NAN)


def make_tokens(ids: torch.Tensor, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """`[T, H]`, with rows further apart than H, and NaN in the rows that no expert gets."""
    x = torch.randn(ids.shape[0], hidden + 3).to(dtype)[:, :hidden]
    x[(ids < 0).all(dim=1)] = NAN
    return x


def poisoned(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, NAN, dtype=dtype) for name, (shape, dtype) in shapes.items()}


def run_experts(
    experts: Experts, dispatched: Dispatched, weights: ExpertWeights, activation_format: ActivationFormat
) -> torch.Tensor:
    rows = dispatched.x.shape[0 if activation_format is ActivationFormat.STANDARD else 1]
    out = torch.full(dispatched.x.shape, NAN, dtype=dispatched.x.dtype)
    experts.apply(dispatched, weights, poisoned(experts.workspace_shapes(rows, activation_format)), out)
    return out


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, case: object) -> None:
    assert actual.shape == expected.shape, case
    if not actual.numel():
        return
    error = (actual.double() - expected.double()).abs().max()
    scale = expected.double().abs().max().clamp(min=1e-3)
    assert error <= TOLERANCE[dtype] * scale, f"{case}: error {error:.2e} of {scale:.2e}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unchanged() -> Callable[..., Callable[[], None]]:
    """`check = unchanged(tensors…)`; `check()` fails if one was written, by its version counter or its values."""

    def watch(*tensors: torch.Tensor | None) -> Callable[[], None]:
        seen = [(t, t._version, t.clone()) for t in tensors if t is not None]

        def check() -> None:
            for tensor, version, copy in seen:
                assert tensor._version == version
                assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(copy))

        return check

    return watch
