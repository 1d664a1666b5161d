"""What a step really allocates and moves: storages as torch makes and drops them, and bytes that a group hands over."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


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
        return self._call("all_gather", lambda whole: whole.nbytes - tensor.nbytes, tensor, sizes)

    def reduce_scatter(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        return self._call("reduce_scatter", lambda own: own.nbytes * (self._group.size - 1), tensor, sizes)

    def all_to_all(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        others = sum(receive) - receive[self._group.rank]
        row = tensor[:1].nbytes if len(tensor) else 0
        return self._call("all_to_all", lambda _: others * row, tensor, send, receive)

    def _call(self, name: str, received: Any, *arguments: Any) -> torch.Tensor:
        with _disable_current_modes():  # a virtual group's copies stand for the wire
            result: torch.Tensor = getattr(self._group, name)(*arguments)
        self._allocations.add(result)
        self.received += received(result)
        return result
