"""Backends that work and declare themselves wrongly. Importing this adds them to the other mutants of their kind."""

from __future__ import annotations

import attrs
import torch

from moe_core.footprint import share_of_tokens
from moe_core.testing import registered
from moe_core.types import (
    BATCHED_EXPERTS_DUTIES,
    BATCHED_FINALIZE_DUTIES,
    ActivationFormat,
    Availability,
    Duty,
)
from moe_core.types import STANDARD_EXPERTS_DUTIES as STANDARD
from tests.conformance import dispatch_mutants, experts_mutants


def _not_bfloat16(problem):
    return "bfloat16 is not supported today" if problem.config.dtype is torch.bfloat16 else None


@dispatch_mutants.wrong("local", "refuses a dtype that it claims", "honest claims", refuse=_not_bfloat16)
class RefusesWhatItClaims(dispatch_mutants.Wrapped):
    pass


@dispatch_mutants.wrong("local", "refuses everything", "honest claims", refuse=lambda problem: "not today")
class RefusesEverything(dispatch_mutants.Wrapped):
    pass


def _one_row_less(base):
    def told(problem, payload, tokens):
        right = registered("dispatch", base).capabilities.footprint(problem, payload, tokens)
        return attrs.evolve(right, rows=right.rows - 1)

    return told


@dispatch_mutants.wrong("all_gather", "counts its rows wrongly", "footprint", footprint=_one_row_less("all_gather"))
@dispatch_mutants.wrong("batched", "counts its rows wrongly", "footprint", footprint=_one_row_less("batched"))
class CountsWrongly(dispatch_mutants.Wrapped):
    pass


def _nothing_moves(base):
    def told(problem, payload, tokens):
        right = registered("dispatch", base).capabilities.footprint(problem, payload, tokens)
        return attrs.evolve(right, dispatch_wire_bytes=1, combine_wire_bytes=1)

    return told


def _a_third_less_comes_back(problem, payload, tokens):
    right = registered("dispatch", "all_gather").capabilities.footprint(problem, payload, tokens)
    return attrs.evolve(right, combine_wire_bytes=right.combine_wire_bytes * 2 // 3)


@dispatch_mutants.wrong("batched", "says it moves nothing", "footprint", footprint=_nothing_moves("batched"))
@dispatch_mutants.wrong("all_gather", "says it moves nothing", "footprint", footprint=_nothing_moves("all_gather"))
@dispatch_mutants.wrong("all_gather", "forgets a part of the wire", "footprint", footprint=_a_third_less_comes_back)
class MovesMore(dispatch_mutants.Wrapped):
    pass


class FollowsRouting(dispatch_mutants.Wrapped):
    """No mutant by itself: R is what the routing sends here, and the footprint of what it wraps is its bound."""

    def prepare(self, hidden_states, routing, **named):
        d = self.inner.prepare(hidden_states, routing, **named)
        kept = (d.topk_ids >= 0).any(dim=1)
        scale = None if d.x_scale is None else d.x_scale[kept]
        ids, weights = d.topk_ids[kept], d.topk_weights[kept]
        return attrs.evolve(d, x=d.x[kept], x_scale=scale, topk_ids=ids, topk_weights=weights, handle=(d.handle, kept))

    def finalize(self, expert_out, handle, routing, out):
        inner, kept = handle
        whole = expert_out.new_zeros(len(kept), expert_out.shape[1])
        whole[kept] = expert_out
        self.inner.finalize(whole, inner, routing, out)

    def expert_output(self, dispatched, out):
        return None

    def release(self, handle):
        self.inner.release(handle[0])


def _in_the_mean(problem, payload, tokens):
    right = registered("dispatch", "all_gather").capabilities.footprint(problem, payload, tokens)
    return attrs.evolve(right, rows=int(right.rows * share_of_tokens(problem) / 2))


dispatch_mutants.wrong("all_gather", "bounds its rows by the mean", "footprint", footprint=_in_the_mean)(FollowsRouting)


def _no_extras(problem):
    return "no shared experts today" if problem.config.has_shared_experts else None


@dispatch_mutants.wrong("batched", "knows no shared experts", "one owner for each duty", refuse=_no_extras)
class NoSharedExperts(dispatch_mutants.Wrapped):
    pass


def _only_unquantized(problem):
    return None if problem.scheme.activation is None else "only unquantized rows today"


@dispatch_mutants.wrong("batched", "refuses a payload that it claims", "honest claims", refuse=_only_unquantized)
class RefusesAPayload(dispatch_mutants.Wrapped):
    pass


ONE_OWNER = "one owner for each duty"


def _owns_too(duty):
    return BATCHED_FINALIZE_DUTIES | {duty}


@dispatch_mutants.wrong("local", "owns the scale too", ONE_OWNER, owns=frozenset({Duty.ROUTED_SCALING}))
@dispatch_mutants.wrong("batched", "owns what pads", ONE_OWNER, owns=_owns_too(Duty.PADDING))
@dispatch_mutants.wrong("batched", "owns the biases too", ONE_OWNER, owns=_owns_too(Duty.EXPERT_BIAS))
class OwnsTooMuch(dispatch_mutants.Wrapped):
    pass


@dispatch_mutants.wrong("local", "refuses without a reason", "refusals", refuse=lambda problem: True)
class RefusesWithoutReason(dispatch_mutants.Wrapped):
    pass


def _raises(problem):
    raise KeyError("hidden_size")


@dispatch_mutants.wrong("local", "raises where it should answer", "refusals", refuse=_raises)
class RaisesInRefuse(dispatch_mutants.Wrapped):
    pass


_answers = iter(range(10**9))


@dispatch_mutants.wrong("local", "answers refuse by the weather", "refusals", refuse=lambda p: f"{next(_answers)}")
class ImpureRefuse(dispatch_mutants.Wrapped):
    pass


@dispatch_mutants.wrong("local", "its probe gives no reason", "honest claims", probe=lambda: Availability(False))
class ProbeWithoutReason(dispatch_mutants.Wrapped):
    pass


def _owning(duties):
    return {ActivationFormat.STANDARD: duties, ActivationFormat.BATCHED: BATCHED_EXPERTS_DUTIES}


@experts_mutants.wrong("torch", "owns no biases", ONE_OWNER, owns=_owning(STANDARD - {Duty.EXPERT_BIAS}))
@experts_mutants.wrong("torch", "owns no clamp", ONE_OWNER, owns=_owning(STANDARD - {Duty.ACTIVATION_CLAMP}))
@experts_mutants.wrong("torch", "owns the scale too", ONE_OWNER, owns=_owning(STANDARD | {Duty.ROUTED_SCALING}))
class WrongOwner(experts_mutants.Wrapped):
    pass


@experts_mutants.wrong("fp8_torch", "refuses everything", "honest claims", refuse=lambda problem: "not today")
@experts_mutants.wrong("torch", "refuses everything", "honest claims", refuse=lambda problem: "not today")
class ExpertsRefuseEverything(experts_mutants.Wrapped):
    pass


@experts_mutants.wrong("fp8_torch", "refuses without a reason", "refusals", refuse=lambda problem: True)
@experts_mutants.wrong("torch", "refuses without a reason", "refusals", refuse=lambda problem: True)
class ExpertsRefuseWithoutReason(experts_mutants.Wrapped):
    pass


@experts_mutants.wrong("torch", "its probe raises", "honest claims", probe=lambda: 1 / 0)
class ProbeRaises(experts_mutants.Wrapped):
    pass


@experts_mutants.wrong("torch", "its probe gives no reason", "honest claims", probe=lambda: Availability(False))
class ExpertsProbeWithoutReason(experts_mutants.Wrapped):
    pass
