"""Launches one FP8 GEMM over sorted rows: the plain kernel, the specialized and the alternating one, behind one call.

H hidden · I intermediate · E_l local experts · K top-k · C row capacity.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from moe_core.ops._fp8_launch import Fp8SpecializedConfig
from moe_core.ops._fp8_weights import FP8_GROUP, Fp8Weights, triton_dtype
from moe_core.ops._grouped import _row_pieces, tensor_map
from moe_core.ops._launch import MAX_ALTERNATING, AlternatingConfig, ExpertsProblem, TileConfig
from moe_core.ops._runtime import KernelLaunch

_NO_ACTIVATION = {"ACT": None, "GATED": False, "ALPHA": 0.0, "LIMIT": 0.0}


@dataclass
class Rows:
    """Where a step's rows are. STANDARD: slots grouped by expert; BATCHED: number e * C + i, `ids` None."""

    ids: torch.Tensor | None
    num_rows: torch.Tensor | None
    capacity: int
    max_tiles: int
    num_tiles: torch.Tensor | None
    key: Hashable


@dataclass
class Operand:
    """Rows as a GEMM reads them: `again` where the up half has another scale, `by_expert` (gate's, up's)."""

    rows: torch.Tensor
    scale: torch.Tensor | None = None
    again: torch.Tensor | None = None
    by_expert: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)


@dataclass(frozen=True)
class GemmShape:
    """Which of the two GEMMs, on which rows.

    Attributes:
        up: the first one, with the activation; else the second.
        gather: rows are tokens, to be found by slot.
        own_rows: rows are a workspace, known to suit a tensor map.
        out: how the result is quantized: None, "group" or "expert".
        split: tiles of this GEMM that make one of the list's.
        pdl, early: as in `Fp8GroupedConfig`.
    """

    up: bool
    gather: bool
    own_rows: bool
    out: str | None
    split: int
    pdl: bool
    early: bool

    @property
    def comes_early(self) -> bool:
        """Of kernels whose programs fill their multiprocessors: programmatic launch or none."""
        return self.pdl and self.early


class TiledGemm:
    """One program per tile and block of columns, or programs that walk them (see `_kernels/fp8_grouped.py`)."""

    def __init__(
        self, weights: Fp8Weights, problem: ExpertsProblem, tile: TileConfig, shape: GemmShape, dtype: torch.dtype
    ):
        from moe_core.ops._kernels.fp8_grouped import fp8_gemm_kernel

        self._tile, self._shape, self._num_sms = tile, shape, problem.num_sms
        spec, hidden, inner = weights.format, problem.hidden_size, problem.intermediate_size
        length, self._columns = (hidden, inner) if shape.up else (inner, hidden)
        if tile.block_k != FP8_GROUP or tile.block_n > FP8_GROUP:
            raise ValueError(f"{tile}: FP8 tiles have block_k = {FP8_GROUP} and block_n of at most that")
        if shape.up:
            self._matrices, self._scales = weights.halves("w13"), weights.halves("scale13")
            self._bias, self._next = weights.halves("bias13"), weights.input2
            own = {**weights.up_constants(), **weights.activation_constants(), "IE2": 1}
            if spec.activations == "tensor":
                own["IE"] = 1
        else:
            self._matrices, self._scales = (weights.w2, weights.w2), (weights.scale2, weights.scale2)
            self._bias, self._next = (weights.bias2, None), None
            own = {**weights.down_constants(), **_NO_ACTIVATION, "BIE": hidden, "BIN": 1, "IE": 1, "IE2": 0}
        if tile.tma:
            box = [1, tile.block_n, tile.block_k]
            self._matrices = tuple(tensor_map(matrix, box) for matrix in self._matrices)
        self._map_rows = tile.tma and shape.own_rows
        constants = {
            "LEN": length, "N": self._columns, "K": problem.top_k, "WEIGHT": spec.weights,
            "A_SCALE": "expert" if spec.by_expert else spec.activations, "POWER_OF_TWO": spec.power_of_two,
            "DTYPE": triton_dtype(dtype), "MAPS": tile.tma, "TMA_A": self._map_rows, "GATHER": shape.gather,
            "OUT": shape.out, "SPLIT": shape.split, "BM": tile.block_m, "BM_SMALL": tile.small_m or tile.block_m,
            "BN": tile.block_n, "BK": tile.block_k, "STAGES": tile.stages, "GROUP": tile.group,
            "PERSISTENT": tile.persistent > 0, "PDL": shape.pdl, "EARLY": shape.early, **own,
        }  # fmt: skip
        self._launch = KernelLaunch(fp8_gemm_kernel, constants, warps=tile.warps, stages=tile.stages, pdl=shape.pdl)

    def _maps(self, rows: torch.Tensor | None) -> tuple[Any, Any]:
        """Tensor maps of rows, of both tile heights, or (None, None)."""
        tile = self._tile
        if rows is None or not self._map_rows:
            return None, None
        large = tensor_map(rows, [tile.block_m, tile.block_k])
        small = tile.small_m and tile.small_m < tile.block_m
        return large, tensor_map(rows, [tile.small_m, tile.block_k]) if small else large

    def __call__(
        self, a: Operand, c: torch.Tensor, c_scale: torch.Tensor | None, workspace: Mapping[str, torch.Tensor],
        where: Rows,
    ) -> None:  # fmt: skip
        tile = self._tile
        programs = where.max_tiles * self._shape.split * -(-self._columns // tile.block_n)
        if tile.persistent:
            programs = min(programs, tile.persistent * self._num_sms)
        self._launch(
            (programs, 1, 1), where.key,
            a.rows, *self._maps(a.rows), a.again, *self._maps(a.again), a.scale, *self._matrices, *self._scales,
            *a.by_expert, *self._bias, c, c_scale, self._next, workspace.get("slot_of_row"), workspace["row_end"],
            workspace["tile_expert"], workspace["tile_row"], where.num_tiles, where.max_tiles, a.rows.stride(0),
            0 if a.scale is None else a.scale.stride(0), c.stride(0),
        )  # fmt: skip


def e4m3_map(tensor: torch.Tensor, rows: int) -> Any:
    """A host tensor map of `[N, K]` for a Gluon kernel, whose boxes are `rows` rows of 128 columns."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(
        tensor, list(tensor.shape), list(tensor.stride()), [rows, FP8_GROUP], _layout_of_boxes(rows)
    )


@cache
def _layout_of_boxes(rows: int) -> Any:
    """In shared memory; asked for in every step, and slow to find."""
    from triton.experimental.gluon.language import NVMMASharedLayout, float8e4nv

    return NVMMASharedLayout.get_default_for([rows, FP8_GROUP], float8e4nv)


class SpecializedGemm:
    """Loading warps and two groups that multiply (see `_kernels/fp8_specialized.py`)."""

    def __init__(
        self, weights: Fp8Weights, problem: ExpertsProblem, config: Fp8SpecializedConfig, shape: GemmShape,
        dtype: torch.dtype,
    ):  # fmt: skip
        from moe_core.ops._kernels.fp8_halves import fp8_specialized_halves_kernel
        from moe_core.ops._kernels.fp8_specialized import fp8_specialized_kernel

        self._config, self._shape, self._num_sms = config, shape, problem.num_sms
        spec, hidden, inner = weights.format, problem.hidden_size, problem.intermediate_size
        if not weights.plain or spec.activations is None or (shape.up and spec.activations == "static"):
            raise ValueError(
                f"{config} is for silu(gate) · up of two halves without clamp and biases, and for e4m3 activations (in "
                f"the up GEMM not with static scales); {weights.activation}, {spec} need a TileConfig"
            )
        if config.halves and spec.activations != "group":
            raise ValueError(
                f"{config}: halves are for weights and activations in blocks of 128 columns, not for {spec}"
            )
        if shape.up:
            length, self._columns, self._width = hidden, inner, FP8_GROUP
            matrix, self._scales = weights.w13, weights.halves("scale13")
            gate = inner if weights.activation.gate_up_layout == "up_gate" else 0
            firsts, strides = (gate, inner - gate), weights.up_constants()
        else:
            length, self._columns, self._width = inner, hidden, 2 * FP8_GROUP
            matrix, self._scales = weights.w2, (weights.scale2, weights.scale2)
            firsts, strides = (0, FP8_GROUP), weights.down_constants()
        self._matrix = e4m3_map(matrix.flatten(0, 1), FP8_GROUP)
        constants = {
            "LEN": length, "N": self._columns, "K": problem.top_k, "W_ROWS": matrix.shape[1], "FIRST_1": firsts[0],
            "FIRST_2": firsts[1], "SE": strides["SE"], "SN": strides["SN"], "PAIR": shape.up, "WEIGHT": spec.weights,
            "A_SCALE": "expert" if spec.by_expert else spec.activations, "OUT": shape.out,
            "POWER_OF_TWO": spec.power_of_two, "DTYPE": triton_dtype(dtype), "GATHER": shape.gather,
            "BM": config.block_m, "STAGES": config.stages, "GROUP": config.group, "E": problem.num_experts,
            "EARLY": shape.comes_early,
        }  # fmt: skip
        kernel = fp8_specialized_halves_kernel if config.halves else fp8_specialized_kernel
        self._launch = KernelLaunch(kernel, constants, warps=4, pdl=shape.comes_early)

    def __call__(
        self, a: Operand, c: torch.Tensor, c_scale: torch.Tensor | None, workspace: Mapping[str, torch.Tensor],
        where: Rows,
    ) -> None:  # fmt: skip
        assert a.again is None, "a static scale of each half is for the plain kernel"
        scale = a.by_expert[0] if a.scale is None else a.scale
        assert scale is not None, "unquantized rows are for the plain kernel"
        programs = min(self._num_sms, where.max_tiles * -(-self._columns // self._width))
        rows = a.rows if self._shape.gather else e4m3_map(a.rows, self._config.block_m)
        self._launch(
            (programs, 1, 1), where.key,
            rows, self._matrix, self._matrix, c, c_scale, scale, *self._scales,
            workspace["slot_of_row"], workspace["row_end"], a.rows.stride(0), scale.stride(0), c.stride(0),
        )  # fmt: skip


class AlternatingGemm:
    """The down GEMM with resident weights and two warpgroups in turns (see `_kernels/fp8_alternating.py`)."""

    def __init__(self, weights: Fp8Weights, problem: ExpertsProblem, config: AlternatingConfig, early: bool):
        from moe_core.ops._kernels.fp8_alternating import fp8_alternating_down_kernel

        blocks, inner, hidden = config.block_n // FP8_GROUP, problem.intermediate_size, problem.hidden_size
        spec = weights.format
        if inner > MAX_ALTERNATING or spec.activations != "group" or weights.bias2 is not None:
            raise ValueError(
                f"{config} is for I up to {MAX_ALTERNATING}, activations in groups and no bias; I = {inner}, {spec}, "
                f"{'a' if weights.bias2 is not None else 'no'} bias need a TileConfig"
            )
        if config.block_n % FP8_GROUP:
            raise ValueError(f"{config}: block_n must be a multiple of {FP8_GROUP}, the rows of w2 that share a scale")
        self._w2, self._scale2 = e4m3_map(weights.w2.flatten(0, 1), FP8_GROUP), weights.scale2
        self._grid = (min(problem.num_sms, problem.num_experts * -(-hidden // config.block_n)), 1, 1)
        strides = weights.down_constants()
        constants = {
            "H": hidden, "E": problem.num_experts, "KB": -(-inner // FP8_GROUP), "NB": blocks, "SE": strides["SE"],
            "SN": strides["SN"], "W_STAGES": config.weight_stages, "A_STAGES": config.row_stages,
            "LAYOUT": _row_pieces(FP8_GROUP), "EARLY": early,
        }  # fmt: skip
        self._launch = KernelLaunch(fp8_alternating_down_kernel, constants, warps=4, pdl=early)

    def __call__(
        self, a: Operand, c: torch.Tensor, c_scale: torch.Tensor | None, workspace: Mapping[str, torch.Tensor],
        where: Rows,
    ) -> None:  # fmt: skip
        self._launch(
            self._grid, where.key, e4m3_map(a.rows, 64), self._w2, a.scale, self._scale2, c, workspace["row_end"]
        )


def gemm(
    weights: Fp8Weights, problem: ExpertsProblem, config: TileConfig | Fp8SpecializedConfig | AlternatingConfig,
    shape: GemmShape, dtype: torch.dtype,
) -> TiledGemm | SpecializedGemm | AlternatingGemm:  # fmt: skip
    """The GEMM that a configuration asks for."""
    if isinstance(config, AlternatingConfig):
        return AlternatingGemm(weights, problem, config, shape.comes_early)
    if isinstance(config, TileConfig):
        return TiledGemm(weights, problem, config, shape, dtype)
    return SpecializedGemm(weights, problem, config, shape, dtype)
