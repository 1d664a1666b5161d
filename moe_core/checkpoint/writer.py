"""`ShardWriter`: writes safetensors files tensor by tensor, in any order, holding none of them.

The header of a file comes first and says where every tensor lies, so names, dtypes and shapes are given beforehand.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moe_core.checkpoint.header import dtype_name
from moe_core.checkpoint.reader import INDEX_FILE, WEIGHTS_FILE
from moe_core.errors import MoEError

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name → (dtype, shape)."""


class ShardWriter:
    """A checkpoint's weights in a folder: one file, or several with an index.

    Args:
        folder: an empty folder.
        layout: every tensor; neighbours share a shard.
        max_shard_bytes: a shard ends before it would grow over this, unless one tensor alone does.
    """

    def __init__(self, folder: Path, layout: Layout, max_shard_bytes: int) -> None:
        self._folder, self._layout = folder, layout
        self._offsets: dict[str, int] = {}
        self._missing = set(layout)
        shards = _split(layout, max_shard_bytes)
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        self._file_of = {
            name: file
            for file, shard in zip(names if len(shards) > 1 else [WEIGHTS_FILE], shards, strict=True)
            for name in shard
        }
        self._open: dict[str, Any] = {}
        for file in dict.fromkeys(self._file_of.values()):
            self._begin(file)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor into its place; it must have the dtype and shape that were announced."""
        dtype, shape = self._layout[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), f"{name}: {tensor.dtype} {tuple(tensor.shape)}"
        stream = self._open[self._file_of[name]]
        stream.seek(self._offsets[name])
        if tensor.numel():
            stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def close(self) -> None:
        """Bring everything to disk, and write the index where there are several files.

        Raises:
            MoEError: a tensor that was announced was never written.
        """
        self.abandon()
        if self._missing:
            raise MoEError(f"{self._folder}: {len(self._missing)} tensors were not written, {min(self._missing)!r} say")
        if len(self._open) == 1:
            return
        index = {
            "metadata": {"total_size": layout_bytes(self._layout)},
            "weight_map": dict(sorted(self._file_of.items())),
        }
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def abandon(self) -> None:
        """Close the files, whatever is in them."""
        for stream in self._open.values():
            if not stream.closed:
                stream.flush()
                os.fsync(stream.fileno())
                stream.close()

    def _begin(self, file: str) -> None:
        """Write a file's header and give it its full length."""
        own = [name for name, where in self._file_of.items() if where == file]
        # Wide elements first, so that each tensor begins at a multiple of its element size.
        own.sort(key=lambda name: (-self._layout[name][0].itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in own:
            dtype, shape = self._layout[name]
            begin, end = end, end + _num_bytes(dtype, shape)
            header[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [begin, end]}
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        stream = self._open[file] = (self._folder / file).open("wb")
        stream.write(struct.pack("<Q", len(raw)) + raw)
        start = stream.tell()
        for name in own:
            self._offsets[name] = start + header[name]["data_offsets"][0]
        stream.truncate(start + end)


def layout_bytes(layout: Layout) -> int:
    """What all tensors take together."""
    return sum(_num_bytes(dtype, shape) for dtype, shape in layout.values())


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _split(layout: Layout, max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name, (dtype, shape) in layout.items():
        size = _num_bytes(dtype, shape)
        if shards[-1] and held + size > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards
