"""Backends that work and declare themselves wrongly. Importing this adds them to the other mutants of their kind."""

from __future__ import annotations

import attrs
import torch

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


def _one_row_more(problem, payload, tokens):
    told = registered("dispatch", "batched").capabilities.footprint(problem, payload, tokens)
    return attrs.evolve(told, rows=told.rows + 1)


@dispatch_mutants.wrong("batched", "counts its memory wrongly", "footprint", footprint=_one_row_more)
class CountsWrongly(dispatch_mutants.Wrapped):
    pass


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
