"""Runs the FP8 grouped path and its batched form: quantize, up GEMM, quantize, down GEMM.

T tokens · H hidden · I intermediate · E_l local experts · K top-k · C row capacity.
"""

from __future__ import annotations

import torch

from moe_core.ops._align import AlignLaunch
from moe_core.ops._fp8_gemm import GemmShape, Operand, Rows, gemm
from moe_core.ops._fp8_launch import Fp8GroupedConfig, Fp8SpecializedConfig
from moe_core.ops._fp8_quantize import ExpertScales, QuantizeByExpert, QuantizeRows
from moe_core.ops._fp8_scan import quantized_twice, step_key
from moe_core.ops._fp8_weights import FP8_GROUP, Fp8Weights
from moe_core.ops._launch import ExpertsProblem, TileConfig, align_tiles
from moe_core.ops._reduce import ReduceFewLaunch, ReduceLaunch
from moe_core.ops._runtime import KernelLaunch


class Fp8Gemms:
    """Both GEMMs over row tiles of single experts, with the quantizers before them."""

    def __init__(
        self,
        weights: Fp8Weights,
        problem: ExpertsProblem,
        config: Fp8GroupedConfig,
        dtype: torch.dtype,
        *,
        batched: bool,
    ):
        self._weights, self._problem, self._batched = weights, problem, batched
        spec, up = weights.format, config.up
        whole_groups = isinstance(up, Fp8SpecializedConfig) or up.block_n == FP8_GROUP
        # The up GEMM quantizes what it writes where one of its tiles holds all that share a scale.
        self._fused = spec.activations == "static" or (spec.activations == "group" and whole_groups)
        out = None if not self._fused else "expert" if spec.activations == "static" else "group"
        self._prepare_quantizers(config.pdl)
        self._up = gemm(weights, problem, up, GemmShape(
            up=True, gather=not batched and not spec.by_expert, own_rows=spec.by_expert, out=out, split=1,
            pdl=config.pdl, early=config.early,
        ), dtype)  # fmt: skip
        # With loading warps it looks for its tiles before it waits; a plain kernel lets it come before they are known.
        early = config.early and (isinstance(config.down, TileConfig) or not isinstance(up, TileConfig))
        self._down = gemm(weights, problem, config.down, GemmShape(
            up=False, gather=False, own_rows=True, out=None, split=up.block_m // config.down_m,
            pdl=config.pdl, early=early,
        ), dtype)  # fmt: skip

    def _prepare_quantizers(self, pdl: bool) -> None:
        weights, problem, batched = self._weights, self._problem, self._batched
        spec, experts = weights.format, problem.num_experts
        hidden, inner, top_k = problem.hidden_size, problem.intermediate_size, 0 if batched else problem.top_k
        self._rows_13 = self._rows_2 = self._expert_13 = self._expert_2 = self._scales_13 = self._scales_2 = None
        if spec.activations in ("group", "row"):
            options = {"by_group": spec.activations == "group", "power_of_two": spec.power_of_two}
            self._rows_13 = QuantizeRows(hidden, **options, pdl=pdl, beside=pdl and not batched)
            self._rows_2 = QuantizeRows(inner, **options, pdl=pdl)
        elif spec.activations == "static":
            stride = weights.halves("input13")[0].stride(0)
            self._expert_13 = QuantizeByExpert(hidden, experts, top_k, stride, pdl=pdl)
        elif spec.activations == "tensor":
            self._expert_13 = QuantizeByExpert(hidden, experts, top_k, 1, pdl=pdl)
            self._expert_2 = QuantizeByExpert(inner, experts, 0, 1, pdl=pdl)
            self._scales_13 = ExpertScales(hidden, experts, top_k, batched=batched, pdl=pdl)
            self._scales_2 = ExpertScales(inner, experts, 0, batched=batched, pdl=pdl)

    def __call__(
        self,
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        out: torch.Tensor,
        workspace: dict[str, torch.Tensor],
        where: Rows,
    ) -> None:
        """x rows → out rows; in the batched format x and out are `[E_l * C, H]` views."""
        a = self._first_input(x, x_scale, workspace, where)
        if self._fused:
            act = Operand(
                workspace["act_q"], workspace.get("act_scale"), by_expert=(self._weights.input2, self._weights.input2)
            )
            self._up(a, act.rows, act.scale, workspace, where)
        else:
            self._up(a, workspace["act"], None, workspace, where)
            act = self._second_input(workspace["act"], workspace, where)
        self._down(act, out, None, workspace, where)

    def _first_input(
        self, x: torch.Tensor, x_scale: torch.Tensor | None, workspace: dict[str, torch.Tensor], where: Rows
    ) -> Operand:
        """x as the up GEMM reads it."""
        row_end = workspace["row_end"]
        if self._rows_13 is not None and x_scale is None:
            rows, scale = workspace["x_q"][: x.shape[0]], workspace["x_scale"]
            self._rows_13(x, rows, scale, where.key, row_end if self._batched else None, where.capacity)
            return Operand(rows, scale)
        if self._expert_13 is None:
            if x_scale is not None and (x.data_ptr() % 16 or x.stride(0) % 4):
                # Gathered rows are copied in pieces of 4 bytes or more, from borders of such pieces; of a pointer the
                # compiler knows multiples of 16 or nothing.
                x = workspace["x_q"][: x.shape[0]].copy_(x)
            return Operand(x, x_scale)
        count = x.shape[0] * (1 if self._batched else self._problem.top_k)
        rows, again = quantized_twice(workspace["x_q" if self._batched else "y"], count, self._problem.hidden_size)
        slot_of_row = workspace.get("slot_of_row")
        gate, up = self._weights.halves("input13")
        rows_up = again if self._weights.activation.gated else None
        if self._scales_13 is not None:
            gate = up = workspace["expert_scale"][0]
            rows_up = None
            self._scales_13(x, slot_of_row, row_end, workspace["partial"], gate, where.capacity, where.key)
        self._expert_13(
            x, where.ids, slot_of_row, row_end, rows, rows_up, gate, up, where.num_rows, where.capacity, where.key
        )
        return Operand(rows, None, rows_up, (gate, up))

    def _second_input(self, act: torch.Tensor, workspace: dict[str, torch.Tensor], where: Rows) -> Operand:
        """act as the down GEMM reads it."""
        row_end = workspace["row_end"]
        if self._rows_2 is not None:
            q, scale = workspace["act_q"], workspace["act_scale"]
            # other paths may need more rows of the same buffer
            if where.ids is not None and act.shape[0] != where.ids.numel():
                act = act[: where.ids.numel()]
            self._rows_2(act, q, scale, where.key, row_end if self._batched else None, where.capacity)
            return Operand(q, scale)
        if self._expert_2 is None or self._scales_2 is None:
            return Operand(act)
        q, slot_of_row = workspace["act_q"], workspace.get("slot_of_row")
        scale = workspace["expert_scale"][1]
        self._scales_2(act, None, row_end, workspace["partial"], scale, where.capacity, where.key)
        self._expert_2(
            act, where.ids, slot_of_row, row_end, q, None, scale, None, where.num_rows, where.capacity, where.key
        )
        return Operand(q, by_expert=(scale, scale))


class Fp8GroupedRunner:
    """Align, the GEMMs with their quantizers, reduce."""

    def __init__(self, weights: Fp8Weights, problem: ExpertsProblem, config: Fp8GroupedConfig, dtype: torch.dtype):
        self._problem, self._block_m = problem, config.up.block_m
        self._align = AlignLaunch(problem, config.up.block_m, config.pdl)
        self._gemms = Fp8Gemms(weights, problem, config, dtype, batched=False)
        self._reduce = ReduceLaunch(problem, False, config.pdl)
        self._reduce_few = ReduceFewLaunch(problem, config.pdl)

    def __call__(
        self,
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        ids: torch.Tensor,
        router_weights: torch.Tensor,
        workspace: dict[str, torch.Tensor],
        out: torch.Tensor,
        num_rows: torch.Tensor | None,
    ) -> None:
        num_slots, problem = ids.numel(), self._problem
        key = step_key(
            (x, x_scale, ids, router_weights, out, num_rows), workspace.values(), x, x_scale, ids, out, num_rows
        )
        self._align(ids, num_rows, workspace, key)
        tiles = align_tiles(num_slots, problem.num_experts, self._block_m)
        self._gemms(x, x_scale, workspace["y"], workspace, Rows(ids, num_rows, 0, tiles, None, key))
        y, row_of_slot = workspace["y"], workspace["row_of_slot"]
        if num_rows is None:
            self._reduce(y, ids, router_weights, row_of_slot, None, out)
        else:
            self._reduce_few(y, ids, router_weights, row_of_slot, num_rows, out, key)


class Fp8BatchedRunner:
    """A list of tiles from the counts, then the GEMMs with their quantizers."""

    def __init__(self, weights: Fp8Weights, problem: ExpertsProblem, config: Fp8GroupedConfig, dtype: torch.dtype):
        from moe_core.ops._kernels.align import batched_tiles_kernel

        if not (isinstance(config.up, TileConfig) and isinstance(config.down, TileConfig)):
            raise ValueError(
                f"{config}: kernels with loading warps take sorted rows; the batched format needs TileConfigs"
            )
        self._experts, self._block_m = problem.num_experts, config.up.block_m
        constants = {
            "E": problem.num_experts, "EP": 1 << (problem.num_experts - 1).bit_length(), "BM": config.up.block_m,
            "FEW": 0, "PDL": config.pdl,
        }  # fmt: skip
        self._tiles = KernelLaunch(batched_tiles_kernel, constants, warps=4, pdl=config.pdl)
        self._gemms = Fp8Gemms(weights, problem, config, dtype, batched=True)

    def __call__(
        self,
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        tokens_per_expert: torch.Tensor,
        workspace: dict[str, torch.Tensor],
        out: torch.Tensor,
        capacity: int,
    ) -> None:
        """x, x_scale and out: views with a row for every e * C + i."""
        key = step_key((x, x_scale, tokens_per_expert, out), workspace.values(), x, x_scale, None, out, None)
        self._tiles(
            (1, 1, 1), key, tokens_per_expert, workspace["row_end"], workspace["tile_expert"], workspace["tile_row"],
            workspace["num_tiles"], capacity,
        )  # fmt: skip
        tiles = self._experts * -(-capacity // self._block_m)
        self._gemms(x, x_scale, out, workspace, Rows(None, None, capacity, tiles, workspace["num_tiles"], key))
