"""The experts' step with e4m3 weights, in both formats: what `experts.py` and `batched.py` do for 16-bit weights.

Activations are quantized as the format says, each in front of its GEMM; there is no other rounding than to the model
dtype between the GEMMs. The twin is `moe_core.emulated.EmulatedExperts`: same formulas, same points.

T tokens · H hidden · I intermediate · E_l local experts · K top-k · C row capacity.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_core.ops._fp8_grouped import Fp8BatchedRunner, Fp8GroupedRunner
from moe_core.ops._fp8_launch import (
    Fp8Config,
    Fp8GroupedConfig,
    Fp8Plan,
    Fp8StreamConfig,
    fp8_batched_config,
    fp8_config,
)
from moe_core.ops._fp8_quantize import AMAX_PARTS
from moe_core.ops._fp8_scan import Fp8ScanRunner
from moe_core.ops._fp8_slots import Fp8SlotsRunner
from moe_core.ops._fp8_stream import Fp8StreamRunner, stream_workspace
from moe_core.ops._fp8_weights import Fp8Format, Fp8Weights
from moe_core.ops._launch import (
    MAX_BY_SLOT,
    MIN_BLOCK_M,
    ExpertsProblem,
    ScanConfig,
    SlotsConfig,
    align_tiles,
)
from moe_core.ops.experts import WorkspaceShapes

E4M3 = torch.float8_e4m3fn


def fp8_workspace(problem: ExpertsProblem, spec: Fp8Format, dtype: torch.dtype, num_tokens: int) -> WorkspaceShapes:
    """Name -> (shape, dtype) of every buffer that a step of at most `num_tokens` tokens may need: host arithmetic only.

    The sizes hold for every path and tile. Contents need no initialisation.
    """
    slots = num_tokens * problem.top_k
    tiles = align_tiles(slots, problem.num_experts, MIN_BLOCK_M)
    unit_rows, scratch = stream_workspace(problem, num_tokens)
    streamed = spec.activations in ("group", "row", "static")
    rows = max(slots, unit_rows) if streamed else slots
    shapes: WorkspaceShapes = {
        "act": ((rows, problem.intermediate_size), dtype),
        "y": ((slots, problem.hidden_size), dtype),
        "slot_of_row": ((slots,), torch.int32),
        "row_of_slot": ((slots,), torch.int32),
        "row_end": ((problem.num_experts,), torch.int32),
        "tile_expert": ((tiles,), torch.int32),
        "tile_row": ((tiles,), torch.int32),
        "arrivals": ((min(num_tokens, MAX_BY_SLOT) * -(-problem.hidden_size // MIN_BLOCK_M),), torch.int32),
    }
    if streamed:
        shapes["stream"] = ((scratch,), torch.float32)
    # An expert's input under a scale of its own is quantized into y, which is written after it was read.
    return shapes | _quantized(problem, spec, num_tokens, slots)


def fp8_batched_workspace(
    problem: ExpertsProblem, spec: Fp8Format, dtype: torch.dtype, capacity: int
) -> WorkspaceShapes:
    """The same for the batched step with C = `capacity`."""
    rows = problem.num_experts * capacity
    tiles = problem.num_experts * -(-capacity // MIN_BLOCK_M)
    shapes: WorkspaceShapes = {
        "act": ((rows, problem.intermediate_size), dtype),
        "row_end": ((problem.num_experts,), torch.int32),
        "tile_expert": ((tiles,), torch.int32),
        "tile_row": ((tiles,), torch.int32),
        "num_tiles": ((1,), torch.int32),
    } | _quantized(problem, spec, rows, rows)
    if spec.by_expert:
        shapes["x_q"] = ((2 * rows, problem.hidden_size), E4M3)
    return shapes


def _quantized(problem: ExpertsProblem, spec: Fp8Format, x_rows: int, act_rows: int) -> WorkspaceShapes:
    """Buffers of quantized activations."""
    shapes: WorkspaceShapes = {}
    if spec.activations is not None:
        shapes["act_q"] = ((act_rows, problem.intermediate_size), E4M3)
    if spec.activations in ("group", "row"):
        shapes["act_scale"] = ((act_rows, spec.scale_columns(problem.intermediate_size)), torch.float32)
        shapes["x_q"] = ((x_rows, problem.hidden_size), E4M3)
        shapes["x_scale"] = ((x_rows, spec.scale_columns(problem.hidden_size)), torch.float32)
    if spec.activations == "tensor":
        shapes["expert_scale"] = ((2, problem.num_experts), torch.float32)
        shapes["partial"] = ((problem.num_experts, AMAX_PARTS), torch.float32)
    return shapes


def fp8_problem(weights: Fp8Weights, top_k: int, all_experts: int = 0) -> ExpertsProblem:
    """The host-known facts on which the launch choice depends; asks the device for its size, launches nothing."""
    # On "meta" kernels are compiled for Hopper; on the CPU the interpreter runs, which knows no programmatic launch.
    capability, num_sms = ((9, 0) if weights.w13.is_meta else (0, 0)), 132
    if weights.w13.is_cuda:
        properties = torch.cuda.get_device_properties(weights.w13.device)
        capability, num_sms = (properties.major, properties.minor), properties.multi_processor_count
    return ExpertsProblem(
        num_experts=weights.num_experts,
        top_k=top_k,
        hidden_size=weights.hidden_size,
        intermediate_size=weights.intermediate_size,
        itemsize=1,
        gated=weights.activation.gated,
        interleaved=weights.activation.gate_up_layout == "interleaved",
        capability=capability,
        num_sms=num_sms,
        all_experts=all_experts,
    )


class Fp8ExpertsLauncher:
    """One layer's FP8 step in the STANDARD format, prepared once; a call then allocates nothing and never waits.

    Args:
        weights: the packed experts. They are used where they are.
        top_k: K.
        dtype: of x (where it is not quantized already), of what passes between the GEMMs, and of out.
        plan: launch parameters per range of T; None: `fp8_config`.
        all_experts: E, where ids of other ranks' experts are -1 here: what tiles are chosen by. 0: all are here.
    """

    def __init__(
        self,
        weights: Fp8Weights,
        *,
        top_k: int,
        dtype: torch.dtype,
        plan: Fp8Plan | None = None,
        all_experts: int = 0,
    ):
        self.weights, self.dtype = weights, dtype
        self.problem = fp8_problem(weights, top_k, all_experts)
        self._plan = plan
        self._runners: dict[Fp8Config, Any] = {}
        self._by_tokens: dict[tuple[int, bool], Any] = {}

    def workspace(self, num_tokens: int) -> WorkspaceShapes:
        """Name -> (shape, dtype) for a step of at most `num_tokens` tokens."""
        return fp8_workspace(self.problem, self.weights.format, self.dtype, num_tokens)

    def config(self, num_tokens: int) -> Fp8Config:
        """The path and its launch parameters for T = `num_tokens`."""
        if self._plan is not None:
            return next(config for end, config in self._plan if end is None or num_tokens <= end)
        return fp8_config(self.problem, self.weights.format, num_tokens, self.weights.plain)

    def __call__(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        workspace: dict[str, torch.Tensor],
        out: torch.Tensor,
        num_rows: torch.Tensor | None = None,
        x_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes `out [T, H]` and returns it. Launches on the current stream.

        Args:
            x: `[T, H]`, unit stride in H; the model dtype, or e4m3 with `x_scale`.
            topk_ids: `[T, K]` int32 or int64, contiguous; local expert ids, -1 for none; duplicates add up.
            topk_weights: `[T, K]` float32, contiguous; values at id -1 are not used.
            workspace: tensors as `workspace(T)` names them.
            out: `[T, H]`, unit stride in H; no alias of an input.
            num_rows: int32 `[1]` on the device, or None. Rows from there on are not read; `out` is zero there.
            x_scale: float32 `[T, scales of a row]`, unit stride in its last dim; only where activations are quantized
                by groups or rows.
        """
        num_tokens = topk_ids.shape[0]
        if num_tokens == 0:
            return out
        runner = self._by_tokens.get((num_tokens, x_scale is None))
        if runner is None:
            self._check(x, topk_ids, topk_weights, out, x_scale)
            runner = self._runner(self.config(num_tokens))
            # Serving sees few distinct T; the bound only keeps a pathological caller from growing the dictionary.
            if len(self._by_tokens) < 4096:
                self._by_tokens[num_tokens, x_scale is None] = runner
        runner(x, x_scale, topk_ids, topk_weights, workspace, out, num_rows)
        return out

    def _check(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, x_scale: torch.Tensor | None
    ) -> None:
        """The mistakes that a kernel would turn into wrong numbers; looked for at the first step of each T."""
        shape, top_k = (ids.shape[0], self.problem.hidden_size), self.problem.top_k
        for name, tensor, dtype in (
            ("x", x, self.dtype if x_scale is None else E4M3), ("out", out, self.dtype),
        ):  # fmt: skip
            if tensor.shape != shape or tensor.stride(1) != 1 or tensor.dtype != dtype:
                raise ValueError(
                    f"Fp8ExpertsLauncher: {name} is {tuple(tensor.shape)} {tensor.dtype} with strides "
                    f"{tensor.stride()}; {list(shape)} {dtype} with unit stride in H is expected"
                )
        if ids.shape[1] != top_k or ids.dtype not in (torch.int32, torch.int64) or not ids.is_contiguous():
            raise ValueError(
                f"Fp8ExpertsLauncher: topk_ids is {tuple(ids.shape)} {ids.dtype}; a contiguous [T, {top_k}] int32 or "
                f"int64 tensor is expected"
            )
        if weights.shape != ids.shape or weights.dtype != torch.float32 or not weights.is_contiguous():
            raise ValueError(
                f"Fp8ExpertsLauncher: topk_weights is {tuple(weights.shape)} {weights.dtype}; a contiguous "
                f"{list(ids.shape)} float32 tensor is expected"
            )
        if x_scale is not None:
            check_scale(x_scale, (ids.shape[0],), self.weights)

    def _runner(self, config: Fp8Config) -> Any:
        runner = self._runners.get(config)
        if runner is None:
            if isinstance(config, SlotsConfig):
                runner = Fp8SlotsRunner(self.weights, self.problem, config)
            elif isinstance(config, Fp8StreamConfig):
                runner = Fp8StreamRunner(self.weights, self.problem, config)
            else:
                kinds = {ScanConfig: Fp8ScanRunner, Fp8GroupedConfig: Fp8GroupedRunner}
                runner = kinds[type(config)](self.weights, self.problem, config, self.dtype)
            self._runners[config] = runner
        return runner


class Fp8BatchedLauncher:
    """The same in the BATCHED format; the router weight and the sum over choices belong to the caller."""

    def __init__(self, weights: Fp8Weights, *, dtype: torch.dtype, config: Fp8GroupedConfig | None = None):
        self.weights, self.dtype = weights, dtype
        self.problem = fp8_problem(weights, 1)
        self._given_config = config
        self._runners: dict[Fp8GroupedConfig, Fp8BatchedRunner] = {}

    def workspace(self, capacity: int) -> WorkspaceShapes:
        """Name -> (shape, dtype) for a step with C = `capacity`."""
        return fp8_batched_workspace(self.problem, self.weights.format, self.dtype, capacity)

    def config(self, capacity: int) -> Fp8GroupedConfig:
        """Launch parameters for C = `capacity`."""
        return self._given_config or fp8_batched_config(self.problem, self.weights.format, capacity)

    def __call__(
        self,
        x: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        workspace: dict[str, torch.Tensor],
        out: torch.Tensor,
        x_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes the first tokens_per_expert[e] rows of each `out[e]` and returns `out`; other rows stay as they are.

        Args:
            x: `[E_l, C, H]`, unit stride in H, rows of all experts at one stride; the model dtype, or e4m3 with
                `x_scale`.
            tokens_per_expert: `[E_l]` int32 on the device.
            workspace: tensors as `workspace(C)` names them.
            out: `[E_l, C, H]`, strides as x may have them; no alias of an input.
            x_scale: float32 `[E_l, C, scales of a row]`, all rows at one stride, as in `Fp8ExpertsLauncher`.
        """
        experts, capacity, _ = x.shape
        if experts == 0 or capacity == 0:
            return out
        config = self.config(capacity)
        runner = self._runners.get(config)
        if runner is None:
            if x_scale is not None:
                check_scale(x_scale, (experts, capacity), self.weights)
            runner = Fp8BatchedRunner(self.weights, self.problem, config, self.dtype)
            self._runners[config] = runner
        scale_rows = None if x_scale is None else _rows(x_scale, "x_scale")
        runner(_rows(x, "x"), scale_rows, tokens_per_expert, workspace, _rows(out, "out"), capacity)
        return out


def check_scale(x_scale: torch.Tensor, rows: tuple[int, ...], weights: Fp8Weights) -> None:
    """
    Raises:
        ValueError: what came from a dispatch is not how this format quantizes rows.
    """
    spec = weights.format
    expected = (*rows, spec.scale_columns(weights.hidden_size))
    if (
        spec.activations not in ("group", "row")
        or tuple(x_scale.shape) != expected
        or x_scale.dtype != torch.float32
        or x_scale.stride(-1) != 1
    ):
        raise ValueError(
            f"x_scale is {tuple(x_scale.shape)} {x_scale.dtype} with strides {x_scale.stride()}; {spec} takes "
            f"{list(expected)} float32 with unit stride in the last dim, of groups or rows"
        )


def _rows(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """`[E_l, C, columns]` as `[E_l * C, columns]`, a view."""
    experts, capacity, columns = tensor.shape
    if tensor.stride(2) != 1 or (experts > 1 and tensor.stride(0) != capacity * tensor.stride(1)):
        raise ValueError(
            f"Fp8BatchedLauncher: {name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; unit stride in "
            f"the last dim and the same stride between all rows are needed"
        )
    return tensor.as_strided((experts * capacity, columns), (tensor.stride(1), 1))
