"""The dense MoE in plain torch: what every test and benchmark compares with. Written to be read, not to be fast.

Shape letters: T tokens on this rank · H hidden · I intermediate per rank · E experts, global · E_l local experts ·
K top-k · C row capacity per local expert · N rows of one expert.
"""

from __future__ import annotations

import attrs
import torch
import torch.nn.functional as F

from moe_core.config import ActivationSpec
from moe_core.types import ExpertWeights, GateUpLayout


def moe_reference(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: ExpertWeights,
    activation: ActivationSpec,
    *,
    router_weight_on_input: bool = False,
    expert_map: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Every token's choices, computed expert by expert, weighted and summed.

    Args:
        hidden_states: `[T, H]`, any dtype and strides. Never written.
        topk_ids: `[T, K]` integer, global ids, -1 = no expert. An id may stand twice in a row: its weights add.
        topk_weights: `[T, K]`; the value beside a -1 is ignored, also NaN.
        weights: E_l experts, unquantized; any strides. `weights.gate_up_layout` is the one that is read.
        activation: function, limit and alpha. Its `gated` and `bias` must agree with `weights`.
        router_weight_on_input: the weight multiplies the experts' input instead of their output.
        expert_map: `[E]`, global id → local index or -1 (an expert of another rank: no contribution). None: ids are
            indices into `weights`.
        compute_dtype: of all arithmetic, and of the result, so that errors below the model dtype can be measured.

    Returns:
        `[T, H]` in `compute_dtype`; rows without an expert are zero, whatever their hidden states hold.

    Raises:
        ValueError: an id is out of range, or `weights` do not agree with `activation`.
    """
    _check_weights(weights, activation)
    local_ids = _local_ids(topk_ids, expert_map, num_local_experts=weights.w13.shape[0])
    out = torch.zeros(hidden_states.shape, dtype=compute_dtype, device=hidden_states.device)
    for expert in range(weights.w13.shape[0]):
        token, choice = torch.where(local_ids == expert)
        rows = hidden_states[token].to(compute_dtype)
        router_weight = topk_weights[token, choice].to(compute_dtype).unsqueeze(-1)
        if router_weight_on_input:
            result = _expert(rows * router_weight, expert, weights, activation)
        else:
            result = _expert(rows, expert, weights, activation) * router_weight
        out.index_add_(0, token, result)
    return out


def expert_rows_reference(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    weights: ExpertWeights,
    activation: ActivationSpec,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """What experts return in BATCHED format: each row through its expert, without router weights.

    Args:
        x: `[E_l, C, H]`, any dtype and strides; rows past an expert's count may hold anything.
        tokens_per_expert: integer `[E_l]`.
        weights: E_l experts, unquantized; any strides.
        activation: as for `moe_reference`.
        compute_dtype: of all arithmetic and of the result.

    Returns:
        `[E_l, C, H]` in `compute_dtype`; rows past the count are zero.

    Raises:
        ValueError: a count is not within 0..C, or `weights` do not agree with `activation`.
    """
    _check_weights(weights, activation)
    out = torch.zeros(x.shape, dtype=compute_dtype, device=x.device)
    for expert, count in enumerate(tokens_per_expert.tolist()):
        if not 0 <= count <= x.shape[1]:
            raise ValueError(
                f"expert_rows_reference: tokens_per_expert[{expert}] = {count}; legal values: 0 to C = {x.shape[1]}"
            )
        out[expert, :count] = _expert(x[expert, :count].to(compute_dtype), expert, weights, activation)
    return out


def activation_reference(gate_up: torch.Tensor, spec: ActivationSpec) -> torch.Tensor:
    """The function between the two GEMMs, in the dtype it is given.

    Args:
        gate_up: `[..., 2I]` in the order that `spec.gate_up_layout` names, or `[..., I]` without a gate.
        spec: which function.

    Returns:
        `[..., I]`, a new tensor.
    """
    if spec.gate_up_layout is None:
        return _pointwise(gate_up, spec.function)
    gate, up = split_gate_up(gate_up, spec.gate_up_layout)
    if spec.limit is not None:
        gate = gate.clamp(max=spec.limit)  # no lower bound: there the functions tend to 0 by themselves
        up = up.clamp(min=-spec.limit, max=spec.limit)
    if spec.function == "swiglu_oai":
        return gate * torch.sigmoid(spec.alpha * gate) * (up + 1)
    return _pointwise(gate, spec.function) * up


def split_gate_up(gate_up: torch.Tensor, layout: GateUpLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up, `[..., I]` each, as views of `[..., 2I]`."""
    if layout is GateUpLayout.INTERLEAVED:
        return gate_up[..., 0::2], gate_up[..., 1::2]
    first, second = gate_up.chunk(2, dim=-1)
    return (first, second) if layout is GateUpLayout.GATE_UP else (second, first)


def _pointwise(x: torch.Tensor, function: str) -> torch.Tensor:
    if function == "silu":
        return x * torch.sigmoid(x)
    if function == "gelu":
        return F.gelu(x)
    if function == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if function == "relu2":
        return torch.relu(x).square()
    raise ValueError(f"activation_reference has no function {function!r}; teach it the new one first")


def _expert(rows_NH: torch.Tensor, expert: int, weights: ExpertWeights, activation: ActivationSpec) -> torch.Tensor:
    """One expert's raw output `[N, H]` for its rows `[N, H]`, in their dtype."""
    dtype = rows_NH.dtype
    gate_up = rows_NH @ weights.w13[expert].to(dtype).T
    if weights.w13_bias is not None:
        gate_up = gate_up + weights.w13_bias[expert].to(dtype)
    # The layout is a fact of the storage: packing may have changed the one that the model came with.
    hidden = activation_reference(gate_up, attrs.evolve(activation, gate_up_layout=weights.gate_up_layout))
    out = hidden @ weights.w2[expert].to(dtype).T
    if weights.w2_bias is not None:
        out = out + weights.w2_bias[expert].to(dtype)
    return out


def _local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_local_experts: int) -> torch.Tensor:
    """`[T, K]` indices into the weights, -1 where there is nothing to compute."""
    num_ids = num_local_experts if expert_map is None else expert_map.shape[0]
    strange = topk_ids[(topk_ids < -1) | (topk_ids >= num_ids)]
    if strange.numel():
        raise ValueError(
            f"moe_reference: topk_ids holds {strange[0].item()}; legal values: 0 to {num_ids - 1}, and -1 for no expert"
        )
    if expert_map is None:
        return topk_ids
    # -1 is replaced before it is used as an index, where it would mean the last expert.
    return torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0)].to(topk_ids.dtype))


def _check_weights(weights: ExpertWeights, activation: ActivationSpec) -> None:
    """Refuse weights that say something else than the activation: a truth must not guess.

    Raises:
        ValueError: naming what disagrees.
    """
    if weights.w13_scale is not None or weights.w2_scale is not None:
        raise ValueError("the reference reads unquantized weights, and these have scales; dequantize them first")
    if (weights.gate_up_layout is not None) != activation.gated:
        raise ValueError(
            f"the reference got weights with gate_up_layout = {weights.gate_up_layout} and an activation with "
            f"gate_up_layout = {activation.gate_up_layout}; either both have a gate or neither has"
        )
    for name in ("w13_bias", "w2_bias"):
        if (getattr(weights, name) is not None) != activation.bias:
            present = "none" if getattr(weights, name) is None else "one"
            raise ValueError(
                f"the reference got ActivationSpec.bias = {activation.bias} and for ExpertWeights.{name} {present}; "
                "a bias must be neither lost nor invented"
            )
