"""What a step really allocates and moves: storages as torch makes and drops them, and bytes that a group hands over."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from moe_core.interfaces import Finish


class Allocations(TorchDispatchMode):
    """Counts the bytes of every CPU storage that this thread's operators make, while it is entered.

    Attributes:
        live, peak: bytes now, and the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage()._cdata not in given:
                self.add(leaf)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """A tensor that came about where this mode doesn't see it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def restart(self) -> int:
        """Count the peak anew, from what is live, which is returned."""
        self.peak = self.live
        return self.live


class CountingGroup:
    """A group around another one.

    Attributes:
        received: bytes that came from other ranks since the last look; of a reduce-scatter the parts that are summed.
    """

    def __init__(self, group: Any, allocations: Allocations) -> None:
        self._group, self._allocations = group, allocations
        self.received = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def all_gather(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        return self.all_gather_start(tensor, sizes)()

    def all_gather_start(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> Finish:
        total = sum(sizes or [len(tensor)] * self._group.size)
        return self._start("all_gather_start", total, total - len(tensor), tensor, sizes)

    def reduce_scatter_start(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> Finish:
        own = len(tensor) // self._group.size if sizes is None else sizes[self._group.rank]
        return self._start("reduce_scatter_start", own, own * (self._group.size - 1), tensor, sizes)

    def all_to_all(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        return self.all_to_all_start(tensor, send, receive)()

    def all_to_all_start(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> Finish:
        total = sum(receive)
        return self._start("all_to_all_start", total, total - receive[self._group.rank], tensor, send, receive)

    def _start(self, name: str, rows: int, received: int, tensor: torch.Tensor, *arguments: Any) -> Finish:
        """A real group allocates the `rows` of the result when it starts; the virtual one when it ends."""
        row = tensor.shape[1:].numel() * tensor.itemsize
        with _disable_current_modes():  # a virtual group's copies stand for the wire
            collect = getattr(self._group, name)(tensor, *arguments)
            room = [torch.empty(rows * row, dtype=torch.uint8)]
        self._allocations.add(room[0])

        def finish() -> torch.Tensor:
            with _disable_current_modes():
                result: torch.Tensor = collect()
            room.clear()
            self._allocations.add(result)
            self.received += received * row
            return result

        return finish
