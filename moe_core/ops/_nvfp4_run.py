"""Runs the NVFP4 paths with everything but a step's own tensors bound (see `_kernels/nvfp4.py`).

T tokens · H hidden · I intermediate · E_l local experts · K top-k · C row capacity.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from moe_core.ops._align import AlignLaunch
from moe_core.ops._grouped import _row_pieces, gluon_map
from moe_core.ops._launch import MAX_ALTERNATING, AlternatingConfig, ExpertsProblem, align_tiles
from moe_core.ops._nvfp4_launch import (
    COLUMNS_PER_BLOCK,
    MAX_LIST_SLOTS,
    SHORTEST,
    GemmTile,
    Nvfp4BatchedConfig,
    Nvfp4Config,
    Nvfp4GemmConfig,
    Nvfp4RowsConfig,
    Nvfp4SlotsConfig,
    WarpsConfig,
    alternating_fits,
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
            DEPTH=min(config.up.depth, _steps(hidden, 1, config.up)), TOGETHER=config.up.together, pdl=config.pdl,
        )  # fmt: skip
        self._down = _launch(
            nvfp4_slots_down_kernel, config.down, sizes,
            DEPTH=min(config.down.depth, _steps(inner, top_k, config.down)), TOGETHER=config.down.together,
            pdl=config.pdl,
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
    """Both products over each expert's rows; `few` > 0: over those of experts that have no more."""

    def __init__(
        self,
        config: Nvfp4RowsConfig,
        weights: Nvfp4Weights,
        problem: ExpertsProblem,
        *,
        weight_on_input: bool,
        batched: bool,
        few: int = 0,
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
                  "FEW": few, "PDL": config.pdl, **weights.activation.constants()}  # fmt: skip
        self._up = _launch(
            nvfp4_rows_kernel, config.up, {**common, "LEN": hidden, "R": up_rows, "N": inner, "UP": True},
            RT=config.up.tiles, FENCED=config.up.fenced, pdl=config.pdl,
        )  # fmt: skip
        self._down = _launch(
            nvfp4_rows_kernel, config.down, {**common, "LEN": inner, "R": hidden, "N": hidden, "UP": False},
            RT=config.down.tiles, FENCED=config.down.fenced, pdl=config.pdl,
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
        shifts: tuple[int, int] = (0, 0),
    ) -> None:
        """`shifts`: those of x and out, as in `GroupedGemms`."""
        weights = self._weights
        self._up(
            self._grids[0], key, x, slot_of_row, row_end, router_weights, weights.w13, self._bytes[0],
            weights.w13_global, weights.bias13, act, capacity, x.stride(0), self._inner, shifts[0], 0,
        )  # fmt: skip
        self._down(
            self._grids[1], key, act, slot_of_row, row_end, router_weights, weights.w2, self._bytes[1],
            weights.w2_global, weights.bias2, out, capacity, self._inner, out.stride(0), 0, shifts[1],
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
        from moe_core.ops._kernels.nvfp4_prepare import nvfp4_permute_kernel

        self._weights, self._problem, self._config = weights, problem, config
        self._permute = KernelLaunch(nvfp4_permute_kernel, {"H": problem.hidden_size, "BT": 8, "BH": 512}, warps=4)
        self._align = AlignLaunch(problem, config.up.block_n, pdl=False)
        self._up = _UpGemm(config.up, weights, problem, weight_on_input=weight_on_input, gather=True)
        self._down: _DownGemm | _AlternatingDown
        if isinstance(config.down, AlternatingConfig):
            self._down = _AlternatingDown(config.down, weights, problem)
        else:
            self._down = _DownGemm(config.down, weights, problem, config.up.block_n // config.down.block_n)
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
        hidden, tokens, y, act = self._problem.hidden_size, x.shape[0], workspace["y"], workspace["act"]
        key = _key(num_rows, x, out, ids, router_weights, *workspace.values())
        self._permute((-(-tokens // 8), -(-hidden // 512), 1), key, x, y, tokens, x.stride(0))
        self._align(ids, num_rows, workspace, key)
        tiles = align_tiles(ids.numel(), self._problem.num_experts, self._config.up.block_n)
        lists = (workspace["slot_of_row"], workspace["row_end"], workspace["tile_expert"], workspace["tile_row"], None)
        after = self._weights.w2_global if isinstance(self._down, _AlternatingDown) else None
        self._up(y, hidden, lists, router_weights, after, act, tiles, key)
        self._down(act, lists, y, hidden, tiles, key)
        self._reduce(y, ids, router_weights, workspace["row_of_slot"], num_rows, out)


Lists = tuple["torch.Tensor | None", torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"]
"""slot_of_row, row_end, tile_expert, tile_row and, if tiles are counted on the device, num_tiles."""


class _UpGemm:
    def __init__(
        self, tile: GemmTile, weights: Nvfp4Weights, problem: ExpertsProblem, *, weight_on_input: bool, gather: bool,
        pdl: bool = False,
    ):  # fmt: skip
        self._weights, self._inner, self._rows = weights, problem.intermediate_size, weights.w13.shape[1]
        self._scale = weights.w13_scale.view(torch.uint8)
        self._launch = _gemm(
            tile, problem, {**weights.activation.constants(), "WEIGHT_ON_INPUT": weight_on_input},
            pdl=pdl, LEN=problem.hidden_size, R=self._rows, N=self._inner, UP=True, GATHER=gather, SPLIT=1,
        )  # fmt: skip

    def __call__(
        self, x: torch.Tensor, stride_x: int, lists: Lists, router_weights: torch.Tensor | None,
        after: torch.Tensor | None, act: torch.Tensor, tiles: int, key: Hashable, programs: int = 0, shift_x: int = 0,
    ) -> None:  # fmt: skip
        """`after`: w2's global scales, if act is to carry them. `programs`: at most so many walk the tiles."""
        weights, grid = self._weights, tiles * -(-self._rows // 128)
        self._launch(
            (min(grid, programs or grid), 1, 1), key, x, *lists, router_weights, weights.w13, self._scale,
            weights.w13_global, after, weights.bias13, act, tiles, stride_x, self._inner, shift_x, 0,
        )  # fmt: skip


class _DownGemm:
    """`split` of its tiles make one of the list's."""

    def __init__(
        self, tile: GemmTile, weights: Nvfp4Weights, problem: ExpertsProblem, split: int, *, pdl: bool = False
    ):
        self._weights, self._inner, self._hidden = weights, problem.intermediate_size, problem.hidden_size
        self._scale, self._split = weights.w2_scale.view(torch.uint8), split
        self._launch = _gemm(
            tile, problem, {**weights.activation.constants(), "WEIGHT_ON_INPUT": False}, pdl=pdl, LEN=self._inner,
            R=self._hidden, N=self._hidden, UP=False, GATHER=False, SPLIT=split,
        )  # fmt: skip

    def __call__(
        self, act: torch.Tensor, lists: Lists, out: torch.Tensor, stride_out: int, tiles: int, key: Hashable,
        programs: int = 0, shift_out: int = 0,
    ) -> None:  # fmt: skip
        weights, grid = self._weights, tiles * self._split * -(-self._hidden // 128)
        self._launch(
            (min(grid, programs or grid), 1, 1), key, act, *lists, None, weights.w2, self._scale, weights.w2_global,
            None, weights.bias2, out, tiles, self._inner, stride_out, 0, shift_out,
        )  # fmt: skip


def _gemm(
    tile: GemmTile, problem: ExpertsProblem, constants: dict[str, Any], *, pdl: bool, **sizes: Any
) -> KernelLaunch:
    from moe_core.ops._kernels.nvfp4_gemm import nvfp4_gemm_kernel

    if min(problem.hidden_size, problem.intermediate_size) < SHORTEST:
        raise ValueError(
            f"GemmTile needs H and I of at least {SHORTEST}, not {problem.hidden_size} and {problem.intermediate_size}"
        )
    own = {"K": problem.top_k, "BN": tile.block_n, "STAGES": tile.stages, "GROUP": tile.group, "PDL": pdl}
    constants = {**constants, **own, **sizes}
    return KernelLaunch(nvfp4_gemm_kernel, constants, warps=8, pdl=pdl, registers=tile.registers or None)


class _AlternatingDown:
    """One program a multiprocessor, for short I (see `_kernels/nvfp4_alternating.py`)."""

    def __init__(self, config: AlternatingConfig, weights: Nvfp4Weights, problem: ExpertsProblem):
        from moe_core.ops._kernels.nvfp4_alternating import nvfp4_alternating_kernel

        hidden, inner = problem.hidden_size, problem.intermediate_size
        if not alternating_fits(problem):
            raise ValueError(f"AlternatingConfig: I = {inner} is not a power of 2 up to {MAX_ALTERNATING}")
        self._weights, self._inner, self._scale = weights, inner, weights.w2_scale.view(torch.uint8)
        self._grid = (min(problem.num_sms, -(-hidden // config.block_n) * problem.num_experts), 1, 1)
        constants = {
            "H": hidden, "E": problem.num_experts, "I": inner, "BN": config.block_n, "W_STAGES": config.weight_stages,
            "A_STAGES": config.row_stages, "LAYOUT": _row_pieces(config.block_n),
        }  # fmt: skip
        self._launch = KernelLaunch(nvfp4_alternating_kernel, constants, warps=4)

    def __call__(
        self, act: torch.Tensor, lists: Lists, out: torch.Tensor, stride_out: int, tiles: int, key: Hashable,
    ) -> None:  # fmt: skip
        weights = self._weights
        self._launch(
            self._grid, key, gluon_map(act, [64, self._inner]), weights.w2, self._scale, weights.bias2, out, lists[1]
        )


class Batched:
    """Two launches, and four more if C is large; until out is written, it holds the permuted x of experts with many."""

    def __init__(self, config: Nvfp4BatchedConfig, weights: Nvfp4Weights, problem: ExpertsProblem):
        self._rows = RowsGemms(config.rows, weights, problem, weight_on_input=False, batched=True, few=config.few)
        self._gemms = None if config.tile is None else _BatchedGemms(config, config.tile, weights, problem)

    def __call__(
        self,
        x: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        workspace: Mapping[str, torch.Tensor],
        out: torch.Tensor,
        capacity: int,
        shifts: tuple[int, int],
    ) -> None:
        key = _key(None, x, out, tokens_per_expert, *workspace.values())
        if key is not None:
            key = (key, *shifts)
        self._rows(x, None, tokens_per_expert, None, workspace["act"], out, capacity, key, shifts)
        if self._gemms is not None:
            self._gemms(x, tokens_per_expert, workspace, out, capacity, key, shifts)


class _BatchedGemms:
    """Four launches: list tiles, permute, both products. Programs walk the tiles, so idle capacity costs nothing.

    Each waits for the one before on the device: where no expert has many rows, that is all that they do.
    """

    def __init__(self, config: Nvfp4BatchedConfig, tile: GemmTile, weights: Nvfp4Weights, problem: ExpertsProblem):
        from moe_core.ops._kernels.align import batched_tiles_kernel
        from moe_core.ops._kernels.nvfp4_prepare import nvfp4_permute_batched_kernel

        experts, hidden, pdl = problem.num_experts, problem.hidden_size, config.rows.pdl
        self._problem, self._tile, self._programs = problem, tile, 2 * problem.num_sms
        self._list = KernelLaunch(
            batched_tiles_kernel,
            {"E": experts, "EP": 1 << (experts - 1).bit_length(), "BM": tile.block_n, "FEW": config.few, "PDL": pdl},
            warps=4, pdl=pdl,
        )  # fmt: skip
        self._permute = KernelLaunch(
            nvfp4_permute_batched_kernel, {"H": hidden, "BM": tile.block_n, "BT": 8, "BH": 512, "PDL": pdl},
            warps=4, pdl=pdl,
        )  # fmt: skip
        self._up = _UpGemm(tile, weights, problem, weight_on_input=False, gather=False, pdl=pdl)
        self._down = _DownGemm(tile, weights, problem, 1, pdl=pdl)

    def __call__(
        self,
        x: torch.Tensor,
        counts: torch.Tensor,
        workspace: Mapping[str, torch.Tensor],
        out: torch.Tensor,
        capacity: int,
        key: Hashable,
        shifts: tuple[int, int],
    ) -> None:
        experts, act, stride_out = self._problem.num_experts, workspace["act"], out.stride(0)
        row_end, tile_expert, tile_row, num_tiles = (
            workspace[name] for name in ("row_end", "tile_expert", "tile_row", "num_tiles")
        )
        lists = (None, row_end, tile_expert, tile_row, num_tiles)
        self._list((1, 1, 1), key, counts, *lists[1:], capacity)
        self._permute((8 * self._programs, 1, 1), key, x, *lists[1:], out, x.stride(0), stride_out, *shifts)
        tiles = experts * -(-capacity // self._tile.block_n)
        self._up(out, stride_out, lists, None, None, act, tiles, key, self._programs, shifts[1])
        self._down(act, lists, out, stride_out, tiles, key, self._programs, shifts[1])


def _launch(kernel: Any, warps: WarpsConfig, constants: dict[str, Any], *, pdl: bool, **own: int) -> KernelLaunch:
    constants = {**constants, **own, "WR": warps.rows, "WK": warps.along_k}
    count = warps.rows * warps.along_k
    return KernelLaunch(kernel, constants, warps=count, pdl=pdl, registers=warps.registers or None)


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
