"""Backends that compute rightly and hand over in a wrong form. Importing this adds them to the others of their kind."""

from __future__ import annotations

import attrs

from tests.conformance import dispatch_mutants, experts_mutants

FORM = "shapes and dtypes"


def _delivers(base, name, duty, change):
    def prepare(self, *arguments, **named):
        return change(self.inner.prepare(*arguments, **named))

    kind = type("IllFormed", (dispatch_mutants.Wrapped,), {"prepare": prepare})
    dispatch_mutants.wrong(base, name, duty)(kind)


_delivers("all_gather", "delivers a tuple", FORM, lambda d: (d.x, d.topk_ids, d.topk_weights))
_delivers("local", "delivers a column too few", FORM, lambda d: attrs.evolve(d, x=d.x[:, 1:]))
_delivers("local", "delivers ids without K", FORM, lambda d: attrs.evolve(d, topk_ids=d.topk_ids[:, 0]))
_delivers("local", "delivers weights in bf16", FORM, lambda d: attrs.evolve(d, topk_weights=d.topk_weights.bfloat16()))
_delivers("batched", "delivers a column too few", FORM, lambda d: attrs.evolve(d, x=d.x[..., 1:]))
_delivers("batched", "delivers no counts", "tokens_per_expert", lambda d: attrs.evolve(d, tokens_per_expert=None))


@experts_mutants.wrong("fp8_torch", "returns what it should write", "out is written whole")
@experts_mutants.wrong("torch", "returns what it should write", "out is written whole")
class ReturnsOut(experts_mutants.Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        result = out.clone()
        self.inner.apply(dispatched, weights, workspaces, result)
        return result
