"""A row on its way between ranks: values, scales, expert ids and router weights side by side, in one buffer of bytes.

One buffer is one collective. Where the payload is a scheme's, rows are quantized before they travel: row by row, to the
bits of `formats`, so it does not matter where it is done, and each row is quantized once.

Shape letters: T tokens on this rank · H hidden · K top-k · N rows of a buffer · G columns of a quantization group.
"""

from __future__ import annotations

import functools

import attrs
import torch

from moe_core import formats
from moe_core.errors import MoEError
from moe_core.footprint import aligned
from moe_core.ops import FP8_GROUP, QuantizeRows
from moe_core.quant import QuantScheme, QuantSpec, ScaleFormat
from moe_core.types import MODEL_DTYPE_PAYLOAD, Routing

_ALIGNMENT = 16
"""Bytes. Rows, and each part of a row, start at multiples of this: enough for any vector load, and for TMA."""
_E4M3_SINCE = (8, 9)
"""Compute capability."""


@attrs.frozen
class Arrived:
    """Views on the rows of a buffer.

    Attributes:
        x: `[N, H]` in the model dtype, or as `formats` stores the payload.
        x_scale: `[N, groups of H]`; None: `x` is in the model dtype.
        topk_ids: int32 `[N, K]`.
        topk_weights: float32 `[N, K]`; None where they do not travel.
    """

    x: torch.Tensor
    x_scale: torch.Tensor | None
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor | None


@attrs.frozen
class WireRow:
    """The layout of a row.

    Attributes:
        hidden: H.
        dtype: the model's.
        top_k: K.
        spec: how the payload is quantized; None: it is in the model dtype.
        weighted: router weights travel beside the ids.
    """

    hidden: int
    dtype: torch.dtype
    top_k: int
    spec: QuantSpec | None
    weighted: bool

    @property
    def row_bytes(self) -> int:
        return self._starts[-1]

    @property
    def _parts(self) -> tuple[tuple[int, torch.dtype], ...]:
        """(columns, dtype) of values, scales, ids and weights."""
        values, scales = (self.hidden, self.dtype), (0, torch.float32)
        if self.spec is not None:
            values = (self.hidden // formats.codes_per_byte(self.spec), formats.storage_dtype(self.spec))
            groups = formats.scale_shape(self.spec.group_shape, 1, self.hidden)[1]
            scales = (groups, formats.scale_dtype(self.spec))
        return values, scales, (self.top_k, torch.int32), (self.top_k if self.weighted else 0, torch.float32)

    @property
    def _starts(self) -> tuple[int, ...]:
        """Where each part starts, in bytes, and where the row ends."""
        starts = [0]
        for columns, dtype in self._parts:
            starts.append(starts[-1] + aligned(columns * dtype.itemsize, _ALIGNMENT))
        return tuple(starts)

    def pack(self, hidden_states: torch.Tensor, routing: Routing, rows: int) -> torch.Tensor:
        """uint8 `[rows, row_bytes]`: the T rows, then padding, uninitialised but for its ids, which are -1."""
        tokens = hidden_states.shape[0]
        buffer = torch.empty(rows, self.row_bytes, dtype=torch.uint8, device=hidden_states.device)
        room = self.unpack(buffer)
        values = hidden_states
        if self.spec is not None:
            values, scales = quantize_rows(hidden_states, self.spec)
            assert room.x_scale is not None, "a quantized payload has scales"
            room.x_scale[:tokens].copy_(scales)
        room.x[:tokens].copy_(values)
        room.topk_ids[:tokens].copy_(routing.topk_ids)
        if room.topk_weights is not None:
            room.topk_weights[:tokens].copy_(routing.topk_weights)
        if rows > tokens:
            room.topk_ids[tokens:].fill_(-1)
        return buffer

    def unpack(self, buffer: torch.Tensor) -> Arrived:
        """Views on a buffer, uint8 `[N, row_bytes]`."""
        x, scale, ids, weights = (
            buffer[:, start : start + columns * dtype.itemsize].view(dtype)
            for start, (columns, dtype) in zip(self._starts, self._parts, strict=False)
        )
        return Arrived(x, None if self.spec is None else scale, ids, weights if self.weighted else None)


def quantize_rows(x: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """`formats.quantize` of rows `[T, H]`; on a GPU in one kernel, which has its bits, where there is one.

    Args:
        x: unit stride in H.
        spec: row-wise.
    """
    kernel = _row_kernel(x.shape[1], spec, x.device) if x.is_cuda else None
    return formats.quantize(x, spec) if kernel is None else run_row_kernel(kernel, x, spec)


def run_row_kernel(kernel: QuantizeRows, x: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by a kernel made for H and the format."""
    q = torch.empty(x.shape, dtype=formats.storage_dtype(spec), device=x.device)
    groups = formats.scale_shape(spec.group_shape, 1, x.shape[1])[1]
    scale = torch.empty(x.shape[0], groups, dtype=formats.scale_dtype(spec), device=x.device)
    if x.shape[0]:
        on_borders = not (x.data_ptr() | q.data_ptr() | scale.data_ptr()) % _ALIGNMENT
        kernel(x, q, scale, (x.dtype, x.stride(0)) if on_borders else None)
    return q, scale


def row_kernel(hidden: int, spec: QuantSpec) -> QuantizeRows | None:
    """The kernel that quantizes rows to a format; None: there is none."""
    by_group = spec.group_shape == (1, FP8_GROUP)
    whole = spec.group_shape == (1, -1)
    if formats.storage_dtype(spec) is not torch.float8_e4m3fn or not (by_group or whole):
        return None
    return QuantizeRows(hidden, by_group=by_group, power_of_two=spec.scale_format is ScaleFormat.UE8M0, pdl=False)


@functools.cache
def _row_kernel(hidden: int, spec: QuantSpec, device: torch.device) -> QuantizeRows | None:
    """For a GPU: made once; None where the device has no instructions for e4m3."""
    return row_kernel(hidden, spec) if torch.cuda.get_device_capability(device) >= _E4M3_SINCE else None


def payload_spec(payload: str, scheme: QuantScheme, dispatch: str) -> QuantSpec | None:
    """How a dispatch that carries `ROW_WISE_PAYLOAD` has to quantize rows; None: not at all.

    Raises:
        MoEError: the payload is neither the model dtype nor that of the layer's own scheme, or not row-wise.
    """
    if payload == MODEL_DTYPE_PAYLOAD:
        return None
    spec = scheme.activation
    if payload != scheme.name or spec is None or not spec.row_wise:
        raise MoEError(
            f"dispatch {dispatch} was given payload = {payload!r} in a layer of scheme {scheme.name!r}; it carries "
            f"{MODEL_DTYPE_PAYLOAD!r}, and the scheme's own where activations are quantized row by row"
        )
    return spec
