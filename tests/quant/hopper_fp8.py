"""The FP8 experts step as a Hopper GPU computes it: what its matrix unit keeps of a sum, and float32 everywhere else.

N rows of one expert · L length of a dot product · S slots, T·K · H hidden · I intermediate · G groups of 128 columns.

`EmulatedExperts` multiplies in float32. The matrix unit does not: 32 products and the sum so far are aligned to the
largest of them, and what lies below 2^-13 of its power of two is cut off. A GEMM of e4m3 codes is then off by about
1e-3, and of the values between the two GEMMs about one in a hundred falls on the other side of a border between two
codes. Here the bits are dropped where the unit drops them (found by comparing 200 such rules with an H200 on random
codes: this one gave every bit), so kernels are held to the arithmetic that they ask for, not to a wider bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import attrs
import torch

from moe_core import formats
from moe_core.config import MoEConfig
from moe_core.packed import half_rows
from moe_core.quant import QuantScheme
from moe_core.reference import activation_reference
from moe_core.types import ExpertWeights

GROUP = 128
UNIT_ROWS = 64
"""Tiles of fewer rows are not multiplied by this unit: e4m3 becomes fp16 there, which loses nothing to speak of."""
_CHUNK, _KEPT = 32, 13
_SMALLEST = -6  # exponent of subnormal e4m3 codes: the unit does not normalize them
_NOTHING = -1000  # the exponent of zero: below every other

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""e4m3 `[N, 128]` and `[M, 128]` → float64 `[N, M]`: the sums of products over at most 128 columns."""


def matrix_unit(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """See `Multiply`: `wgmma` on e4m3, one instruction of 32 columns after another on the same sum."""
    codes_a, codes_b = a.to(torch.float64), b.to(torch.float64)
    exponents_a, exponents_b = _exponent(codes_a).clamp(min=_SMALLEST), _exponent(codes_b).clamp(min=_SMALLEST)
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64, device=a.device)
    for first in range(0, a.shape[1], _CHUNK):
        part = slice(first, first + _CHUNK)
        products = codes_a[:, None, part] * codes_b[None, :, part]
        exponents = exponents_a[:, None, part] + exponents_b[None, :, part]
        largest = exponents.masked_fill(products == 0, _NOTHING).amax(-1)
        step = _power_of_two(torch.maximum(largest, _exponent(total)) - _KEPT)
        aligned = torch.trunc(products / step[..., None]).sum(-1) + torch.trunc(total / step)
        total = _truncated(aligned * step)
    return total


def in_float64(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """See `Multiply`: float32 units and fp16 products differ from it far below what is compared."""
    return a.to(torch.float64) @ b.to(torch.float64).T


@dataclass(frozen=True)
class Tiles:
    """See `Multiply`: an expert's rows in tiles of `height`; the last takes the height `last` if its rows fit."""

    height: int
    last: int = 0

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        whole = a.shape[0] // self.height * self.height
        if not 0 < a.shape[0] - whole <= self.last:
            whole = a.shape[0]
        return torch.cat([_unit_of(self.height)(a[:whole], b), _unit_of(self.last)(a[whole:], b)])


def _unit_of(rows: int) -> Multiply:
    return matrix_unit if rows >= UNIT_ROWS else in_float64


def _exponent(values: torch.Tensor) -> torch.Tensor:
    """e of ±m · 2^e, 1 ≤ m < 2."""
    return (torch.frexp(values)[1] - 1).masked_fill(values == 0, _NOTHING)


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float64), exponents)


def _truncated(values: torch.Tensor) -> torch.Tensor:
    """Towards zero, to 13 bits behind the leading one."""
    step = _power_of_two(_exponent(values) - _KEPT)
    return torch.trunc(values / step) * step


@attrs.frozen
class HopperStep:
    """A layer's step in stages, so that each can be held to what the one before it really gave.

    Slots are numbered t · K + k. In the batched format every row is a token with one choice, -1 for an unused row.

    Attributes:
        config, scheme, record: the layer; its scheme quantizes activations.
        up, down: how each GEMM multiplies the rows of one expert.
        between: the dtype that the up GEMM's sums are rounded to before the activation; None: they stay float32.
    """

    config: MoEConfig
    scheme: QuantScheme
    record: ExpertWeights
    up: Multiply
    down: Multiply
    between: torch.dtype | None = None

    def __call__(
        self, x: torch.Tensor, ids: torch.Tensor, router_weights: torch.Tensor, x_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The whole step, `[T, H]`; y is rounded to the model dtype, as where it goes through memory."""
        y = self.y(*self.codes(self.act(x, ids, x_scale), ids), ids)
        return self.out(y.to(self.config.dtype), ids, router_weights)

    def act(self, x: torch.Tensor, ids: torch.Tensor, x_scale: torch.Tensor | None = None) -> torch.Tensor:
        """`[T, H]` in the model dtype (e4m3 with `x_scale [T, G]`) → what stands between the GEMMs, `[S, I]`."""
        record, inner = self.record, self.record.w2.shape[2]
        layout = record.gate_up_layout
        act = torch.zeros(ids.numel(), inner, dtype=self.config.dtype, device=x.device)
        assert record.w13_scale is not None
        for expert, slots in _experts(ids):
            token = slots // ids.shape[1]
            h = torch.empty(slots.numel(), record.w13.shape[1], device=x.device)
            for half in range(1 if layout is None else 2):
                rows = half_rows(layout, inner, half)
                if x_scale is None:
                    a, scale = self._quantized(x[token], record.w13_input_scale, expert, half)
                else:
                    a, scale = x[token], x_scale[token]
                grid = record.w13_scale[expert]
                w_scale = grid[rows] if self._weight_group[0] == 1 else grid[half]
                bias = None if record.w13_bias is None else record.w13_bias[expert, rows]
                h[:, rows] = self._gemm(self.up, a, scale, record.w13[expert, rows], w_scale, bias)
            if self.between is not None:
                h = h.to(self.between).to(torch.float32)
            activation = attrs.evolve(self.config.activation, gate_up_layout=layout)
            act[slots] = activation_reference(h, activation).to(act.dtype)
        return act

    def codes(self, act: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`act` as the down GEMM reads it: e4m3 `[S, I]` and float32 scales `[S, G]` or `[S, 1]`."""
        groups = -(-act.shape[1] // GROUP) if self._by_block else 1
        q = torch.zeros(act.shape, dtype=torch.float8_e4m3fn, device=act.device)
        scale = torch.ones(act.shape[0], groups, device=act.device)
        for expert, slots in _experts(ids):
            q[slots], scale[slots] = self._quantized(act[slots], self.record.w2_input_scale, expert, 0)
        return q, scale

    def y(self, q: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The down GEMM of such codes, float32 `[S, H]`."""
        record = self.record
        assert record.w2_scale is not None
        y = torch.zeros(q.shape[0], record.w2.shape[1], device=q.device)
        for expert, slots in _experts(ids):
            bias = None if record.w2_bias is None else record.w2_bias[expert]
            y[slots] = self._gemm(
                self.down, q[slots], scale[slots], record.w2[expert], record.w2_scale[expert], bias
            )  # fmt: skip
        return y

    def out(self, y: torch.Tensor, ids: torch.Tensor, router_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum over a token's choices, `[T, H]` in the model dtype."""
        weights = router_weights.masked_fill(ids < 0, 0)
        return torch.einsum("tk,tkh->th", weights, y.to(torch.float32).unflatten(0, ids.shape)).to(self.config.dtype)

    @property
    def _weight_group(self) -> tuple[int, int]:
        assert self.scheme.weight is not None
        return self.scheme.weight.group_shape

    @property
    def _by_block(self) -> bool:
        return self._weight_group == (GROUP, GROUP)

    def _quantized(
        self, x: torch.Tensor, input_scale: torch.Tensor | None, expert: int, half: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's rows by the format's quantizer: codes, and scales `[N, G]` or `[N, 1]`."""
        assert self.scheme.activation is not None
        static = None if input_scale is None else input_scale[expert, half].reshape(1, 1)
        q, scale = formats.quantize(x, self.scheme.activation, scale=static)
        return q, scale.expand(x.shape[0], -1)

    def _gemm(
        self, multiply: Multiply, a: torch.Tensor, a_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """`[N, L]` · `[M, L]`ᵀ, float32 `[N, M]`: the unit's sums over 128 columns are added up in float32.

        Scales of groups and blocks multiply what is added (fused, so rounded once), all others the finished sum.
        """
        total = torch.zeros(a.shape[0], w.shape[0], device=a.device)
        for group, first in enumerate(range(0, a.shape[1], GROUP)):
            part = multiply(a[:, first : first + GROUP], w[:, first : first + GROUP])
            if self._by_block:
                columns = w_scale[:, group].repeat_interleave(GROUP)[: w.shape[0]]
                part = part * (a_scale[:, group, None] * columns).to(torch.float64)
            total = (total.to(torch.float64) + part).to(torch.float32)
        if not self._by_block:
            total = total * a_scale * w_scale.flatten()
        return total if bias is None else total + bias.to(torch.float32)


def _experts(ids: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Every expert that has rows, with its slots in their order."""
    flat = ids.flatten()
    return [(expert, (flat == expert).nonzero().flatten()) for expert in flat.unique().tolist() if expert >= 0]
