"""Routers that are wrong in one way each, as thin wrappers around `sigmoid`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from moe_core.interfaces import Router
from moe_core.testing import registered
from moe_core.testing.router import router_cases
from moe_core.types import Duty, Routing
from tests.conformance.mutant import Mutant


def sigmoid_reference(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    scores = logits.sigmoid()
    return scores.where(scores >= scores.topk(top_k, dim=1).values[:, -1:], torch.zeros_like(scores))


class Wrapped(Router):
    """A router around another one; a mutant overrides one step."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def select_experts(self, router_logits, correction_bias=None):
        return self.inner.select_experts(router_logits, correction_bias)


MUTANTS: list[Mutant] = []


def wrong(name: str, *duties: str, **changes: Any) -> Callable[[type[Wrapped]], type[Wrapped]]:
    def register(kind: type[Wrapped]) -> type[Wrapped]:
        MUTANTS.append(Mutant(name, duties, functools.partial(cases_of, kind, **changes)))
        return kind

    return register


def cases_of(kind: Callable[..., Any], *, factory: Any = None) -> list[Any]:
    inner = registered("router", "sigmoid")
    return router_cases(factory or (lambda config: kind(inner(config))), reference=sigmoid_reference)


def changed(routing: Routing, *, ids: Any = None, weights: Any = None) -> Routing:
    return Routing(routing.topk_ids if ids is None else ids, routing.topk_weights if weights is None else weights)


@wrong("is none", "a step runs", factory=lambda config: None)
class NoRouter(Wrapped):
    pass


@wrong("weights in the logits' dtype", "shapes and dtypes", "routing")
class LowWeights(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        made = self.inner.select_experts(router_logits, correction_bias)
        return changed(made, weights=made.topk_weights.to(router_logits.dtype))


@wrong("ids in int16", "shapes and dtypes", "routing")
class ShortIds(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        made = self.inner.select_experts(router_logits, correction_bias)
        return changed(made, ids=made.topk_ids.short())


@wrong("computes in the logits' dtype", "routing", "router weight")
class LowMathematics(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        made = self.inner.select_experts(router_logits, correction_bias)
        return changed(made, weights=made.topk_weights.to(router_logits.dtype).float() * 1.0)


@wrong("gives the weights in another order than the ids", "router weight")
class OtherOrder(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        made = self.inner.select_experts(router_logits, correction_bias)
        return changed(made, ids=made.topk_ids.flip(1)) if made.topk_ids.shape[1] > 1 else made


@wrong("counts from one", "routing")
class CountsFromOne(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        made = self.inner.select_experts(router_logits, correction_bias)
        return changed(made, ids=made.topk_ids + 1)


@wrong("chooses an expert twice", "duplicate ids", "routing")
class Twice(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        made = self.inner.select_experts(router_logits, correction_bias)
        return changed(made, ids=made.topk_ids[:, :1].expand_as(made.topk_ids).clone())


@wrong("fails without tokens", "empty steps")
class FailsOnEmpty(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        router_logits.amax()
        return self.inner.select_experts(router_logits, correction_bias)


@wrong("writes the logits", "read-only inputs")
class WritesLogits(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        made = self.inner.select_experts(router_logits, correction_bias)
        router_logits.mul_(1)
        return made


@wrong("writes the bias", "read-only inputs")
class WritesBias(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        if correction_bias is not None:
            correction_bias.sub_(correction_bias.mean())
        return self.inner.select_experts(router_logits, correction_bias)


@wrong("gives out one buffer", "read-only inputs")
class OneBuffer(Wrapped):
    buffer = None

    def select_experts(self, router_logits, correction_bias=None):
        made = self.inner.select_experts(router_logits, correction_bias)
        if self.buffer is None or self.buffer.shape != made.topk_weights.shape:
            self.buffer = made.topk_weights.clone()
        self.buffer.copy_(made.topk_weights)
        return changed(made, weights=self.buffer)


@wrong("other bits each time", "determinism")
class NotDeterministic(Wrapped):
    calls = 0

    def select_experts(self, router_logits, correction_bias=None):
        made = self.inner.select_experts(router_logits, correction_bias)
        self.calls += 1
        return changed(made, weights=made.topk_weights * (1 + 3e-7 * (self.calls % 2)))


@wrong("adapts to the last step", "no state between steps")
class Adapts(Wrapped):
    last = 0

    def select_experts(self, router_logits, correction_bias=None):
        made = self.inner.select_experts(router_logits, correction_bias)
        weights = made.topk_weights * (1 + 1e-5 * (self.last not in (0, router_logits.shape[0])))
        self.last = router_logits.shape[0]
        return changed(made, weights=weights)


_last_experts: list[int] = []


@wrong("shares state between routers", "no state between layers")
class SharesState(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        made = self.inner.select_experts(router_logits, correction_bias)
        other = bool(_last_experts) and _last_experts[-1] != router_logits.shape[1]
        _last_experts[:] = [router_logits.shape[1]]
        return changed(made, weights=made.topk_weights * (1 + 1e-5 * other))


@wrong("normalizes over the batch", "rows", "router weight")
class OverTheBatch(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        made = self.inner.select_experts(router_logits, correction_bias)
        return changed(made, weights=made.topk_weights / max(made.topk_weights.shape[0], 1) ** 0.01)


@wrong("thinks that logits lie side by side", "strides")
class ContiguousLogits(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        whole = torch.empty(0, dtype=router_logits.dtype).set_(router_logits.untyped_storage())
        read = whole[: router_logits.numel()].view(router_logits.shape)
        return self.inner.select_experts(read, correction_bias)


@wrong("overflows", "routing")
class Overflows(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        made = self.inner.select_experts(router_logits, correction_bias)
        return changed(made, weights=made.topk_weights + 0 * router_logits.float().exp().sum(1, keepdim=True))


@wrong("divides by the spread of the logits", "routing", "router weight")
class DividesBySpread(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        made = self.inner.select_experts(router_logits, correction_bias)
        spread = router_logits.float().amax(1, keepdim=True) - router_logits.float().amin(1, keepdim=True)
        return changed(made, weights=made.topk_weights * spread / spread) if len(router_logits) else made


@wrong("weighs with the bias", "correction bias")
class WeighsWithBias(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        made = self.inner.select_experts(router_logits, correction_bias)
        if correction_bias is None:
            return made
        return changed(made, weights=made.topk_weights + correction_bias[made.topk_ids])


@wrong("ignores the bias", "correction bias")
class IgnoresBias(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        return self.inner.select_experts(router_logits, None)


@wrong("fails with any bias", "correction bias", "read-only inputs")
class FailsWithBias(Wrapped):
    def select_experts(self, router_logits, correction_bias=None):
        assert correction_bias is None
        return self.inner.select_experts(router_logits, None)


@wrong("owns what it can't", "honest claims")
class OwnsTooMuch(Wrapped):
    owns = frozenset({Duty.CROSS_RANK_REDUCE})


@wrong("routes otherwise on its device", "routing")
class OtherOnDevice(Wrapped):
    def for_device(self, device, num_experts):
        return CountsFromOne(self.inner)


def _deaf(config: Any) -> Any:
    """Reads no parameter, so it misses a misspelt one."""
    from moe_core.config import RouterSpec

    class Deaf:
        top_k, num_experts, router = config.top_k, config.num_experts, RouterSpec.of("sigmoid")

    return registered("router", "sigmoid")(Deaf)


@wrong("takes any parameter", "refusals", factory=_deaf)
class TakesAnyParameter(Wrapped):
    pass
