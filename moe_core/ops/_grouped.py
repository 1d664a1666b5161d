"""Runs the grouped path: align, up GEMM, down GEMM, reduce (see `_kernels/align.py`, `_kernels/grouped.py`).

T tokens · H hidden · I intermediate · E_l local experts · K top-k · C row capacity.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_core.ops._launch import (
    ExpertsProblem,
    GroupedConfig,
    ResidentConfig,
    SpecializedConfig,
    TileConfig,
    align_tiles,
)
from moe_core.ops._reduce import ReduceLaunch
from moe_core.ops._runtime import KernelLaunch
from moe_core.ops._weights import LayerWeights, stride_constants

ALIGN_VECTOR = 128  # ids that a warp of the align kernel loads at a time: 16 bytes a thread
ALIGN_MANY = 16384  # from so many slots on, 32 of its warps were faster than 16

_NO_ACTIVATION = {
    "ACT": None, "GATED": False, "INTERLEAVED": False, "UP_FIRST": False, "ALPHA": 0.0, "LIMIT": 0.0,
}  # fmt: skip


def tensor_map(tensor: torch.Tensor, block: list[int]) -> Any:
    """A host tensor map of `tensor` whose boxes have the shape `block`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def up_map(weights: LayerWeights, unit: str, tile: TileConfig) -> Any:
    """w13's tensor map. A box of halves takes block_n gate rows and the same up rows: no copy, one wide product."""
    w13, activation = weights.w13, weights.activation
    interleaved = activation.gate_up_layout == "interleaved"
    columns = 2 * tile.block_n if interleaved else tile.block_n
    if unit == "n":
        return tensor_map(w13.transpose(1, 2), [1, tile.block_k, columns])
    if activation.gated and not interleaved:
        rows = w13.shape[1]
        halves = w13.unflatten(1, (2, rows // 2))
        if w13.stride(0) == rows * w13.stride(1):
            return tensor_map(halves.flatten(0, 1), [2, tile.block_n, tile.block_k])
        raise ValueError(f"w13 has expert stride {w13.stride(0)}; {rows * w13.stride(1)} is needed for a tensor map")
    return tensor_map(w13, [1, columns, tile.block_k])


def down_map(weights: LayerWeights, unit: str, tile: TileConfig) -> Any:
    """w2's tensor map."""
    if unit == "n":
        return tensor_map(weights.w2.transpose(1, 2), [1, tile.block_k, tile.block_n])
    return tensor_map(weights.w2, [1, tile.block_n, tile.block_k])


class GroupedGemms:
    """The two GEMMs over row tiles of single experts; `batched` says where the rows are."""

    def __init__(
        self,
        weights: LayerWeights,
        problem: ExpertsProblem,
        config: GroupedConfig,
        *,
        weight_on_input: bool,
        batched: bool,
    ):
        self.weights, self.problem, self.config = weights, problem, config
        up, down = config.up, config.down
        self._w13 = up_map(weights, problem.w13_unit, up) if up.tma else weights.w13
        self._up = self._launch(
            up, stride_constants(weights.w13), weights.activation_constants(), problem.hidden_size,
            problem.intermediate_size, problem.w13_unit, gather=not batched, weighted=weight_on_input,
        )  # fmt: skip
        self._special: ResidentDown | SpecializedDown | None = None
        if isinstance(down, ResidentConfig):
            self._special = ResidentDown(weights, problem, down, config.pdl)
            return
        if isinstance(down, SpecializedConfig):
            self._special = SpecializedDown(weights, problem, down)
            return
        self._w2 = down_map(weights, problem.w2_unit, down) if down.tma else weights.w2
        self._down = self._launch(
            down, stride_constants(weights.w2), _NO_ACTIVATION, problem.intermediate_size, problem.hidden_size,
            problem.w2_unit, gather=False, weighted=False,
        )  # fmt: skip

    def _launch(
        self, tile: TileConfig, strides: dict[str, int], activation: dict[str, Any], length: int, columns: int,
        unit: str, *, gather: bool, weighted: bool,
    ) -> KernelLaunch:  # fmt: skip
        from moe_core.ops._kernels.grouped import grouped_gemm_kernel

        constants = {
            "LEN": length, "N": columns, "K": self.problem.top_k, **strides, **activation, "GATHER": gather,
            "WEIGHTED": weighted, "PRECISION": "ieee",
            "TMA_A": tile.tma and not gather and length * self.problem.itemsize % 16 == 0,
            "TMA_W": unit if tile.tma else "", "BM": tile.block_m, "BM_SMALL": tile.small_m or tile.block_m,
            "BN": tile.block_n, "BK": tile.block_k, "STAGES": tile.stages, "GROUP": tile.group,
            "PERSISTENT": tile.persistent > 0, "SPLIT": self.config.up.block_m // tile.block_m,
            "PDL": self.config.pdl,
        }  # fmt: skip
        return KernelLaunch(grouped_gemm_kernel, constants, warps=tile.warps, stages=tile.stages, pdl=self.config.pdl)

    def _grid(self, tile: TileConfig, tiles: int, columns: int) -> tuple[int, int, int]:
        programs = tiles * (self.config.up.block_m // tile.block_m) * -(-columns // tile.block_n)
        if tile.persistent:
            programs = min(programs, tile.persistent * self.problem.num_sms)
        return (programs, 1, 1)

    def _maps(self, tile: TileConfig, rows: torch.Tensor, unit_rows: bool) -> tuple[Any, Any]:
        """Tensor maps of the activation rows, of both tile heights, or (None, None)."""
        if not (tile.tma and unit_rows and rows.shape[1] * rows.element_size() % 16 == 0):
            return None, None
        large = tensor_map(rows, [tile.block_m, tile.block_k])
        small = tile.small_m and tile.small_m < tile.block_m
        return large, tensor_map(rows, [tile.small_m, tile.block_k]) if small else large

    def __call__(
        self, x: torch.Tensor, out: torch.Tensor, router_weights: torch.Tensor | None,
        workspace: dict[str, torch.Tensor], num_tiles: torch.Tensor | None, max_tiles: int, key: Any,
    ) -> None:  # fmt: skip
        """x rows -> act -> out rows; in the batched format x and out are `[E_l * C, H]` views."""
        weights, problem, config = self.weights, self.problem, self.config
        act = workspace["act"]
        slot_of_row = workspace.get("slot_of_row")
        tiles = (workspace["row_end"], workspace["tile_expert"], workspace["tile_row"])
        x_map, x_map_small = self._maps(config.up, x, unit_rows=slot_of_row is None)
        self._up(
            self._grid(config.up, max_tiles, problem.intermediate_size), key,
            x, x_map, x_map_small, self._w13, weights.bias13, act, slot_of_row, *tiles, router_weights, num_tiles,
            max_tiles, x.stride(0), problem.intermediate_size,
        )  # fmt: skip
        if self._special is not None:
            self._special(act, out, workspace, max_tiles, key)
            return
        assert isinstance(config.down, TileConfig)
        act_map, act_map_small = self._maps(config.down, act, unit_rows=True)
        self._down(
            self._grid(config.down, max_tiles, problem.hidden_size), key,
            act, act_map, act_map_small, self._w2, weights.bias2, out, slot_of_row, *tiles, None, num_tiles,
            max_tiles, problem.intermediate_size, out.stride(0),
        )  # fmt: skip


class ResidentDown:
    """The down GEMM with resident weights: one launch over (expert, part of its rows, block of columns)."""

    def __init__(self, weights: LayerWeights, problem: ExpertsProblem, config: ResidentConfig, pdl: bool):
        from moe_core.ops._kernels.resident import resident_down_kernel

        self._weights, self._block_m = weights, config.block_m
        self._padded = 1 << (problem.intermediate_size - 1).bit_length()
        self._w2 = tensor_map(weights.w2, [1, config.block_n, self._padded])
        blocks = -(-problem.hidden_size // config.block_n)
        self._grid = (blocks * problem.num_experts * config.split, 1, 1)
        self._launch = KernelLaunch(
            resident_down_kernel,
            {"H": problem.hidden_size, "IP": self._padded, "BM": config.block_m, "BN": config.block_n,
             "SPLIT": config.split, "STAGES": config.stages, "PDL": pdl},
            warps=config.warps, stages=config.stages, pdl=pdl,
        )  # fmt: skip

    def __call__(
        self, act: torch.Tensor, out: torch.Tensor, workspace: dict[str, torch.Tensor], max_tiles: int, key: Any
    ) -> None:
        act_map = tensor_map(act, [self._block_m, self._padded])
        self._launch(self._grid, key, act_map, self._w2, self._weights.bias2, out, workspace["row_end"])


class SpecializedDown:
    """The down GEMM with a loading warp: one program per multiprocessor walks the tiles."""

    def __init__(self, weights: LayerWeights, problem: ExpertsProblem, config: SpecializedConfig):
        from moe_core.ops._kernels.specialized import specialized_down_kernel

        w2 = weights.w2
        if problem.w2_unit != "k" or w2.stride(0) != w2.shape[1] * w2.stride(1) or w2.element_size() != 2:
            raise ValueError(
                f"SpecializedConfig reads 16-bit weights [E_l, H, I] with all rows at one stride; w2 is {w2.dtype} "
                f"with strides {w2.stride()}; use a TileConfig for it"
            )
        self._weights, self._problem, self._config = weights, problem, config
        self._w2 = self._map(w2.flatten(0, 1), config.block_n)
        constants = {
            "LEN": problem.intermediate_size, "N": problem.hidden_size, "BM": config.block_m, "BN": config.block_n,
            "BK": config.block_k, "STAGES": config.stages, "GROUP": config.group,
        }  # fmt: skip
        self._launch = KernelLaunch(specialized_down_kernel, constants, warps=config.warps)

    def _map(self, tensor: torch.Tensor, rows: int) -> Any:
        from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        block = [rows, self._config.block_k]
        layout = NVMMASharedLayout.get_default_for(block, bfloat16 if tensor.dtype == torch.bfloat16 else float16)
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)

    def __call__(
        self, act: torch.Tensor, out: torch.Tensor, workspace: dict[str, torch.Tensor], max_tiles: int, key: Any
    ) -> None:
        blocks = -(-self._problem.hidden_size // self._config.block_n)
        grid = (min(self._problem.num_sms, max_tiles * blocks), 1, 1)
        act_map = self._map(act, self._config.block_m)
        self._launch(
            grid, key, act_map, self._w2, self._weights.bias2, out, workspace["row_end"], workspace["tile_expert"],
            workspace["tile_row"], max_tiles,
        )  # fmt: skip


class GroupedRunner:
    """Four launches: align, both GEMMs, reduce."""

    def __init__(self, weights: LayerWeights, problem: ExpertsProblem, config: GroupedConfig, weight_on_input: bool):
        from moe_core.ops._kernels.align import align_kernel

        self._problem = problem
        self._block_m = config.up.block_m
        self._align_grid = (-(-problem.num_experts // 2), 1, 1)
        constants = {
            "K": problem.top_k, "E": problem.num_experts, "BM": config.up.block_m,
            "VEC": ALIGN_VECTOR, "PDL": config.pdl,
        }  # fmt: skip
        self._align = {
            (by_4, many): KernelLaunch(
                align_kernel, {**constants, "LANES": warps, "BY_4": by_4}, warps=warps, pdl=config.pdl
            )
            for by_4 in (False, True)
            for many, warps in ((False, 16), (True, 32))
        }
        self._gemms = GroupedGemms(weights, problem, config, weight_on_input=weight_on_input, batched=False)
        self._reduce = ReduceLaunch(problem, weight_on_input, config.pdl)

    def __call__(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        router_weights: torch.Tensor,
        workspace: dict[str, torch.Tensor],
        out: torch.Tensor,
        num_rows: torch.Tensor | None,
    ) -> None:
        num_slots = ids.numel()
        key = None
        pointers = x.data_ptr() | ids.data_ptr() | router_weights.data_ptr() | out.data_ptr()
        for buffer in workspace.values():
            pointers |= buffer.data_ptr()
        if pointers % 16 == 0 and (num_rows is None or num_rows.data_ptr() % 16 == 0):
            key = (x.stride(0), ids.dtype, num_rows is None)
        by_4 = num_slots % 4 == 0 and (num_rows is None or self._problem.top_k % 4 == 0)
        self._align[by_4, num_slots >= ALIGN_MANY](
            self._align_grid, key, ids, num_rows, workspace["slot_of_row"], workspace["row_of_slot"],
            workspace["row_end"], workspace["tile_expert"], workspace["tile_row"], num_slots,
        )  # fmt: skip
        tiles = align_tiles(num_slots, self._problem.num_experts, self._block_m)
        self._gemms(x, workspace["y"], router_weights, workspace, None, tiles, key)
        self._reduce(workspace["y"], ids, router_weights, workspace["row_of_slot"], num_rows, out)
