"""Backends that mix up the steps of several layers. Importing this adds them to the other dispatch mutants."""

from __future__ import annotations

import collections
import weakref
from typing import Any

import attrs

from moe_core.errors import MoEError
from tests.conformance import dispatch_mutants

SHARED = {"max_in_flight": 2, "shared_in_flight": True}
_slots: dict[int, weakref.WeakSet[Any]] = collections.defaultdict(weakref.WeakSet)
"""Rank → its slots that are taken. Weak, so that a step which was dropped in a case that failed gives its slot back."""


class _Slot:
    def __init__(self, inner: Any) -> None:
        self.inner = inner


class OverAllLayers(dispatch_mutants.Wrapped):
    """No mutant by itself, where it is declared: two slots a rank, whichever layer takes them."""

    says = "2 steps are in flight over all layers; combine one before the next"

    def prepare(self, hidden_states, routing, **named):
        taken = _slots[self.rank]
        if len(taken) == 2:
            raise MoEError(self.says)
        dispatched = self.inner.prepare(hidden_states, routing, **named)
        slot = _Slot(dispatched.handle)
        taken.add(slot)
        return attrs.evolve(dispatched, handle=slot)

    def finalize(self, expert_out, handle, routing, out):
        self.inner.finalize(expert_out, handle.inner, routing, out)
        self.release(handle)

    def release(self, handle):
        _slots[self.rank].discard(handle)


dispatch_mutants.wrong("batched", "shares slots over layers in secret", "no state between layers", max_in_flight=2)(
    OverAllLayers
)


@dispatch_mutants.wrong("batched", "lets a step too many over all layers through", "calls in flight", **SHARED)
class TakesMore(dispatch_mutants.Wrapped):
    pass


@dispatch_mutants.wrong("batched", "refuses a step too many without a reason", "calls in flight", **SHARED)
class RefusesSilently(OverAllLayers):
    says = "not now"


@dispatch_mutants.wrong("batched", "loses a slot when it refuses", "calls in flight", **SHARED)
class LosesASlot(OverAllLayers):
    def prepare(self, hidden_states, routing, **named):
        try:
            return super().prepare(hidden_states, routing, **named)
        except MoEError:
            self.lost = _Slot(None)
            _slots[self.rank].add(self.lost)
            raise


@dispatch_mutants.wrong("batched", "takes a number for a handle", "handles")
class NumbersItsHandles(dispatch_mutants.Wrapped):
    """What another layer handed out under the same number is taken for one's own."""

    def __init__(self, inner, config, parallel):
        super().__init__(inner, config, parallel)
        self.handles, self.taken = {}, set()

    def prepare(self, hidden_states, routing, **named):
        dispatched = self.inner.prepare(hidden_states, routing, **named)
        number = len(self.handles) + len(self.taken)
        self.handles[number] = dispatched.handle
        return attrs.evolve(dispatched, handle=number)

    def finalize(self, expert_out, handle, routing, out):
        if handle in self.taken:
            raise MoEError("this handle was taken already")
        inner = self.handles.pop(handle)
        self.taken.add(handle)
        self.inner.finalize(expert_out, inner, routing, out)

    def release(self, handle):
        self.inner.release(self.handles.pop(handle))
