"""Runs the NVFP4 paths with everything but a step's own tensors bound (see `_kernels/nvfp4.py`).

T tokens · H hidden · I intermediate · E_l local experts · K top-k · C row capacity.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from moe_core.ops._align import AlignLaunch
from moe_core.ops._launch import ExpertsProblem, align_tiles
from moe_core.ops._nvfp4_launch import (
    COLUMNS_PER_BLOCK,
    MAX_LIST_SLOTS,
    SHORTEST,
    Nvfp4Config,
    Nvfp4GemmConfig,
    Nvfp4RowsConfig,
    Nvfp4SlotsConfig,
    WarpsConfig,
)
from moe_core.ops._reduce import ReduceLaunch
from moe_core.ops._runtime import KernelLaunch

if TYPE_CHECKING:
    from moe_core.ops.nvfp4 import Nvfp4Weights

_BLOCK_M = 128  # of the align kernel's list of tiles, which these paths don't read


class Runner(Protocol):
    """One path of the STANDARD step."""

    def __call__(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        router_weights: torch.Tensor,
        workspace: Mapping[str, torch.Tensor],
        out: torch.Tensor,
        num_rows: torch.Tensor | None,
    ) -> None: ...


def runner_of(config: Nvfp4Config, weights: Nvfp4Weights, problem: ExpertsProblem, weight_on_input: bool) -> Runner:
    """What runs a configuration."""
    if isinstance(config, Nvfp4SlotsConfig):
        return Slots(config, weights, problem, weight_on_input)
    if isinstance(config, Nvfp4GemmConfig):
        return Gemm(config, weights, problem, weight_on_input)
    return Rows(config, weights, problem, weight_on_input)


class Slots:
    """Two launches."""

    def __init__(self, config: Nvfp4SlotsConfig, weights: Nvfp4Weights, problem: ExpertsProblem, weight_on_input: bool):
        from moe_core.ops._kernels.nvfp4_slots import nvfp4_slots_down_kernel, nvfp4_slots_up_kernel

        hidden, inner, top_k = problem.hidden_size, problem.intermediate_size, problem.top_k
        self._weights, self._top_k = weights, top_k
        self._bytes = (weights.w13_scale.view(torch.uint8), weights.w2_scale.view(torch.uint8))
        self._up_blocks = -(-weights.w13.shape[1] // (16 * config.up.rows))
        self._down_blocks = -(-hidden // (16 * config.down.rows))
        sizes = {"H": hidden, "I": inner, "K": top_k, "WEIGHT_ON_INPUT": weight_on_input, "PDL": config.pdl}
        self._up = _launch(
            nvfp4_slots_up_kernel, config.up, {**sizes, **weights.activation.constants()},
            DEPTH=min(config.up.depth, _steps(hidden, 1, config.up)), pdl=config.pdl,
        )  # fmt: skip
        self._down = _launch(
            nvfp4_slots_down_kernel, config.down, sizes,
            DEPTH=min(config.down.depth, _steps(inner, top_k, config.down)), pdl=config.pdl,
        )  # fmt: skip

    def __call__(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        router_weights: torch.Tensor,
        workspace: Mapping[str, torch.Tensor],
        out: torch.Tensor,
        num_rows: torch.Tensor | None,
    ) -> None:
        weights, tokens, act = self._weights, ids.shape[0], workspace["act"]
        key = _key(num_rows, x, out, ids, router_weights, act)
        self._up(
            (self._up_blocks, tokens * self._top_k, 1), key,
            x, ids, router_weights, num_rows, weights.w13, self._bytes[0], weights.w13_global, weights.w2_global,
            weights.bias13, act, x.stride(0),
        )  # fmt: skip
        self._down(
            (self._down_blocks, tokens, 1), key,
            act, ids, router_weights, num_rows, weights.w2, self._bytes[1], weights.bias2, out, out.stride(0),
        )  # fmt: skip


class RowsGemms:
    """Both products over each expert's rows."""

    def __init__(
        self,
        config: Nvfp4RowsConfig,
        weights: Nvfp4Weights,
        problem: ExpertsProblem,
        *,
        weight_on_input: bool,
        batched: bool,
    ):
        from moe_core.ops._kernels.nvfp4_rows import nvfp4_rows_kernel

        hidden, inner, up_rows = problem.hidden_size, problem.intermediate_size, weights.w13.shape[1]
        self._weights, self._inner = weights, inner
        self._bytes = (weights.w13_scale.view(torch.uint8), weights.w2_scale.view(torch.uint8))
        self._grids = tuple(
            (-(-rows // (16 * warps.rows * warps.tiles)), problem.num_experts, 1)
            for rows, warps in ((up_rows, config.up), (hidden, config.down))
        )
        common = {"K": problem.top_k, "BATCHED": batched, "WEIGHT_ON_INPUT": weight_on_input, "NT": config.eights,
                  "PDL": config.pdl, **weights.activation.constants()}  # fmt: skip
        self._up = _launch(
            nvfp4_rows_kernel, config.up, {**common, "LEN": hidden, "R": up_rows, "N": inner, "UP": True},
            RT=config.up.tiles, pdl=config.pdl,
        )  # fmt: skip
        self._down = _launch(
            nvfp4_rows_kernel, config.down, {**common, "LEN": inner, "R": hidden, "N": hidden, "UP": False},
            RT=config.down.tiles, pdl=config.pdl,
        )  # fmt: skip

    def __call__(
        self,
        x: torch.Tensor,
        slot_of_row: torch.Tensor | None,
        row_end: torch.Tensor,
        router_weights: torch.Tensor | None,
        act: torch.Tensor,
        out: torch.Tensor,
        capacity: int,
        key: Hashable,
    ) -> None:
        weights = self._weights
        self._up(
            self._grids[0], key, x, slot_of_row, row_end, router_weights, weights.w13, self._bytes[0],
            weights.w13_global, weights.bias13, act, capacity, x.stride(0), self._inner,
        )  # fmt: skip
        self._down(
            self._grids[1], key, act, slot_of_row, row_end, router_weights, weights.w2, self._bytes[1],
            weights.w2_global, weights.bias2, out, capacity, self._inner, out.stride(0),
        )  # fmt: skip


class Rows:
    """Four launches: list, both products, reduce."""

    def __init__(self, config: Nvfp4RowsConfig, weights: Nvfp4Weights, problem: ExpertsProblem, weight_on_input: bool):
        self._experts, self._top_k, self._pdl = problem.num_experts, problem.top_k, config.pdl
        self._lists: dict[int, KernelLaunch] = {}
        self._align = AlignLaunch(problem, _BLOCK_M, config.pdl)
        self._gemms = RowsGemms(config, weights, problem, weight_on_input=weight_on_input, batched=False)
        self._reduce = ReduceLaunch(problem, weight_on_input, config.pdl)

    def __call__(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        router_weights: torch.Tensor,
        workspace: Mapping[str, torch.Tensor],
        out: torch.Tensor,
        num_rows: torch.Tensor | None,
    ) -> None:
        y, act, slot_of_row, row_end = (workspace[name] for name in ("y", "act", "slot_of_row", "row_end"))
        key = _key(num_rows, x, out, ids, router_weights, *workspace.values())
        slots = ids.numel()
        if slots <= MAX_LIST_SLOTS:
            self._list(slots)((self._experts, 1, 1), key, ids, num_rows, slot_of_row, row_end, slots)
        else:
            self._align(ids, num_rows, workspace, key)
        self._gemms(x, slot_of_row, row_end, router_weights, act, y, 0, key)
        self._reduce(y, ids, router_weights, None, num_rows, out)

    def _list(self, slots: int) -> KernelLaunch:
        from moe_core.ops._kernels.nvfp4_prepare import nvfp4_list_kernel

        padded = 1 << max(slots - 1, 31).bit_length()
        launch = self._lists.get(padded)
        if launch is None:
            sizes = {"K": self._top_k, "SLOTS": padded, "PDL": self._pdl}
            launch = self._lists[padded] = KernelLaunch(
                nvfp4_list_kernel, sizes, warps=max(1, min(4, padded // 128)), pdl=self._pdl
            )
        return launch


class Gemm:
    """Five launches: permute, align, both products, reduce. Until y is written, its place holds the permuted x."""

    def __init__(self, config: Nvfp4GemmConfig, weights: Nvfp4Weights, problem: ExpertsProblem, weight_on_input: bool):
        from moe_core.ops._kernels.nvfp4_gemm import nvfp4_gemm_kernel
        from moe_core.ops._kernels.nvfp4_prepare import nvfp4_permute_kernel

        hidden, inner, up_rows = problem.hidden_size, problem.intermediate_size, weights.w13.shape[1]
        if min(hidden, inner) < SHORTEST:
            raise ValueError(f"Nvfp4GemmConfig needs H and I of at least {SHORTEST}, not {hidden} and {inner}")
        self._weights, self._problem, self._config = weights, problem, config
        self._bytes = (weights.w13_scale.view(torch.uint8), weights.w2_scale.view(torch.uint8))
        self._permute = KernelLaunch(nvfp4_permute_kernel, {"H": hidden, "BT": 8, "BH": 512}, warps=4)
        self._align = AlignLaunch(problem, config.up.block_n, pdl=False)
        common = {"K": problem.top_k, "WEIGHT_ON_INPUT": weight_on_input, **weights.activation.constants()}
        self._up, self._down = (
            KernelLaunch(
                nvfp4_gemm_kernel,
                {**common, **sizes, "BN": tile.block_n, "STAGES": tile.stages, "GROUP": tile.group,
                 "SPLIT": config.up.block_n // tile.block_n},
                warps=8,
            )
            for tile, sizes in (
                (config.up, {"LEN": hidden, "R": up_rows, "N": inner, "UP": True, "GATHER": True}),
                (config.down, {"LEN": inner, "R": hidden, "N": hidden, "UP": False, "GATHER": False}),
            )
        )  # fmt: skip
        self._reduce = ReduceLaunch(problem, weight_on_input, pdl=False)

    def __call__(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        router_weights: torch.Tensor,
        workspace: Mapping[str, torch.Tensor],
        out: torch.Tensor,
        num_rows: torch.Tensor | None,
    ) -> None:
        weights, problem, config = self._weights, self._problem, self._config
        hidden, inner, tokens = problem.hidden_size, problem.intermediate_size, x.shape[0]
        y, act = workspace["y"], workspace["act"]
        key = _key(num_rows, x, out, ids, router_weights, *workspace.values())
        self._permute((-(-tokens // 8), -(-hidden // 512), 1), key, x, y, tokens, x.stride(0))
        self._align(ids, num_rows, workspace, key)
        tiles = align_tiles(ids.numel(), problem.num_experts, config.up.block_n)
        lists = (workspace["slot_of_row"], workspace["row_end"], workspace["tile_expert"], workspace["tile_row"])
        self._up(
            (tiles * -(-weights.w13.shape[1] // 128), 1, 1), key, y, *lists, router_weights, weights.w13,
            self._bytes[0], weights.w13_global, weights.bias13, act, tiles, hidden, inner,
        )  # fmt: skip
        self._down(
            (tiles * (config.up.block_n // config.down.block_n) * -(-hidden // 128), 1, 1), key, act, *lists,
            router_weights, weights.w2, self._bytes[1], weights.w2_global, weights.bias2, y, tiles, inner, hidden,
        )  # fmt: skip
        self._reduce(y, ids, router_weights, workspace["row_of_slot"], num_rows, out)


class BatchedRows:
    """Two launches."""

    def __init__(self, config: Nvfp4RowsConfig, weights: Nvfp4Weights, problem: ExpertsProblem):
        self._gemms = RowsGemms(config, weights, problem, weight_on_input=False, batched=True)

    def __call__(
        self,
        x: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        workspace: Mapping[str, torch.Tensor],
        out: torch.Tensor,
        capacity: int,
    ) -> None:
        act = workspace["act"]
        key = _key(None, x, out, tokens_per_expert, act)
        self._gemms(x, None, tokens_per_expert, None, act, out, capacity, key)


def _launch(kernel: Any, warps: WarpsConfig, constants: dict[str, Any], *, pdl: bool, **own: int) -> KernelLaunch:
    own |= {"WR": warps.rows, "WK": warps.along_k}
    if warps.registers:
        own["maxnreg"] = warps.registers
    return KernelLaunch(kernel, {**constants, **own}, warps=warps.rows * warps.along_k, pdl=pdl)


def _steps(length: int, choices: int, warps: WarpsConfig) -> int:
    """Blocks of one warp."""
    return max(1, -(-(length // COLUMNS_PER_BLOCK * choices) // warps.along_k))


def _key(num_rows: torch.Tensor | None, x: torch.Tensor, out: torch.Tensor, *others: torch.Tensor) -> Hashable:
    """Equal for steps that may share compiled kernels; None where a pointer lies off 16-byte borders.

    The first of `others` is the ids (BATCHED: the counts), whose dtype the caller chooses.
    """
    pointers = x.data_ptr() | out.data_ptr()
    for tensor in others:
        pointers |= tensor.data_ptr()
    if (pointers if num_rows is None else pointers | num_rows.data_ptr()) % 16:
        return None
    return (x.stride(0), out.stride(0), others[0].dtype, num_rows is None)
