"""Dispatch backends that are wrong in one way each, as thin wrappers around `batched`, `all_gather` and `local`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import attrs
import torch

from moe_core.errors import MoEError
from moe_core.interfaces import PrepareAndFinalize
from moe_core.testing import registered
from moe_core.testing.dispatch import dispatch_cases
from moe_core.types import MODEL_DTYPE_PAYLOAD, DispatchCapabilities, ExpertPlacement, Routing
from tests.conformance.mutant import Mutant

RANKS = 2


class Wrapped(PrepareAndFinalize):
    """A backend around another one; a mutant overrides one step."""

    def __init__(self, inner: Any, config: Any, parallel: Any) -> None:
        self.inner, self.config, self.parallel = inner, config, parallel
        self.size = max(parallel.ep_size, parallel.tp_size)
        self.rank = max(parallel.ep_rank, parallel.tp_rank)

    @classmethod
    def told(cls, config, parallel, scheme, group, placement):
        """What the factory of the one inside is given."""
        return config, parallel, scheme, group, placement

    def prepare(self, hidden_states, routing, **named):
        return self.inner.prepare(hidden_states, routing, **named)

    def finalize(self, expert_out, handle, routing, out):
        self.inner.finalize(expert_out, handle, routing, out)

    def expert_output(self, dispatched, out):
        return self.inner.expert_output(dispatched, out)

    def release(self, handle):
        self.inner.release(handle)

    def check(self):
        self.inner.check()


MUTANTS: list[Mutant] = []


def wrong(base: str, name: str, *duties: str, **claims: Any) -> Callable[[type[Wrapped]], type[Wrapped]]:
    """Make a mutant of the decorated class around the backend `base`; `claims` change what it declares."""

    def register(kind: type[Wrapped]) -> type[Wrapped]:
        MUTANTS.append(Mutant(f"{base}: {name}", duties, functools.partial(cases_of, base, kind, claims)))
        return kind

    return register


def cases_of(base: str, kind: type[Wrapped], claims: dict[str, Any], ranks: int = RANKS) -> list[Any]:
    candidate = registered("dispatch", base)
    probe = claims.get("probe", candidate.probe)
    capabilities: DispatchCapabilities = attrs.evolve(
        candidate.capabilities, **{name: value for name, value in claims.items() if name != "probe"}
    )
    mutated = attrs.evolve(
        candidate,
        capabilities=capabilities,
        probe=probe,
        factory=lambda *given: kind(candidate.factory(*kind.told(*given)), given[0], given[1]),
    )
    return dispatch_cases(mutated, ranks=ranks)


@wrong("batched", "drops the last token", "rows")
@wrong("all_gather", "drops the last token", "rows")
class DropsAToken(Wrapped):
    def finalize(self, expert_out, handle, routing, out):
        self.inner.finalize(expert_out, handle, routing, out)
        out[-1:].zero_()


@wrong("batched", "ignores the router weight", "router weight")
class IgnoresWeight(Wrapped):
    def finalize(self, expert_out, handle, routing, out):
        ones = torch.ones_like(routing.topk_weights)
        self.inner.finalize(expert_out, handle, Routing(routing.topk_ids, ones), out)


@wrong("batched", "applies the router weight twice", "router weight")
class AppliesWeightTwice(Wrapped):
    def finalize(self, expert_out, handle, routing, out):
        self.inner.finalize(expert_out, handle, Routing(routing.topk_ids, routing.topk_weights.square()), out)


@wrong("batched", "keeps its handle on self", "calls in flight")
class KeepsState(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        dispatched = self.inner.prepare(hidden_states, routing, **named)
        self.kept = dispatched.handle
        return dispatched

    def finalize(self, expert_out, handle, routing, out):
        self.inner.finalize(expert_out, self.kept, routing, out)


_kept_by_class: dict[int, Any] = {}


@wrong("batched", "keeps its handle where two layers share it", "no state between layers", max_in_flight=1)
class SharesState(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        dispatched = self.inner.prepare(hidden_states, routing, **named)
        _kept_by_class[self.rank] = dispatched.handle
        return dispatched

    def finalize(self, expert_out, handle, routing, out):
        self.inner.finalize(expert_out, _kept_by_class[self.rank], routing, out)


@wrong("batched", "remembers the size of the first step", "no state between steps")
class RemembersSize(Wrapped):
    first = None

    def finalize(self, expert_out, handle, routing, out):
        self.inner.finalize(expert_out, handle, routing, out)
        self.first = self.first or len(out)
        out[self.first :].zero_()


@wrong("batched", "one buffer for all calls", "calls in flight")
class OneBuffer(Wrapped):
    buffer = None

    def prepare(self, hidden_states, routing, **named):
        dispatched = self.inner.prepare(hidden_states, routing, **named)
        if self.buffer is None or self.buffer.shape != dispatched.x.shape or self.buffer.dtype != dispatched.x.dtype:
            self.buffer = dispatched.x.clone()
        self.buffer.copy_(dispatched.x)
        return attrs.evolve(dispatched, x=self.buffer)


@wrong("batched", "writes into hidden_states", "read-only inputs")
class WritesInput(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        dispatched = self.inner.prepare(hidden_states, routing, **named)
        hidden_states.neg_()
        return dispatched


@wrong("local", "writes into the router weights", "read-only inputs")
class WritesWeights(Wrapped):
    def finalize(self, expert_out, handle, routing, out):
        self.inner.finalize(expert_out, handle, routing, out)
        routing.topk_weights.nan_to_num_(0.0)


@wrong("local", "lets the experts write into hidden_states", "read-only inputs")
class AliasesInput(Wrapped):
    def expert_output(self, dispatched, out):
        return dispatched.x


@wrong("batched", "reads rows past the counts", "padding is not read")
class ReadsPadding(Wrapped):
    def finalize(self, expert_out, handle, routing, out):
        self.inner.finalize(expert_out, handle, routing, out)
        if expert_out.numel():
            out += 0 * expert_out.sum()


@wrong("local", "lets one token's NaN into all", "padding is not read")
class SpreadsNan(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        kept = (routing.topk_ids >= 0).any(dim=1, keepdim=True)
        total = torch.where(kept, hidden_states, 0).sum()
        return self.inner.prepare(hidden_states + 0 * total, routing, **named)

    def expert_output(self, dispatched, out):
        return None


@wrong("batched", "counts one row too many", "tokens_per_expert")
class Miscounts(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        dispatched = self.inner.prepare(hidden_states, routing, **named)
        counts = (dispatched.tokens_per_expert + 1).clamp(max=dispatched.x.shape[1])
        return attrs.evolve(dispatched, tokens_per_expert=counts)


@wrong("batched", "counts in int64", "tokens_per_expert")
class CountsInInt64(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        dispatched = self.inner.prepare(hidden_states, routing, **named)
        return attrs.evolve(dispatched, tokens_per_expert=dispatched.tokens_per_expert.long())


@wrong("batched", "delivers another dtype", "shapes and dtypes")
class WrongDtype(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        dispatched = self.inner.prepare(hidden_states, routing, **named)
        return attrs.evolve(dispatched, x=dispatched.x.double() if dispatched.x_scale is None else dispatched.x)


@wrong("all_gather", "leaves one rank out of the sum", "cross-rank reduce")
class SumsOverWrongRanks(Wrapped):
    def finalize(self, expert_out, handle, routing, out):
        lost = self.size > 1 and self.rank == self.size - 1
        self.inner.finalize(torch.zeros_like(expert_out) if lost else expert_out, handle, routing, out)


@wrong("all_gather", "sums over the ranks twice", "cross-rank reduce")
class SumsTwice(Wrapped):
    def finalize(self, expert_out, handle, routing, out):
        self.inner.finalize(expert_out, handle, routing, out)
        if self.inner.__class__.__name__ != "LocalPrepareAndFinalize":
            out *= self.size


@wrong("local", "leaves its ranks' sum out where it carries tokens", "cross-rank reduce", carries_tokens=True)
class CarriesNothing(Wrapped):
    pass


@wrong("local", "ignores the expert map", "expert map")
class IgnoresMap(Wrapped):
    def prepare(self, hidden_states, routing, *, expert_map, **named):
        return self.inner.prepare(hidden_states, routing, expert_map=None, **named)


@wrong("batched", "places experts in blocks whatever the placement", "expert map")
class OnlyLinear(Wrapped):
    @classmethod
    def told(cls, config, parallel, scheme, group, placement):
        linear = ExpertPlacement.LINEAR
        return attrs.evolve(config, placement=linear), parallel, scheme, group, linear


@wrong("batched", "thinks that all ranks hold as many experts", "expert map", "rows")
class EqualShares(Wrapped):
    @classmethod
    def told(cls, config, parallel, scheme, group, placement):
        share = max(config.num_experts // parallel.ep_size, 1)
        return attrs.evolve(config, num_experts=share * parallel.ep_size), parallel, scheme, group, placement


@wrong("batched", "takes -1 as the last expert", "dropped ids")
class TakesMinusOne(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        last = torch.full_like(routing.topk_ids, named["num_experts"] - 1)
        ids = torch.where(routing.topk_ids < 0, last, routing.topk_ids)
        return self.inner.prepare(hidden_states, Routing(ids, routing.topk_weights), **named)

    def finalize(self, expert_out, handle, routing, out):
        weights = routing.topk_weights.nan_to_num(0.5)
        self.inner.finalize(expert_out, handle, Routing(routing.topk_ids, weights), out)


@wrong("local", "counts equal ids once", "duplicate ids")
class DuplicatesOnce(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        ids = routing.topk_ids.clone()
        for k in range(1, ids.shape[1]):
            ids[:, k].masked_fill_((ids[:, :k] == ids[:, k : k + 1]).any(dim=1), -1)
        return self.inner.prepare(hidden_states, Routing(ids, routing.topk_weights), **named)


@wrong("local", "sums only the first two choices", "top-k sum", "rows")
class TwoChoices(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        ids = routing.topk_ids.clone()
        ids[:, 2:] = -1
        return self.inner.prepare(hidden_states, Routing(ids, routing.topk_weights), **named)


@wrong("batched", "other bits each time", "determinism")
class NotDeterministic(Wrapped):
    calls = 0

    def finalize(self, expert_out, handle, routing, out):
        self.inner.finalize(expert_out, handle, routing, out)
        self.calls += 1
        if self.calls % 2 == 0:
            out.mul_(1 + 2 * torch.finfo(out.dtype).eps)


@wrong("batched", "fails without tokens", "empty steps")
@wrong("all_gather", "fails without tokens", "empty steps")
class FailsOnEmpty(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        assert hidden_states.shape[0] > 0
        return self.inner.prepare(hidden_states, routing, **named)


@wrong("all_gather", "skips the collective without tokens", "empty steps", "faults")
class SkipsTheCollective(Wrapped):
    def finalize(self, expert_out, handle, routing, out):
        if out.shape[0]:
            self.inner.finalize(expert_out, handle, routing, out)


@wrong("batched", "takes a handle again", "handles")
class TakesHandleAgain(Wrapped):
    def finalize(self, expert_out, handle, routing, out):
        if handle is not None:
            handle.consumed = False
        self.inner.finalize(expert_out, handle, routing, out)


@wrong("local", "takes anything as a handle", "handles")
class TakesAnything(Wrapped):
    def finalize(self, expert_out, handle, routing, out):
        out.copy_(expert_out)


@wrong("batched", "takes any payload", "refusals")
class TakesAnyPayload(Wrapped):
    def prepare(self, hidden_states, routing, *, payload, **named):
        known = payload if payload == self.inner_scheme else MODEL_DTYPE_PAYLOAD
        return self.inner.prepare(hidden_states, routing, payload=known, **named)

    @property
    def inner_scheme(self):
        return getattr(self.inner, "local", self.inner).scheme.name


@wrong("batched", "cuts what is above the bound", "capacity")
class CutsSilently(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        most = self.config.max_tokens_per_rank or hidden_states.shape[0]
        cut = Routing(routing.topk_ids[:most], routing.topk_weights[:most])
        return self.inner.prepare(hidden_states[:most], cut, **named)

    def finalize(self, expert_out, handle, routing, out):
        most = self.config.max_tokens_per_rank or out.shape[0]
        cut = Routing(routing.topk_ids[:most], routing.topk_weights[:most])
        out[most - 1 :] = 0  # the last of the rows that it has is among those that it loses
        self.inner.finalize(expert_out, handle, cut, out[:most])
        if out.shape[0] > most:
            out[:most] += out[: out.shape[0] - most].mean()


@wrong("local", "raises the wrong error above the bound", "capacity")
class WrongError(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        if hidden_states.shape[0] > (self.config.max_tokens_per_rank or hidden_states.shape[0]):
            raise IndexError("index out of range")
        return self.inner.prepare(hidden_states, routing, **named)


@wrong("batched", "gives no slot back after an exception", "release", max_in_flight=2)
class LeaksSlots(Wrapped):
    taken = 0

    def prepare(self, hidden_states, routing, **named):
        if self.taken == 2:
            raise MoEError("no slot is free")
        self.taken += 1
        return self.inner.prepare(hidden_states, routing, **named)

    def finalize(self, expert_out, handle, routing, out):
        self.inner.finalize(expert_out, handle, routing, out)
        self.taken -= 1


@wrong("batched", "scales its payload wrongly", "input quantization", "rows")
class WrongScale(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        dispatched = self.inner.prepare(hidden_states, routing, **named)
        scale = dispatched.x_scale
        return attrs.evolve(dispatched, x_scale=None if scale is None else scale * 1.03)


@wrong("batched", "forgets the scales of its payload", "input quantization")
class NoScale(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        return attrs.evolve(self.inner.prepare(hidden_states, routing, **named), x_scale=None)


@wrong("local", "thinks that rows lie side by side", "strides")
class ContiguousRows(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        rows, hidden = hidden_states.shape
        whole = torch.empty(0, dtype=hidden_states.dtype).set_(hidden_states.untyped_storage())
        read = whole[hidden_states.storage_offset() :][: rows * hidden].view(rows, hidden)
        return self.inner.prepare(read, routing, **named)

    def expert_output(self, dispatched, out):
        return None


@wrong("local", "thinks that storage begins with the tensor", "strides")
class IgnoresOffset(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        read = hidden_states.as_strided(hidden_states.shape, hidden_states.stride(), 0)
        return self.inner.prepare(read, routing, **named)

    def expert_output(self, dispatched, out):
        return None


@wrong("local", "thinks that ids lie side by side", "strides")
class ContiguousIds(Wrapped):
    def prepare(self, hidden_states, routing, **named):
        def flat(tensor):
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            return whole[tensor.storage_offset() :][: tensor.numel()].view(tensor.shape)

        read = Routing(flat(routing.topk_ids), flat(routing.topk_weights))
        return self.inner.prepare(hidden_states, read, **named)


@wrong("local", "its split form rounds", "split form", split=True)
class SplitRounds(Wrapped):
    def finalize_start(self, expert_out, handle, routing, out):
        def receive():
            self.inner.finalize(expert_out, handle, routing, out)
            out.mul_(1 + 2 * torch.finfo(out.dtype).eps)

        return receive


@wrong("local", "its halves share one place", "split form", split=True)
class HalvesShare(Wrapped):
    def prepare_start(self, hidden_states, routing, **named):
        self.started = hidden_states, routing
        return lambda: self.inner.prepare(*self.started, **named)


@wrong("batched", "its split form never ends", "split form", "rows", "padding is not read", split=True)
class SplitNeverEnds(Wrapped):
    def finalize_start(self, expert_out, handle, routing, out):
        return lambda: None


@wrong("local", "leaves rows of nobody as they were", "out is written whole", "dropped ids")
class LeavesRows(Wrapped):
    def expert_output(self, dispatched, out):
        return None

    def finalize(self, expert_out, handle, routing, out):
        before = out.clone()
        self.inner.finalize(expert_out, handle, routing, out)
        nobody = (routing.topk_ids < 0).all(dim=1)
        out[nobody] = before[nobody]


@wrong("all_gather", "gives what is a copy of its neighbour's", "rows")
class NeighboursRow(Wrapped):
    def finalize(self, expert_out, handle, routing, out):
        self.inner.finalize(expert_out, handle, routing, out)
        out.copy_(out.roll(1, dims=0) + 1)


@wrong("local", "writes beside out", "out is written whole")
class WritesBeside(Wrapped):
    def finalize(self, expert_out, handle, routing, out):
        self.inner.finalize(expert_out, handle, routing, out)
        if out.storage_offset():
            out.as_strided((1,), (1,), out.storage_offset() - 1).zero_()


@wrong("batched", "takes an even H for granted", "rows")
class EvenHidden(Wrapped):
    def finalize(self, expert_out, handle, routing, out):
        self.inner.finalize(expert_out, handle, routing, out)
        out[:, out.shape[1] // 2 * 2 :].zero_()


@wrong("all_gather", "takes zeros from a lost rank", "faults")
class ZerosFromLost(Wrapped):
    def finalize(self, expert_out, handle, routing, out):
        try:
            self.inner.finalize(expert_out, handle, routing, out)
        except MoEError as error:
            if "did not come" not in str(error):
                raise
            out.zero_()


@wrong("batched", "orders by arrival", "determinism", "faults")
class ByArrival(Wrapped):
    """The first rank to arrive is served with the weights of its own order."""

    def finalize(self, expert_out, handle, routing, out):
        self.inner.finalize(expert_out, handle, routing, out)
        if self.size > 1 and getattr(self.inner.group, "_world", None) is not None:
            faults = self.inner.group._world.faults
            if faults.jitter or faults.delay:
                out.mul_(1 + 64 * torch.finfo(out.dtype).eps)
