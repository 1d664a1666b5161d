"""The experts' whole step on NVFP4 weights and bfloat16 activations, STANDARD and BATCHED.

T tokens · H hidden · I intermediate · E_l local experts · K top-k · C row capacity. Slot s = t * K + k is one choice of
one token. Weights are in the order of `_nvfp4_layout.py`, into which `pack_nvfp4_matrix` brings a checkpoint's bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moe_core.ops._launch import ExpertsProblem
from moe_core.ops._nvfp4_launch import (
    Nvfp4BatchedConfig,
    Nvfp4Config,
    Nvfp4Plan,
    default_nvfp4_plan,
    nvfp4_batched_config,
    nvfp4_config_for,
)
from moe_core.ops._nvfp4_layout import SCALE_FACTOR, expand_nvfp4_matrix, row_order
from moe_core.ops._nvfp4_run import Batched, Runner, runner_of
from moe_core.ops.activation import Activation
from moe_core.ops.batched import _rows, batched_workspace
from moe_core.ops.experts import WorkspaceShapes, experts_step_torch, experts_workspace


@dataclass(frozen=True)
class Nvfp4Weights:
    """One layer's experts, packed (`pack_nvfp4_matrix`); every tensor contiguous.

    Attributes:
        w13: uint8 `[E_l, 2I, H / 2]`, without a gate `[E_l, I, H / 2]`.
        w13_scale: one byte each, `[E_l, 2I, H / 16]`.
        w13_global: `[E_l, 2]` by half in the order of `gate_up_layout`, without a gate `[E_l, 1]`; fp32 or fp64.
        w2, w2_scale, w2_global: `[E_l, H, I / 2]`, `[E_l, H, I / 16]`, `[E_l, 1]`.
        activation: the function between the products.
        bias13, bias2: `[E_l, 2I]` in the order of `gate_up_layout`, and `[E_l, H]`, or None.
    """

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w13_global: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    w2_global: torch.Tensor
    activation: Activation
    bias13: torch.Tensor | None = None
    bias2: torch.Tensor | None = None

    def __post_init__(self) -> None:
        experts, rows, hidden = self.w13.shape[0], self.w13.shape[1], 2 * self.w13.shape[2]
        halves = 2 if self.activation.gated else 1
        inner = rows // halves
        expected = {
            "w13": (experts, halves * inner, hidden // 2), "w13_scale": (experts, halves * inner, hidden // 16),
            "w13_global": (experts, halves), "w2": (experts, hidden, inner // 2),
            "w2_scale": (experts, hidden, inner // 16), "w2_global": (experts, 1),
            "bias13": (experts, halves * inner), "bias2": (experts, hidden),
        }  # fmt: skip
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and (tuple(tensor.shape) != shape or not tensor.is_contiguous()):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, strides {tensor.stride()}; contiguous {shape} is expected"
                )
        if hidden % 64 or inner % 64:
            raise ValueError(f"H = {hidden}, I = {inner}: the NVFP4 kernels need multiples of 64")

    def problem(self, top_k: int, all_experts: int = 0) -> ExpertsProblem:
        """The host-known facts on which the launch choice depends; asks the device for its size, launches nothing."""
        capability, num_sms = (9, 0), 132
        if self.w13.is_cuda:
            properties = torch.cuda.get_device_properties(self.w13.device)
            capability, num_sms = (properties.major, properties.minor), properties.multi_processor_count
        return ExpertsProblem(
            num_experts=self.w13.shape[0], top_k=top_k, hidden_size=self.w2.shape[1],
            intermediate_size=2 * self.w2.shape[2], gated=self.activation.gated,
            interleaved=self.activation.gate_up_layout == "interleaved", capability=capability, num_sms=num_sms,
            all_experts=all_experts,
        )  # fmt: skip


class Nvfp4ExpertsLauncher:
    """One layer's step, prepared once; a call then costs little host time.

    Args:
        weights: the layer's.
        top_k: K.
        weight_on_input: the router weight multiplies the input row and not the result.
        plan: launch parameters per range of T; None: the heuristics.
        all_experts: E, where ids of other ranks' experts are -1 here: what kernels are chosen by. 0: all are here.
    """

    def __init__(
        self,
        weights: Nvfp4Weights,
        *,
        top_k: int,
        weight_on_input: bool = False,
        plan: Nvfp4Plan | None = None,
        all_experts: int = 0,
    ):
        self.weights, self.problem = weights, weights.problem(top_k, all_experts)
        self.plan = default_nvfp4_plan(self.problem) if plan is None else plan
        self._weight_on_input = weight_on_input
        self._runners: dict[Nvfp4Config, Runner] = {}

    def workspace(self, num_tokens: int) -> WorkspaceShapes:
        """Name -> (shape, dtype) for a step of at most `num_tokens` tokens: those of the unquantized experts."""
        return experts_workspace(self.problem, torch.bfloat16, num_tokens)

    def explain(self, num_tokens: int) -> str:
        """The path and its launch parameters for T = `num_tokens`."""
        return str(nvfp4_config_for(self.plan, num_tokens))

    def __call__(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        workspace: Mapping[str, torch.Tensor],
        out: torch.Tensor,
        num_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes `out [T, H]` and returns it. Arguments as in `ExpertsLauncher`, x and out bfloat16."""
        if topk_ids.shape[0] == 0:
            return out
        config = nvfp4_config_for(self.plan, topk_ids.shape[0])
        runner = self._runners.get(config)
        if runner is None:
            _check(x, out, (topk_ids.shape[0], self.problem.hidden_size))
            runner = self._runners[config] = runner_of(config, self.weights, self.problem, self._weight_on_input)
        runner(_in_words(x), topk_ids, topk_weights, workspace, out, num_rows)
        return out


class Nvfp4BatchedLauncher:
    """The same for the BATCHED format, raw results: each expert's rows by the kernels for as many as it has.

    `config`: launch parameters for every capacity; None: the heuristics.
    """

    def __init__(self, weights: Nvfp4Weights, *, config: Nvfp4BatchedConfig | None = None):
        self.weights, self.problem = weights, weights.problem(1)
        self._given_config = config
        self._runners: dict[Nvfp4BatchedConfig, Batched] = {}

    def workspace(self, capacity: int) -> WorkspaceShapes:
        """Name -> (shape, dtype) for a step with C = `capacity`."""
        return nvfp4_batched_workspace(self.problem, capacity)

    def __call__(
        self,
        x: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        workspace: Mapping[str, torch.Tensor],
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Writes the first tokens_per_expert[e] rows of each `out[e]`; arguments as in `BatchedExpertsLauncher`."""
        experts, capacity, _ = x.shape
        if experts == 0 or capacity == 0:
            return out
        config = nvfp4_batched_config(self.problem, capacity) if self._given_config is None else self._given_config
        (x_rows, x_shift), (out_rows, out_shift) = _rows(_in_words(x), "x"), _rows(out, "out")
        if config.tile is not None and not _is_in_words(out):
            # The GEMMs would keep the permuted x there.
            config = Nvfp4BatchedConfig(config.rows)
        runner = self._runners.get(config)
        if runner is None:
            _check(x, out, (experts, capacity, self.problem.hidden_size))
            runner = self._runners[config] = Batched(config, self.weights, self.problem)
        runner(x_rows, tokens_per_expert, workspace, out_rows, capacity, (x_shift, out_shift))
        return out


def nvfp4_batched_workspace(problem: ExpertsProblem, capacity: int) -> WorkspaceShapes:
    """Name -> (shape, dtype) of the buffers of a batched step, for every tile: host arithmetic only."""
    return batched_workspace(problem, torch.bfloat16, capacity)


def _check(x: torch.Tensor, out: torch.Tensor, shape: tuple[int, ...]) -> None:
    """The mistakes that a kernel would turn into wrong numbers; looked for when a path runs for the first time."""
    for name, tensor in (("x", x), ("out", out)):
        if tuple(tensor.shape) != shape or tensor.stride(-1) != 1 or tensor.dtype != torch.bfloat16:
            raise ValueError(
                f"NVFP4 experts: {name} is {tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}; "
                f"{shape} bfloat16 with unit stride in H is expected"
            )


def _in_words(x: torch.Tensor) -> torch.Tensor:
    """Rows on 16-byte borders, which a lane's loads need: a copy where a caller's rows lie between them."""
    return x if _is_in_words(x) else x.clone(memory_format=torch.contiguous_format)


def _is_in_words(x: torch.Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])


def dequantize_nvfp4(weights: Nvfp4Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """w13 `[E_l, 2I, H]` in the order of `gate_up_layout` and w2 `[E_l, H, I]`, float32."""
    w13, w2 = [], []
    order = row_order(weights.w13.shape[1], weights.activation.gate_up_layout).to(weights.w13.device)
    for expert in range(weights.w13.shape[0]):
        packed = expand_nvfp4_matrix(weights.w13[expert], weights.w13_scale[expert]).float() * SCALE_FACTOR
        rows = torch.empty_like(packed)
        rows[order] = packed
        scale = weights.w13_global[expert].float()
        if weights.activation.gate_up_layout == "interleaved":
            w13.append(rows * scale.repeat(rows.shape[0] // 2)[:, None])
        else:
            w13.append(rows * scale.repeat_interleave(rows.shape[0] // scale.shape[0])[:, None])
        down = expand_nvfp4_matrix(weights.w2[expert], weights.w2_scale[expert]).float()
        w2.append(down * (SCALE_FACTOR * weights.w2_global[expert].float()))
    return torch.stack(w13), torch.stack(w2)


def nvfp4_experts_torch(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: Nvfp4Weights,
    *,
    weight_on_input: bool = False,
    num_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a step of `Nvfp4ExpertsLauncher` computes, expert by expert in float32."""
    w13, w2 = dequantize_nvfp4(weights)
    return experts_step_torch(
        x, topk_ids, topk_weights, w13, w2, activation=weights.activation, bias13=weights.bias13,
        bias2=weights.bias2, weight_on_input=weight_on_input, num_rows=num_rows,
    )  # fmt: skip
