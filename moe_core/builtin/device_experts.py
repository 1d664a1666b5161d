"""The torch experts on a device whose values the host may not ask for: grouped and batched GEMMs, no loop if possible.

Shape letters: H hidden · I intermediate per rank · E_l local experts · K top-k · R received rows ·
C row capacity per local expert · N = R · K choices.

Only the loop in `_grouped_linear`'s fallback reads the device, and only for shapes and dtypes that `F.grouped_mm` does
not take; the capability record refuses these under graph capture.
"""

from __future__ import annotations

import attrs
import torch
import torch.nn.functional as F

from moe_core.builtin.activation import activate
from moe_core.builtin.grouped_mm import GROUPED_MM_ALIGNMENT
from moe_core.config import ActivationSpec
from moe_core.types import Dispatched, ExpertWeights


@attrs.frozen
class _Groups:
    """The choices, sorted by expert.

    Attributes:
        source: int64 `[N]`, the row of each choice.
        place: int64 `[R, K]`, where each choice went.
        expert: int64 `[N]`, in rising order; choices of no expert are last and carry E_l - 1, so that it indexes.
        ends: int32 `[E_l]`, one past each expert's last choice.
        valid: bool `[R, K]`, the choice has an expert.
    """

    source: torch.Tensor
    place: torch.Tensor
    expert: torch.Tensor
    ends: torch.Tensor
    valid: torch.Tensor


def group_by_expert(ids: torch.Tensor, num_rows: torch.Tensor | None, num_local_experts: int) -> _Groups:
    """Sort choices `[R, K]` by expert, wholly on the device."""
    rows, topk = ids.shape
    valid = ids >= 0
    if num_rows is not None:
        valid &= (torch.arange(rows, device=ids.device) < num_rows).unsqueeze(1)
    keys, order = torch.sort(torch.where(valid, ids, num_local_experts).flatten(), stable=True)
    experts = torch.arange(num_local_experts, device=ids.device, dtype=keys.dtype)
    return _Groups(
        source=order.div(topk, rounding_mode="floor"),
        place=torch.empty_like(order).scatter_(0, order, torch.arange(rows * topk, device=ids.device)).view(rows, topk),
        expert=keys.clamp(max=num_local_experts - 1).long(),
        ends=torch.searchsorted(keys, experts, right=True, out_int32=True),
        valid=valid,
    )


def apply_standard(
    activation: ActivationSpec,
    weight_on_input: bool,
    dispatched: Dispatched,
    weights: ExpertWeights,
    out: torch.Tensor,
) -> None:
    """STANDARD format. The sum over K is a gather per choice, so it has one order: no atomics."""
    ids, router_weights = dispatched.topk_ids, dispatched.topk_weights
    assert ids is not None and router_weights is not None, "STANDARD format comes with ids and weights"
    groups = group_by_expert(ids, dispatched.num_rows, weights.w13.shape[0])
    x = dispatched.x.index_select(0, groups.source)
    if weight_on_input:
        scale = torch.empty(x.shape[0], device=x.device).scatter_(0, groups.place.flatten(), router_weights.flatten())
        x.mul_(scale.unsqueeze(1))
    h = _grouped_linear(x, weights.w13, groups.ends)
    if weights.w13_bias is not None:
        h.add_(weights.w13_bias[groups.expert])
    act = h.new_empty(h.shape[0], weights.w2.shape[2])
    activate(activation, weights.gate_up_layout, h, act)
    y = _grouped_linear(act, weights.w2, groups.ends)
    if weights.w2_bias is not None:
        y.add_(weights.w2_bias[groups.expert])
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for k in range(ids.shape[1]):
        valid = groups.valid[:, k : k + 1]
        # Choices without an expert have rows that no GEMM wrote: they are replaced, because NaN · 0 is NaN.
        term = torch.where(valid, y.index_select(0, groups.place[:, k]), 0.0)
        if weight_on_input:
            total.add_(term)
        else:
            total.addcmul_(term.float(), torch.where(valid, router_weights[:, k : k + 1], 0.0))
    out.copy_(total)


def apply_batched(
    activation: ActivationSpec,
    weight_on_input: bool,
    dispatched: Dispatched,
    weights: ExpertWeights,
    out: torch.Tensor,
) -> None:
    """BATCHED format, all C rows of every expert: how many of them count is known on the device only."""
    assert not weight_on_input, "selection refuses the router weight on the input in BATCHED format"
    h = torch.bmm(dispatched.x, weights.w13.transpose(1, 2))
    if weights.w13_bias is not None:
        h.add_(weights.w13_bias.unsqueeze(1))
    act = h.new_empty(*h.shape[:2], weights.w2.shape[2])
    activate(activation, weights.gate_up_layout, h, act)
    if weights.w2_bias is None:
        torch.bmm(act, weights.w2.transpose(1, 2), out=out)
    else:
        torch.baddbmm(weights.w2_bias.unsqueeze(1), act, weights.w2.transpose(1, 2), out=out)


def _grouped_linear(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`x [N, in]`, sorted by expert, times `w [E_l, out, in]`ᵀ → `[N, out]`. Rows past `ends[-1]` hold anything."""
    if grouped_mm_takes(x, w):
        return F.grouped_mm(x, w.transpose(1, 2), offs=ends)
    y = x.new_empty(x.shape[0], w.shape[1])
    first = 0
    for expert, end in enumerate(ends.tolist()):  # one wait for the device
        if end > first:
            torch.mm(x[first:end], w[expert].t(), out=y[first:end])
        first = end
    return y


def grouped_mm_takes(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether `F.grouped_mm` runs these on the device: elsewhere it refuses, or loops with a wait of its own."""
    if x.device.type != "cuda" or x.dtype is not torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    if any(extent % GROUPED_MM_ALIGNMENT for extent in (x.shape[1], *w.shape[1:])):
        return False
    outer = w.stride(1) if w.stride(2) == 1 else w.stride(2)
    unit = 1 in (w.stride(1), w.stride(2))
    return (
        unit
        and outer % GROUPED_MM_ALIGNMENT == 0
        and w.stride(0) % GROUPED_MM_ALIGNMENT == 0
        and w.data_ptr() % (GROUPED_MM_ALIGNMENT * w.element_size()) == 0
    )
