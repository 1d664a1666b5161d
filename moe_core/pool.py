"""`SharedPool`: what the layers of a model share and must not make twice: a vendor's buffers, symmetric memory.

Everything else that a step needs comes from the caching allocator. What is pooled here is made collectively, at build
time, never grown, and destroyed all together: when nobody holds any of it, in the reverse order of its making.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import attrs

T = TypeVar("T")


@attrs.define(eq=False)
class _Entry(Generic[T]):
    """One pooled item, how many layers hold it, and whether a captured graph may still point into it."""

    item: T
    holders: int = 0
    kept: bool = False


class Lease(Generic[T]):
    """One layer's hold on a pooled item. Give `close` to `weakref.finalize` of whatever uses the item.

    Attributes:
        item: what is shared.
    """

    def __init__(self, entry: _Entry[T], give_back: Callable[[], None]) -> None:
        self.item = entry.item
        self._entry = entry
        self._give_back: Callable[[], None] | None = give_back

    def keep(self) -> None:
        """A graph was captured over the item: it stays until the process ends, whoever lets go of it."""
        self._entry.kept = True

    def close(self) -> None:
        """Let go. A second call does nothing."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


class SharedPool(Generic[T]):
    """Items by key, one per process and rank, counted by their holders.

    Making an item is collective, so all ranks ask for the same keys in the same order, as they build the same layers in
    the same order. An owner is what the caller says, a process group, a whole process or a virtual rank. Owners never
    share an item: so nothing here needs a lock, and virtual ranks make theirs at the same time.

    An owner's items go together. Libraries map memory of other processes for several of their buffers at once, and one
    buffer's end has unmapped what another still used.

    Args:
        destroy: frees an item; called once for each.
    """

    def __init__(self, destroy: Callable[[T], None]) -> None:
        self._destroy = destroy
        self._owners: dict[Hashable, dict[Hashable, _Entry[T]]] = {}
        atexit.register(self.close)

    def has(self, owner: Hashable, key: Hashable) -> bool:
        """There is such an item, whether somebody holds it or not."""
        return key in self._owners.get(owner, {})

    def lease(self, owner: Hashable, key: Hashable, make: Callable[[], T]) -> Lease[T]:
        """Hold the owner's item of this key; the first to ask makes it."""
        if not self.has(owner, key):
            item = make()
            self._owners.setdefault(owner, {})[key] = _Entry(item)
        entries = self._owners[owner]
        entry = entries[key]
        entry.holders += 1

        def give_back() -> None:
            entry.holders -= 1
            if entries is self._owners.get(owner) and not any(each.holders or each.kept for each in entries.values()):
                self._end(owner)

        return Lease(entry, give_back)

    def close(self) -> None:
        """Destroy everything that is left. Runs when the interpreter exits."""
        for owner in list(self._owners):
            self._end(owner)

    def _end(self, owner: Hashable) -> None:
        entries = self._owners.pop(owner)
        while entries:
            self._destroy(entries.popitem()[1].item)
