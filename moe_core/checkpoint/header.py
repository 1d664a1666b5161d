"""The header of a safetensors file, read and checked without touching the weights.

A file is: 8 bytes little-endian header length n · n bytes of JSON (name → dtype, shape, data offsets) · the data. One
that was cut short still has a whole header, so the end of the data is held against the size of the file.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import attrs
import torch

from moe_core.errors import CheckpointError

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit; a larger number is not a length but other bytes
_LFS_POINTER = b"version https://git-lfs"

_DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
}
"""The format's dtype → (torch's name for it, bytes per element)."""


@attrs.frozen
class TensorInfo:
    """What a header says about one tensor.

    Attributes:
        name: as in the file.
        dtype: as the file spells it, such as "BF16".
        shape: as in the file.
        file: which file holds it.
        num_bytes: its length there.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    num_bytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch's terms.

        Raises:
            CheckpointError: this torch has no such dtype.
        """
        found = getattr(torch, _DTYPES.get(self.dtype, ("", 0))[0] or "no such dtype", None)
        if not isinstance(found, torch.dtype):
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} has dtype {self.dtype}, which torch {torch.__version__} does not "
                "have; use a newer torch, or another copy of the checkpoint"
            )
        return found


def dtype_name(dtype: torch.dtype) -> str:
    """How the format spells a torch dtype."""
    return next(name for name, (ours, _) in _DTYPES.items() if getattr(torch, ours, None) == dtype)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, by name; the file's length is checked, its data is not read.

    Raises:
        CheckpointError: the file is missing, cut short, or not a safetensors file.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(_LENGTH_BYTES + len(_LFS_POINTER))
            length = _header_length(file, start)
            stream.seek(_LENGTH_BYTES)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); fetch the file again") from error
    try:
        entries = json.loads(raw)
        tensors = {name: _tensor(file, name, entry) for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: its header is damaged ({error}); fetch the file again") from error
    _check_length(file, entries, _LENGTH_BYTES + length)
    return tensors


def _header_length(file: Path, start: bytes) -> int:
    if start.startswith(_LFS_POINTER[:_LENGTH_BYTES]):
        raise CheckpointError(
            f"{file}: is a git-lfs pointer and not the weights themselves; run git lfs pull in the folder"
        )
    size = file.stat().st_size
    if size < _LENGTH_BYTES:
        raise CheckpointError(f"{file}: truncated: {size} bytes, too short for a header; fetch the file again")
    length: int = struct.unpack("<Q", start[:_LENGTH_BYTES])[0]
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError(f"{file}: is not a safetensors file (a header of {length} bytes); fetch the file again")
    if _LENGTH_BYTES + length > size:
        raise CheckpointError(
            f"{file}: truncated inside its header: {size} bytes, the header alone needs {_LENGTH_BYTES + length}; "
            "fetch the file again"
        )
    return length


def _tensor(file: Path, name: str, entry: dict[str, Any]) -> TensorInfo:
    shape, (begin, end) = tuple(int(extent) for extent in entry["shape"]), entry["data_offsets"]
    info = TensorInfo(name, str(entry["dtype"]), shape, file, end - begin)
    width = _DTYPES.get(info.dtype)
    if width is not None and math.prod(shape) * width[1] != info.num_bytes:
        raise ValueError(f"tensor {name!r} of {info.dtype} {shape} is given {info.num_bytes} bytes")
    return info


def _check_length(file: Path, entries: dict[str, Any], data_start: int) -> None:
    """The last tensor must end where the file ends."""
    ends = {name: entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"}
    expected, size = data_start + max(ends.values(), default=0), file.stat().st_size
    if size < expected:
        cut = [name for name, end in ends.items() if data_start + end > size]
        raise CheckpointError(
            f"{file}: truncated: {size} bytes, its header announces {expected}; {len(cut)} of {len(ends)} tensors are "
            f"cut off, first {min(cut, key=lambda name: ends[name])!r}; fetch the file again"
        )
    if size > expected:
        raise CheckpointError(
            f"{file}: {size} bytes, but its header announces {expected}: it is damaged; fetch the file again"
        )
