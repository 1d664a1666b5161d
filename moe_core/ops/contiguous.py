"""What stands around a library's grouped GEMMs: rows brought into blocks of one expert each, activation, weighted sum.

T tokens · H hidden · I intermediate · E_l local experts · C row capacity · K top-k · M rows with the empty ones that
fill each expert's last block up.

A step is gather → (the library's first GEMM, into "h") → activate → (its second GEMM, into "y") → reduce. With
`quantize`, rows reach both GEMMs as e4m3 with fp32 scales of 1×128 groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_core.ops._align import AlignLaunch
from moe_core.ops._fp8_quantize import QuantizeRows
from moe_core.ops._launch import ExpertsProblem, align_tiles
from moe_core.ops._reduce import ReduceLaunch
from moe_core.ops._runtime import KernelLaunch
from moe_core.ops.activation import Activation
from moe_core.ops.experts import WorkspaceShapes

BLOCK_ROWS = 128
"""Rows of a block: what the libraries' largest tiles ask for."""
GROUP = 128
"""Columns that share a scale."""
_VALUES, _COLUMNS, _WARPS = 8192, 1024, 4  # of one program: 64 values a thread, whole lines of memory

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-10


@dataclass(frozen=True)
class RowQuantization:
    """e4m3 rows in groups of 1×128. `power_of_two`: scales are rounded up to powers of two."""

    power_of_two: bool = False


def padded_rows(problem: ExpertsProblem, num_tokens: int) -> int:
    """M of a STANDARD step: room for every choice and a last block per expert."""
    return align_tiles(num_tokens * problem.top_k, problem.num_experts, BLOCK_ROWS) * BLOCK_ROWS


def padded_capacity(capacity: int) -> int:
    """C as the BATCHED buffers have it: whole blocks."""
    return -(-capacity // BLOCK_ROWS) * BLOCK_ROWS


def contiguous_workspace(
    problem: ExpertsProblem, dtype: torch.dtype, num_tokens: int, quantize: RowQuantization | None = None
) -> WorkspaceShapes:
    """Name -> (shape, dtype) of a STANDARD step of at most `num_tokens` tokens: host arithmetic only."""
    slots, rows = num_tokens * problem.top_k, padded_rows(problem, num_tokens)
    blocks = rows // BLOCK_ROWS
    return {
        **_row_buffers(problem, dtype, rows, quantize),
        "expert_of_row": ((rows,), torch.int32),
        "slot_of_row": ((slots,), torch.int32),
        "row_of_slot": ((slots,), torch.int32),
        "row_end": ((problem.num_experts,), torch.int32),
        "tile_expert": ((blocks,), torch.int32),
        "tile_row": ((blocks,), torch.int32),
        "ends": ((problem.num_experts,), torch.int32),
        **({} if quantize is None else _token_buffers(problem, num_tokens)),
    }


def padded_workspace(
    problem: ExpertsProblem, dtype: torch.dtype, capacity: int, quantize: RowQuantization | None = None
) -> WorkspaceShapes:
    """The same of a BATCHED step with C = `capacity`: rows of expert e from e * `padded_capacity(C)` on."""
    return _row_buffers(problem, dtype, problem.num_experts * padded_capacity(capacity), quantize)


def _row_buffers(
    problem: ExpertsProblem, dtype: torch.dtype, rows: int, quantize: RowQuantization | None
) -> WorkspaceShapes:
    hidden, inner = problem.hidden_size, problem.intermediate_size
    carried = dtype if quantize is None else torch.float8_e4m3fn
    shapes: WorkspaceShapes = {
        "x": ((rows, hidden), carried),
        "h": ((rows, inner * (2 if problem.gated else 1)), dtype),
        "act": ((rows, inner), carried),
        "y": ((rows, hidden), dtype),
    }
    if quantize is not None:
        shapes["x_scale"] = ((rows * (hidden // GROUP),), torch.float32)
        shapes["act_scale"] = ((rows * (inner // GROUP),), torch.float32)
    return shapes


def _token_buffers(problem: ExpertsProblem, num_tokens: int) -> WorkspaceShapes:
    """A token is quantized once, however many experts it goes to."""
    hidden = problem.hidden_size
    return {
        "tokens": ((num_tokens, hidden), torch.float8_e4m3fn),
        "tokens_scale": ((num_tokens, hidden // GROUP), torch.float32),
    }


class ContiguousRows:
    """STANDARD: prepared launches around a grouped GEMM whose rows stand in blocks of one expert.

    Args:
        problem: sizes; H and I are multiples of 128 where rows are quantized.
        activation: the function between the GEMMs and the order of gate and up.
        quantize: how rows become e4m3; None: they keep their dtype.
    """

    def __init__(self, problem: ExpertsProblem, activation: Activation, quantize: RowQuantization | None = None):
        from moe_core.ops._kernels.contiguous import tight_blocks_kernel

        self._align = AlignLaunch(problem, BLOCK_ROWS, pdl=False)
        experts = problem.num_experts
        self._blocks = KernelLaunch(
            tight_blocks_kernel, {"E": experts, "EP": 1 << (experts - 1).bit_length(), "BM": BLOCK_ROWS}, warps=4
        )
        self._tokens = None
        if quantize is not None:
            self._tokens = QuantizeRows(
                problem.hidden_size, by_group=True, power_of_two=quantize.power_of_two, pdl=False
            )
        self._rows = _Rows(problem, activation, quantize)
        self._reduce = ReduceLaunch(problem, weight_on_input=False, pdl=False)

    def gather(
        self,
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        ids: torch.Tensor,
        num_rows: torch.Tensor | None,
        workspace: Mapping[str, torch.Tensor],
    ) -> None:
        """Fills "x" (and "x_scale"), "expert_of_row" (-1 beside empty rows), "ends" and "row_of_slot".

        Expert e's rows end before "ends"[e], and begin at the first whole block from "ends"[e - 1] on.

        Args:
            x: `[T, H]`, unit stride in H; with `x_scale` `[T, H / 128]` it is e4m3 already.
            ids: `[T, K]` int32 or int64, contiguous; -1 for none.
            num_rows: int32 `[1]` on the device, or None: rows from there on are left out.
            workspace: tensors as `contiguous_workspace` names them.
        """
        key = _key(ids, *(() if num_rows is None else (num_rows,)))
        self._align(ids, num_rows, workspace, key and (*key, ids.dtype, num_rows is None))
        blocks = workspace["tile_expert"]
        self._blocks(
            (1, 1, 1), "aligned", workspace["row_end"], blocks, workspace["tile_row"], workspace["ends"],
            blocks.shape[0],
        )  # fmt: skip
        if self._tokens is not None and x_scale is None:
            tokens, x_scale = workspace["tokens"], workspace["tokens_scale"]
            self._tokens(x, tokens, x_scale, _key(x) and (x.stride(0), x.dtype))
            x = tokens
        self._rows.gather(x, x_scale, None, workspace, workspace["x"].shape[0], 0)

    def activate(self, workspace: Mapping[str, torch.Tensor]) -> None:
        """Fills "act" (and "act_scale") from "h"."""
        self._rows.activate(None, workspace, workspace["h"].shape[0])

    def reduce(
        self,
        ids: torch.Tensor,
        router_weights: torch.Tensor,
        num_rows: torch.Tensor | None,
        workspace: Mapping[str, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        """out `[T, H]` = the sum over a token's choices of router weight · row of "y"."""
        self._reduce(workspace["y"], ids, router_weights, workspace["row_of_slot"], num_rows, out)


class PaddedRows:
    """BATCHED: the same around a masked grouped GEMM whose experts have whole blocks of rows each.

    Arguments as for `ContiguousRows`.
    """

    def __init__(self, problem: ExpertsProblem, activation: Activation, quantize: RowQuantization | None = None):
        self._rows = _Rows(problem, activation, quantize)

    def gather(
        self,
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        tokens_per_expert: torch.Tensor,
        workspace: Mapping[str, torch.Tensor],
    ) -> None:
        """Fills "x" (and "x_scale") from x `[E_l, C, H]` (with x_scale `[E_l, C, H / 128]` e4m3 already)."""
        self._rows.gather(x, x_scale, tokens_per_expert, workspace, padded_capacity(x.shape[1]), x.shape[1])

    def activate(self, tokens_per_expert: torch.Tensor, workspace: Mapping[str, torch.Tensor]) -> None:
        """Fills "act" (and "act_scale") from "h"; a count above the capacity means the capacity."""
        self._rows.activate(tokens_per_expert, workspace, workspace["h"].shape[0] // tokens_per_expert.shape[0])


class _Rows:
    """The two kernels, for both formats."""

    def __init__(self, problem: ExpertsProblem, activation: Activation, quantize: RowQuantization | None):
        if quantize is not None and (problem.hidden_size % GROUP or problem.intermediate_size % GROUP):
            raise ValueError(
                f"H = {problem.hidden_size} and I = {problem.intermediate_size}: rows are quantized in groups of "
                f"{GROUP}, so both must be multiples of it"
            )
        self._problem, self._activation, self._quantize = problem, activation, quantize
        self._gathers: dict[tuple[Any, ...], KernelLaunch] = {}
        self._activate: KernelLaunch | None = None

    def gather(
        self,
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        tokens_per_expert: torch.Tensor | None,
        workspace: Mapping[str, torch.Tensor],
        rows_per_block: int,
        capacity: int,
    ) -> None:
        of_expert = x.stride(0) if x.dim() == 3 else 0
        scale_strides = (0, 0)
        if x_scale is not None:
            scale_strides = (x_scale.stride(-2), x_scale.stride(0) if x_scale.dim() == 3 else 0)
        layout = (x.stride(-2), of_expert, *scale_strides, x_scale is not None)
        launch = self._gathers.get(layout) or self._prepare_gather(layout)
        rows = workspace["x"]
        height, width = _tile(self._problem.hidden_size)
        grid = (rows.shape[0] // height, -(-self._problem.hidden_size // width), 1)
        names = ("slot_of_row", "row_end", "tile_expert", "tile_row")
        after = ("expert_of_row", "row_of_slot")
        given = [tensor for tensor in (x, x_scale, tokens_per_expert) if tensor is not None]
        key = _key(rows, *given)
        launch(
            grid, key and (*key, layout, x.dtype, tokens_per_expert is None), x, x_scale, tokens_per_expert,
            *(workspace.get(name) for name in names), rows, workspace.get("x_scale"),
            *(workspace.get(name) for name in after), rows_per_block, capacity,
        )  # fmt: skip

    def _prepare_gather(self, layout: tuple[Any, ...]) -> KernelLaunch:
        from moe_core.ops._kernels.contiguous import gather_rows_kernel

        stride, of_expert, scale_stride, scale_of_expert, carried = layout
        height, width = _tile(self._problem.hidden_size)
        mode = "copy" if self._quantize is None else "carry" if carried else "quantize"
        constants = {
            "stride_x": stride, "stride_x_expert": of_expert, "stride_scale": scale_stride,
            "stride_scale_expert": scale_of_expert, "H": self._problem.hidden_size, "K": self._problem.top_k,
            "BM": BLOCK_ROWS, "MODE": mode, "POWER_OF_TWO": self._power_of_two, "BR": height, "BC": width,
        }  # fmt: skip
        launch = self._gathers[layout] = KernelLaunch(gather_rows_kernel, constants, warps=_WARPS)
        return launch

    def activate(
        self, tokens_per_expert: torch.Tensor | None, workspace: Mapping[str, torch.Tensor], rows_per_block: int
    ) -> None:
        if self._activate is None:
            from moe_core.ops._kernels.contiguous import activate_rows_kernel

            height, width = _tile(self._problem.intermediate_size)
            constants = {
                "I": self._problem.intermediate_size, **self._activation.constants(),
                "QUANTIZE": self._quantize is not None, "POWER_OF_TWO": self._power_of_two, "BR": height, "BC": width,
            }  # fmt: skip
            self._activate = KernelLaunch(activate_rows_kernel, constants, warps=_WARPS)
        h, act = workspace["h"], workspace["act"]
        height, width = _tile(self._problem.intermediate_size)
        grid = (h.shape[0] // height, -(-self._problem.intermediate_size // width), 1)
        key = _key(h, act, *(() if tokens_per_expert is None else (tokens_per_expert,)))
        self._activate(
            grid, key and (*key, tokens_per_expert is None), h, tokens_per_expert, workspace.get("expert_of_row"),
            act, workspace.get("act_scale"), rows_per_block,
        )  # fmt: skip

    @property
    def _power_of_two(self) -> bool:
        return self._quantize is not None and self._quantize.power_of_two


def _tile(columns: int) -> tuple[int, int]:
    """(rows, columns) of one program over rows of that length: no lanes idle where it is a multiple of 128."""
    width = max(GROUP, min(_COLUMNS, columns & -columns))
    return _VALUES // width, width


def _key(*tensors: torch.Tensor) -> tuple[Any, ...] | None:
    """What a launch may be kept under: workspaces are aligned by their owner, so only what is handed in counts."""
    pointers = 0
    for tensor in tensors:
        pointers |= tensor.data_ptr()
    return None if pointers % 16 else ("aligned",)


def transposed_scale(scale: torch.Tensor, groups: int, experts: int | None = None) -> torch.Tensor:
    """A workspace's flat scales as `[M, G]` (`experts` given: `[E_l, C, G]`), a column's rows next to one another."""
    if experts is None:
        return scale.view(groups, -1).t()
    return scale.view(experts, groups, -1).transpose(1, 2)


def quantize_rows_torch(x: torch.Tensor, quantize: RowQuantization) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels do to rows: `[…, N, K]` → e4m3 `[…, N, K]` and fp32 scales `[…, N, K / 128]`; x ≈ q · scale.

    The scale is max(amax, 1e-10) / 448, NaN for a group that holds Inf or NaN; values are divided by it, rounded to
    nearest even, and saturate.
    """
    groups = x.to(torch.float32).unflatten(-1, (-1, GROUP))
    amax = groups.abs().amax(dim=-1)
    # by a tensor: CUDA torch multiplies by the reciprocal of a scalar, which is another bit
    scale = torch.where(amax.isfinite(), amax.clamp(min=AMAX_FLOOR) / torch.full_like(amax, E4M3_MAX), torch.nan)
    if quantize.power_of_two:
        mantissa, exponent = torch.frexp(scale)
        power = torch.ldexp(torch.ones_like(mantissa), torch.where(mantissa == 0.5, exponent - 1, exponent))
        scale = torch.where(scale.isfinite(), power, torch.nan)
    q = (groups / scale.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    return q.flatten(-2).to(torch.float8_e4m3fn), scale


def gather_rows_torch(
    ids: torch.Tensor, num_experts: int, num_rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `ContiguousRows.gather` decides: the slot of each row and its expert, both `[M]`, -1 where a row is empty.

    Each expert's choices keep their order, and begin at the first multiple of 128 behind those before it.
    """
    top_k = ids.shape[1]
    flat = ids.flatten().clone()
    if num_rows is not None:
        flat[int(num_rows) * top_k :] = -1
    total = align_tiles(flat.numel(), num_experts, BLOCK_ROWS) * BLOCK_ROWS
    slot_of_row = torch.full((total,), -1, dtype=torch.int64, device=ids.device)
    expert_of_row = torch.full((total,), -1, dtype=torch.int32, device=ids.device)
    first = 0
    for expert in range(num_experts):
        slots = (flat == expert).nonzero().flatten()
        slot_of_row[first : first + slots.numel()] = slots
        expert_of_row[first : first + slots.numel()] = expert
        first += -(-slots.numel() // BLOCK_ROWS) * BLOCK_ROWS
    return slot_of_row, expert_of_row
