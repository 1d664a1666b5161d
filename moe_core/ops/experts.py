"""The experts' whole step in the STANDARD format: up GEMM, activation, down GEMM, weighted sum over a token's choices.

T tokens · H hidden · I intermediate · E_l local experts · K top-k. Slot s = t * K + k is one choice of one token.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_core.ops._grouped import GroupedRunner
from moe_core.ops._launch import (
    MAX_BY_SLOT,
    MIN_BLOCK_M,
    ExpertsConfig,
    ExpertsPlan,
    ExpertsProblem,
    GroupedConfig,
    ScanConfig,
    SlotsConfig,
    align_tiles,
    config_for,
)
from moe_core.ops._scan import ScanRunner
from moe_core.ops._slots import SlotsRunner
from moe_core.ops._tuned import choose_plan
from moe_core.ops._weights import LayerWeights, experts_are_neighbours, tensor_map_fits, unit_dim
from moe_core.ops.activation import Activation, activate_torch

WorkspaceShapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def experts_problem(weights: LayerWeights, top_k: int, all_experts: int = 0) -> ExpertsProblem:
    """The host-known facts on which the launch choice depends; asks the device for its size, launches nothing."""
    capability, num_sms = (9, 0), 132
    if weights.w13.is_cuda:
        properties = torch.cuda.get_device_properties(weights.w13.device)
        capability, num_sms = (properties.major, properties.minor), properties.multi_processor_count
    return ExpertsProblem(
        num_experts=weights.num_experts,
        top_k=top_k,
        hidden_size=weights.hidden_size,
        intermediate_size=weights.intermediate_size,
        itemsize=weights.w13.element_size(),
        gated=weights.activation.gated,
        interleaved=weights.activation.gate_up_layout == "interleaved",
        w13_unit=unit_dim(weights.w13, "w13"),
        w2_unit=unit_dim(weights.w2, "w2"),
        w13_tma=tensor_map_fits(weights.w13) and experts_are_neighbours(weights.w13),
        w2_tma=tensor_map_fits(weights.w2) and experts_are_neighbours(weights.w2),
        capability=capability,
        num_sms=num_sms,
        all_experts=all_experts,
    )


def experts_workspace(problem: ExpertsProblem, dtype: torch.dtype, num_tokens: int) -> WorkspaceShapes:
    """Name -> (shape, dtype) of every buffer that a step of at most `num_tokens` tokens may need: host arithmetic only.

    T·K·(I + H) elements of the model dtype, and index arrays of about 3·T·K int32. Contents need no initialisation.
    The sizes hold for every path and tile, so that neither a tuned plan nor the strides of the weights change them.
    """
    slots = num_tokens * problem.top_k
    tiles = align_tiles(slots, problem.num_experts, MIN_BLOCK_M)
    return {
        "act": ((slots, problem.intermediate_size), dtype),
        "y": ((slots, problem.hidden_size), dtype),
        "slot_of_row": ((slots,), torch.int32),
        "row_of_slot": ((slots,), torch.int32),
        "row_end": ((problem.num_experts,), torch.int32),
        "tile_expert": ((tiles,), torch.int32),
        "tile_row": ((tiles,), torch.int32),
        "arrivals": ((min(num_tokens, MAX_BY_SLOT) * -(-problem.hidden_size // MIN_BLOCK_M),), torch.int32),
    }


class ExpertsLauncher:
    """One layer's experts step, prepared once; a call then costs little host time and allocates nothing.

    Args:
        w13: `[E_l, 2I, H]` (without a gate `[E_l, I, H]`), bf16, fp16 or fp32; any strides with one unit stride in the
            last two dims, so a transposed checkpoint is passed as a view.
        w2: `[E_l, H, I]`, likewise.
        top_k: K.
        activation: the function between the GEMMs and the order of gate and up.
        bias13, bias2: `[E_l, 2I]` and `[E_l, H]`, contiguous, or None.
        weight_on_input: the router weight multiplies the input row and not the result, also for K > 1.
        plan: launch parameters per range of T; None: the table of this device and shape, else the heuristics.
        all_experts: E, where ids of other ranks' experts are -1 here: what tiles are chosen by. 0: all are here.

    Weights are used where they are: nothing is copied. When they move, call `bind`.
    """

    def __init__(
        self,
        w13: torch.Tensor,
        w2: torch.Tensor,
        *,
        top_k: int,
        activation: Activation,
        bias13: torch.Tensor | None = None,
        bias2: torch.Tensor | None = None,
        weight_on_input: bool = False,
        plan: ExpertsPlan | None = None,
        all_experts: int = 0,
    ):
        self.top_k = top_k
        self.all_experts = all_experts
        self.activation = activation
        self.weight_on_input = weight_on_input
        self._given_plan = plan
        self.bind(w13, w2, bias13, bias2)

    def bind(
        self,
        w13: torch.Tensor,
        w2: torch.Tensor,
        bias13: torch.Tensor | None = None,
        bias2: torch.Tensor | None = None,
    ) -> None:
        """Uses these weights from now on (shapes as in the constructor)."""
        self.weights = LayerWeights(w13, w2, bias13, bias2, self.activation)
        self.problem = experts_problem(self.weights, self.top_k, self.all_experts)
        device = torch.cuda.get_device_name(w13.device) if w13.is_cuda else ""
        self.plan, self._plan_source = choose_plan(self.problem, device)
        if self._given_plan is not None:
            self.plan, self._plan_source = self._given_plan, "given plan"
        self._runners: dict[ExpertsConfig, Any] = {}
        self._by_tokens: dict[int, Any] = {}

    def workspace(self, num_tokens: int) -> WorkspaceShapes:
        """Name -> (shape, dtype) for a step of at most `num_tokens` tokens."""
        return experts_workspace(self.problem, self.weights.w13.dtype, num_tokens)

    def explain(self, num_tokens: int) -> str:
        """The path and its launch parameters for T = `num_tokens`, and where they come from."""
        return f"{config_for(self.plan, num_tokens)} ({self._plan_source})"

    def __call__(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        workspace: dict[str, torch.Tensor],
        out: torch.Tensor,
        num_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes `out [T, H]` and returns it. Launches on the current stream, never synchronises.

        Args:
            x: `[T, H]`, the weights' dtype, unit stride in H.
            topk_ids: `[T, K]` int32 or int64, contiguous; local expert ids, -1 for none; duplicates add up.
            topk_weights: `[T, K]` float32, contiguous; values at id -1 are not used.
            workspace: tensors as `workspace(T)` names them.
            out: `[T, H]`, unit stride in H; no alias of an input.
            num_rows: int32 `[1]` on the device, or None. Rows from there on are not read; `out` is zero there.
        """
        num_tokens = topk_ids.shape[0]
        if num_tokens == 0:
            return out
        runner = self._by_tokens.get(num_tokens)
        if runner is None:
            self._check(x, topk_ids, topk_weights, out)
            runner = self._runner(config_for(self.plan, num_tokens))
            # Serving sees few distinct T; the bound only keeps a pathological caller from growing the dictionary.
            if len(self._by_tokens) < 4096:
                self._by_tokens[num_tokens] = runner
        runner(x, topk_ids, topk_weights, workspace, out, num_rows)
        return out

    def _check(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
        """The mistakes that a kernel would turn into wrong numbers; looked for at the first step of each T."""
        hidden = self.problem.hidden_size
        for name, tensor in (("x", x), ("out", out)):
            if (
                tensor.shape != (ids.shape[0], hidden)
                or tensor.stride(1) != 1
                or tensor.dtype != self.weights.w13.dtype
            ):
                raise ValueError(
                    f"ExpertsLauncher: {name} is {tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}; "
                    f"[{ids.shape[0]}, {hidden}] {self.weights.w13.dtype} with unit stride in H is expected"
                )
        if ids.shape[1] != self.top_k or ids.dtype not in (torch.int32, torch.int64) or not ids.is_contiguous():
            raise ValueError(
                f"ExpertsLauncher: topk_ids is {tuple(ids.shape)} {ids.dtype}; a contiguous [T, {self.top_k}] int32 or "
                f"int64 tensor is expected"
            )
        if weights.shape != ids.shape or weights.dtype != torch.float32 or not weights.is_contiguous():
            raise ValueError(
                f"ExpertsLauncher: topk_weights is {tuple(weights.shape)} {weights.dtype}; a contiguous "
                f"{list(ids.shape)} float32 tensor is expected"
            )

    def _runner(self, config: ExpertsConfig) -> Any:
        runner = self._runners.get(config)
        if runner is None:
            kinds = {SlotsConfig: SlotsRunner, ScanConfig: ScanRunner, GroupedConfig: GroupedRunner}
            runner = kinds[type(config)](self.weights, self.problem, config, self.weight_on_input)
            self._runners[config] = runner
        return runner


def experts_step(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    *,
    activation: Activation,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    weight_on_input: bool = False,
    num_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    plan: ExpertsPlan | None = None,
) -> torch.Tensor:
    """The step in one call, buffers allocated here: `out [T, H]`. Arguments as in `ExpertsLauncher`.

    For a layer that runs more than once, keep an `ExpertsLauncher`: this prepares one every time.
    """
    launcher = ExpertsLauncher(
        w13, w2, top_k=topk_ids.shape[1], activation=activation, bias13=bias13, bias2=bias2,
        weight_on_input=weight_on_input, plan=plan,
    )  # fmt: skip
    shapes = launcher.workspace(topk_ids.shape[0])
    workspace = {name: torch.empty(shape, dtype=dtype, device=x.device) for name, (shape, dtype) in shapes.items()}
    if out is None:
        out = torch.empty((topk_ids.shape[0], w2.shape[1]), dtype=x.dtype, device=x.device)
    return launcher(x, topk_ids.contiguous(), topk_weights.contiguous(), workspace, out, num_rows)


def experts_step_torch(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    *,
    activation: Activation,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    weight_on_input: bool = False,
    num_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `experts_step` computes, expert by expert in float32; rows from `num_rows` on are zero."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    ids = topk_ids.long()
    if num_rows is not None:
        ids = ids.masked_fill(torch.arange(x.shape[0], device=x.device)[:, None] >= num_rows, -1)
    for expert in range(w13.shape[0]):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        weight = topk_weights[token, choice].float()[:, None]
        rows = x[token].float()
        if weight_on_input:
            rows = rows * weight
        h = rows @ w13[expert].float().T
        if bias13 is not None:
            h = h + bias13[expert].float()
        y = activate_torch(h, activation) @ w2[expert].float().T
        if bias2 is not None:
            y = y + bias2[expert].float()
        out.index_add_(0, token, y if weight_on_input else y * weight)
    return out.to(x.dtype)
