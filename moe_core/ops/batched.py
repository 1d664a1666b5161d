"""The experts' step in the BATCHED format: each expert's first rows of a padded buffer, raw results, no routing.

E_l local experts · C row capacity · H hidden · I intermediate. Row i of expert e has the number e * C + i.
"""

from __future__ import annotations

import torch

from moe_core.ops._grouped import GroupedGemms
from moe_core.ops._launch import MIN_BLOCK_M, ExpertsProblem, GroupedConfig, batched_config
from moe_core.ops._runtime import KernelLaunch
from moe_core.ops._weights import LayerWeights
from moe_core.ops.activation import Activation, activate_torch
from moe_core.ops.experts import WorkspaceShapes, experts_problem


def batched_workspace(problem: ExpertsProblem, dtype: torch.dtype, capacity: int) -> WorkspaceShapes:
    """Name -> (shape, dtype) of the buffers of a step with C = `capacity`: host arithmetic only.

    The sizes hold for every tile.
    """
    tiles = problem.num_experts * -(-capacity // MIN_BLOCK_M)
    return {
        "act": ((problem.num_experts * capacity, problem.intermediate_size), dtype),
        "row_end": ((problem.num_experts,), torch.int32),
        "tile_expert": ((tiles,), torch.int32),
        "tile_row": ((tiles,), torch.int32),
        "num_tiles": ((1,), torch.int32),
    }


class BatchedExpertsLauncher:
    """One layer's batched step, prepared once: three kernels, whose time grows with the rows that are there.

    Weights, activation and biases as in `ExpertsLauncher`. `config`: launch parameters for every capacity; None: the
    heuristics. The router weight and the sum over choices belong to the caller.
    """

    def __init__(
        self,
        w13: torch.Tensor,
        w2: torch.Tensor,
        *,
        activation: Activation,
        bias13: torch.Tensor | None = None,
        bias2: torch.Tensor | None = None,
        config: GroupedConfig | None = None,
    ):
        self.activation = activation
        self._given_config = config
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
        self.problem = experts_problem(self.weights, 1)
        self._runners: dict[GroupedConfig, tuple[KernelLaunch, GroupedGemms]] = {}

    def config(self, capacity: int) -> GroupedConfig:
        """Launch parameters for C = `capacity`."""
        return batched_config(self.problem, capacity) if self._given_config is None else self._given_config

    def workspace(self, capacity: int) -> WorkspaceShapes:
        """Name -> (shape, dtype) for a step with C = `capacity`."""
        return batched_workspace(self.problem, self.weights.w13.dtype, capacity)

    def explain(self, capacity: int) -> str:
        """The launch parameters for C = `capacity`, and where they come from."""
        source = "heuristics" if self._given_config is None else "given configuration"
        return f"batched {self.config(capacity)} ({source})"

    def __call__(
        self,
        x: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        workspace: dict[str, torch.Tensor],
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Writes the first tokens_per_expert[e] rows of each `out[e]` and returns `out`; other rows stay as they are.

        Args:
            x: `[E_l, C, H]`, the weights' dtype, unit stride in H.
            tokens_per_expert: `[E_l]` int32 on the device.
            workspace: tensors as `workspace(C)` names them.
            out: `[E_l, C, H]`, unit stride in H; no alias of an input.
        """
        experts, capacity, _ = x.shape
        if experts == 0 or capacity == 0:
            return out
        config = self.config(capacity)
        runner = self._runners.get(config)
        if runner is None:
            runner = self._runners[config] = self._prepare(config)
        tiles, gemms = runner
        (x_rows, x_shift), (out_rows, out_shift) = _rows(x, "x"), _rows(out, "out")
        pointers = x.data_ptr() | out.data_ptr() | tokens_per_expert.data_ptr()
        for buffer in workspace.values():
            pointers |= buffer.data_ptr()
        key = (x_rows.stride(0), out_rows.stride(0), x_shift, out_shift) if pointers % 16 == 0 else None
        tiles(
            (1, 1, 1), key, tokens_per_expert, workspace["row_end"], workspace["tile_expert"], workspace["tile_row"],
            workspace["num_tiles"], capacity,
        )  # fmt: skip
        max_tiles = experts * -(-capacity // config.up.block_m)
        gemms(
            x_rows, out_rows, None, workspace, workspace["num_tiles"], max_tiles, key, shifts=(x_shift, out_shift)
        )  # fmt: skip
        return out

    def _prepare(self, config: GroupedConfig) -> tuple[KernelLaunch, GroupedGemms]:
        from moe_core.ops._kernels.align import batched_tiles_kernel

        experts = self.problem.num_experts
        tiles = KernelLaunch(
            batched_tiles_kernel,
            {"E": experts, "EP": 1 << (experts - 1).bit_length(), "BM": config.up.block_m, "FEW": 0, "PDL": config.pdl},
            warps=4, pdl=config.pdl,
        )  # fmt: skip
        return tiles, GroupedGemms(self.weights, self.problem, config, weight_on_input=False, batched=True)


def _rows(tensor: torch.Tensor, name: str) -> tuple[torch.Tensor, int]:
    """(rows, shift) of `[E_l, C, H]`: all rows `[E_l * C, H]` where they have one stride and the shift is 0, else the
    first expert's, and what an expert's first row is further from the one's before than C rows, in elements."""
    experts, capacity, hidden = tensor.shape
    if tensor.stride(2) != 1:
        raise ValueError(
            f"BatchedExpertsLauncher: {name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; unit "
            f"stride in H is needed"
        )
    shift = tensor.stride(0) - capacity * tensor.stride(1)
    if experts == 1 or shift == 0:
        return tensor.as_strided((experts * capacity, hidden), (tensor.stride(1), 1)), 0
    return tensor[0], shift


def experts_batched(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    *,
    activation: Activation,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: GroupedConfig | None = None,
) -> torch.Tensor:
    """The batched step in one call, buffers allocated here. Arguments as in `BatchedExpertsLauncher`."""
    launcher = BatchedExpertsLauncher(w13, w2, activation=activation, bias13=bias13, bias2=bias2, config=config)
    shapes = launcher.workspace(x.shape[1])
    workspace = {name: torch.empty(shape, dtype=dtype, device=x.device) for name, (shape, dtype) in shapes.items()}
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    return launcher(x, tokens_per_expert, workspace, out)


def experts_batched_torch(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    *,
    activation: Activation,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `experts_batched` computes, in float32; rows past an expert's count are zero."""
    out = torch.zeros_like(x)
    for expert, count in enumerate(tokens_per_expert.tolist()):
        h = x[expert, :count].float() @ w13[expert].float().T
        if bias13 is not None:
            h = h + bias13[expert].float()
        y = activate_torch(h, activation) @ w2[expert].float().T
        if bias2 is not None:
            y = y + bias2[expert].float()
        out[expert, :count] = y.to(x.dtype)
    return out
