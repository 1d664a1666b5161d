"""Runs the grouped path: align, up GEMM, down GEMM, reduce (see `_kernels/align.py`, `_kernels/grouped.py`).

T tokens · H hidden · I intermediate · E_l local experts · K top-k · C row capacity.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_core.ops._align import AlignLaunch
from moe_core.ops._launch import (
    MAX_ALTERNATING,
    AlternatingConfig,
    ExpertsProblem,
    GroupedConfig,
    TileConfig,
    align_tiles,
)
from moe_core.ops._reduce import ReduceLaunch
from moe_core.ops._runtime import KernelLaunch
from moe_core.ops._weights import LayerWeights, stride_constants

_NO_ACTIVATION = {
    "ACT": None, "GATED": False, "INTERLEAVED": False, "UP_FIRST": False, "ALPHA": 0.0, "LIMIT": 0.0,
}  # fmt: skip


def tensor_map(tensor: torch.Tensor, block: list[int]) -> Any:
    """A host tensor map of `tensor` whose boxes have the shape `block`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def gluon_map(tensor: torch.Tensor, block: list[int]) -> Any:
    """The same for a Gluon kernel, which wants the layout in shared memory too."""
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout.get_default_for(block, bfloat16 if tensor.dtype == torch.bfloat16 else float16)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


def check_rows_of_16_bits(weights: LayerWeights, problem: ExpertsProblem, who: str) -> torch.Tensor:
    """w2, if all experts' rows may be one dim of a tensor map of 16-bit values."""
    w2 = weights.w2
    if problem.w2_unit != "k" or w2.stride(0) != w2.shape[1] * w2.stride(1) or w2.element_size() != 2:
        raise ValueError(
            f"{who} reads 16-bit weights [E_l, H, I] with all rows at one stride; w2 is {w2.dtype} with strides "
            f"{w2.stride()}; use a TileConfig for it"
        )
    return w2


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
        self._up = {
            mapped: self._launch(
                up, stride_constants(weights.w13), weights.activation_constants(), problem.hidden_size,
                problem.intermediate_size, problem.w13_unit, gather=not batched, weighted=weight_on_input,
                mapped=mapped,
            )
            for mapped in (False, True)
        }  # fmt: skip
        self._alternating: AlternatingDown | None = None
        if isinstance(down, AlternatingConfig):
            self._alternating = AlternatingDown(weights, problem, down)
            return
        self._w2 = down_map(weights, problem.w2_unit, down) if down.tma else weights.w2
        self._down = self._launch(
            down, stride_constants(weights.w2), _NO_ACTIVATION, problem.intermediate_size, problem.hidden_size,
            problem.w2_unit, gather=False, weighted=False,
            mapped=down.tma and problem.intermediate_size * problem.itemsize % 16 == 0,
        )  # fmt: skip

    def _launch(
        self, tile: TileConfig, strides: dict[str, int], activation: dict[str, Any], length: int, columns: int,
        unit: str, *, gather: bool, weighted: bool, mapped: bool,
    ) -> KernelLaunch:  # fmt: skip
        """`mapped`: rows of a come through a tensor map."""
        from moe_core.ops._kernels.grouped import grouped_gemm_kernel

        split = self.config.up.block_m // tile.block_m
        # Halves through pointers have two accumulators already: no room for a taller tile's.
        pair = activation["GATED"] and not activation["INTERLEAVED"] and not tile.tma
        constants = {
            "LEN": length, "N": columns, "K": self.problem.top_k, **strides, **activation, "GATHER": gather,
            "WEIGHTED": weighted, "PRECISION": "ieee",
            "TMA_A": mapped,
            "TMA_W": unit if tile.tma else "", "BM": tile.block_m, "BM_SMALL": tile.small_m or tile.block_m,
            "BN": tile.block_n, "BK": tile.block_k, "STAGES": tile.stages, "GROUP": tile.group,
            "TALL": tile.tall and split == 1 and not pair,
            "PERSISTENT": tile.persistent > 0, "SPLIT": split, "PDL": self.config.pdl,
        }  # fmt: skip
        return KernelLaunch(grouped_gemm_kernel, constants, warps=tile.warps, stages=tile.stages, pdl=self.config.pdl)

    def _grid(self, tile: TileConfig, tiles: int, columns: int) -> tuple[int, int, int]:
        programs = tiles * (self.config.up.block_m // tile.block_m) * -(-columns // tile.block_n)
        if tile.persistent:
            programs = min(programs, tile.persistent * self.problem.num_sms)
        return (programs, 1, 1)

    def _maps(self, tile: TileConfig, rows: torch.Tensor) -> tuple[Any, Any]:
        """Tensor maps of rows at one stride, of both tile heights, or (None, None)."""
        odd = rows.data_ptr() | rows.stride(0) * rows.element_size() | rows.shape[1] * rows.element_size()
        if not tile.tma or odd % 16:
            return None, None
        large = tensor_map(rows, [tile.block_m, tile.block_k])
        small = tile.small_m and tile.small_m < tile.block_m
        return large, tensor_map(rows, [tile.small_m, tile.block_k]) if small else large

    def __call__(
        self, x: torch.Tensor, out: torch.Tensor, router_weights: torch.Tensor | None,
        workspace: dict[str, torch.Tensor], num_tiles: torch.Tensor | None, max_tiles: int, key: Any,
        shifts: tuple[int, int] = (0, 0),
    ) -> None:  # fmt: skip
        """x rows -> act -> out rows; in the batched format row e * C + i of x and out is as many strides away from the
        first one, and e times the `shifts` (of x, of out)."""
        weights, problem, config = self.weights, self.problem, self.config
        act = workspace["act"]
        slot_of_row = workspace.get("slot_of_row")
        tiles = (workspace["row_end"], workspace["tile_expert"], workspace["tile_row"])
        x_map, x_map_small = (None, None) if slot_of_row is not None or shifts[0] else self._maps(config.up, x)
        self._up[x_map is not None](
            self._grid(config.up, max_tiles, problem.intermediate_size), key,
            x, x_map, x_map_small, self._w13, weights.bias13, act, slot_of_row, *tiles, router_weights, num_tiles,
            max_tiles, x.stride(0), problem.intermediate_size, shifts[0], 0,
        )  # fmt: skip
        if self._alternating is not None:
            self._alternating(act, out, workspace["row_end"], key)
            return
        assert isinstance(config.down, TileConfig)
        act_map, act_map_small = self._maps(config.down, act)
        self._down(
            self._grid(config.down, max_tiles, problem.hidden_size), key,
            act, act_map, act_map_small, self._w2, weights.bias2, out, slot_of_row, *tiles, None, num_tiles,
            max_tiles, problem.intermediate_size, out.stride(0), 0, shifts[1],
        )  # fmt: skip


class AlternatingDown:
    """The down GEMM with resident weights and two warpgroups in turns: one program per multiprocessor."""

    def __init__(self, weights: LayerWeights, problem: ExpertsProblem, config: AlternatingConfig):
        from moe_core.ops._kernels.alternating import alternating_down_kernel

        w2 = check_rows_of_16_bits(weights, problem, "AlternatingConfig")
        if problem.intermediate_size > MAX_ALTERNATING:
            raise ValueError(
                f"AlternatingConfig keeps whole rows of w2 in shared memory: I = {problem.intermediate_size} is over "
                f"{MAX_ALTERNATING}; use a TileConfig for it"
            )
        self._weights, self._block_n = weights, config.block_n
        self._padded = max(64, 1 << (problem.intermediate_size - 1).bit_length())
        self._w2 = gluon_map(w2.flatten(0, 1), [config.block_n, self._padded])
        blocks = -(-problem.hidden_size // config.block_n)
        self._grid = (min(problem.num_sms, blocks * problem.num_experts), 1, 1)
        constants = {
            "H": problem.hidden_size, "E": problem.num_experts, "IP": self._padded, "BN": config.block_n,
            "W_STAGES": config.weight_stages, "A_STAGES": config.row_stages, "LAYOUT": _row_pieces(config.block_n),
        }  # fmt: skip
        self._launch = KernelLaunch(alternating_down_kernel, constants, warps=4)

    def __call__(self, act: torch.Tensor, out: torch.Tensor, row_end: torch.Tensor, key: Any) -> None:
        act_map = gluon_map(act, [64, self._padded])
        self._launch(self._grid, key, act_map, self._w2, self._weights.bias2, out, row_end)


def _row_pieces(columns: int) -> Any:
    """A layout of [64, columns] with 8 neighbouring columns a thread: 16 bytes a store. Each row stays with the four
    threads that the accumulator's layout gives it to, so that values move inside warps only."""
    from triton.experimental.gluon.language import DistributedLinearLayout

    further = [[0, 32 << i] for i in range((columns // 32).bit_length() - 1)]
    return DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], *further, [8, 0]], lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, columns],
    )  # fmt: skip


class GroupedRunner:
    """Four launches: align, both GEMMs, reduce."""

    def __init__(self, weights: LayerWeights, problem: ExpertsProblem, config: GroupedConfig, weight_on_input: bool):
        self._num_experts, self._block_m = problem.num_experts, config.up.block_m
        self._keep_x = config.keep_x
        short = config.up.small_m if config.up.tall else 0
        self._align = AlignLaunch(problem, config.up.block_m, config.pdl, short, config.keep_x)
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
        key = None
        pointers = x.data_ptr() | ids.data_ptr() | router_weights.data_ptr() | out.data_ptr()
        for buffer in workspace.values():
            pointers |= buffer.data_ptr()
        if pointers % 16 == 0 and (num_rows is None or num_rows.data_ptr() % 16 == 0):
            key = (x.stride(0), ids.dtype, num_rows is None)
        self._align(ids, num_rows, workspace, key, x if self._keep_x else None)
        tiles = align_tiles(ids.numel(), self._num_experts, self._block_m)
        self._gemms(x, workspace["y"], router_weights, workspace, None, tiles, key)
        self._reduce(workspace["y"], ids, router_weights, workspace["row_of_slot"], num_rows, out)
