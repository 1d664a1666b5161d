"""The kit is itself tested: a backend that is wrong in exactly one way fails, and the report names what it broke."""

from __future__ import annotations

import functools

import attrs
import pytest

from moe_core.testing import Case, dispatch_bench, registered, run_case
from moe_core.testing.dispatch import dispatch_cases
from moe_core.testing.experts import experts_cases
from moe_core.testing.quant import quant_cases
from moe_core.testing.runner import runner_cases
from tests.conformance import (
    declaration_mutants,
    dispatch_mutants,
    experts_mutants,
    flight_mutants,
    form_mutants,
    quant_mutants,
    router_mutants,
    runner_mutants,
)
from tests.conformance.kill import survivors
from tests.conformance.mutant import named

assert declaration_mutants.__doc__, "imported for what it adds to the two lists that it names"
assert form_mutants.__doc__, "so is this"
assert flight_mutants.__doc__, "and this"
KINDS = {
    "dispatch": dispatch_mutants,
    "experts": experts_mutants,
    "quant": quant_mutants,
    "router": router_mutants,
    "runner": runner_mutants,
}
NEEDS_A_GPU = {"a CUDA graph, 1 rank", "standard: a CUDA graph", "batched: a CUDA graph"}
"""Cases that say nothing on a CPU, so that no mutant can fail them there."""
FULL = {
    "dispatch:batched": lambda ranks: dispatch_cases(registered("dispatch", "batched"), ranks=ranks),
    "experts:torch": lambda ranks: experts_cases(registered("experts", "torch")),
    "quant:fp8_channel": lambda ranks: quant_cases(registered("scheme", "fp8_channel")),
    "router:sigmoid": lambda ranks: router_mutants.cases_of(router_mutants.Wrapped),
    "runner:default": lambda ranks: runner_cases(registered("runner", "default")),
    "dispatch:all_gather": lambda ranks: dispatch_cases(registered("dispatch", "all_gather"), ranks=ranks),
    "experts:fp8_torch": lambda ranks: experts_cases(registered("experts", "fp8_torch")),
}


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that skips a collective lets the other ranks wait for as long as the kit is patient."""
    monkeypatch.setattr(dispatch_bench, "TIMEOUT_S", 2.0)


@named([mutant for module in KINDS.values() for mutant in module.MUTANTS])
def test_a_mutant_is_caught_and_its_duty_named(mutant):
    result = mutant.caught()
    assert result is not None, f"no failure names any of {mutant.duties}"
    assert result.text, "the report says what was wrong"


def test_there_are_mutants_of_every_kind():
    assert all(len(module.MUTANTS) >= 20 for module in KINDS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_wrapper_of_the_mutants_is_no_mutant(kind):
    """So what kills a mutant is its mutation."""
    neutral = {
        "dispatch": lambda: dispatch_mutants.cases_of("batched", dispatch_mutants.Wrapped, {}, ranks=1),
        "experts": lambda: experts_mutants.cases_of("torch", experts_mutants.Wrapped, {}),
        "quant": lambda: quant_mutants.cases_of("fp8_channel", quant_mutants.Wrapped, {}),
        "router": lambda: router_mutants.cases_of(router_mutants.Wrapped),
        "runner": lambda: runner_cases(type("Derived", (runner_mutants.Runner,), {})),
    }
    for case in neutral[kind]():
        result = run_case(case)
        assert not result.bad, f"{case.name}: {result.duty}: {result.text}"


def test_layers_that_share_their_slots_conform_if_they_say_so():
    cases = dispatch_mutants.cases_of("batched", flight_mutants.OverAllLayers, flight_mutants.SHARED)
    asked = [case for case in cases if case.duty in ("calls in flight", "no state between layers", "release")]
    assert sum(case.name.startswith("two layers") for case in asked) == 4
    for case in asked:
        assert not run_case(case).bad, f"{case.name}: {run_case(case).text}"


def test_rows_that_follow_the_routing_have_a_bound_too():
    cases = dispatch_mutants.cases_of("all_gather", declaration_mutants.FollowsRouting, {})
    asked = [case for case in cases if case.duty == "footprint" or case.name.startswith(("delivered", "numbers: ids"))]
    assert sum(case.duty == "footprint" for case in asked) == 7
    for case in asked:
        assert not run_case(case).bad, run_case(case).text


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=[pytest.mark.full] if name in ("dispatch:all_gather", "experts:fp8_torch") else [])
        for name in FULL
    ],
)
def test_every_case_is_killed_by_some_mutant(backend):
    """A case that no mutant fails asks nothing. Of what is not on this machine, the reason is written above."""
    cases: list[Case] = FULL[backend](2)
    alive = survivors(cases, KINDS[backend.partition(":")[0]].MUTANTS)
    assert set(alive) <= NEEDS_A_GPU


@pytest.mark.full
@pytest.mark.parametrize("name", ["batched", "all_gather"])
def test_every_case_on_three_and_four_ranks_is_killed_too(name):
    cases = [case for case in FULL[f"dispatch:{name}"](4) if not case.name.endswith((", 1 rank", ", 2 ranks"))]
    mutants = [
        attrs.evolve(mutant, cases=functools.partial(mutant.cases, ranks=4)) for mutant in dispatch_mutants.MUTANTS
    ]
    assert set(survivors(cases, mutants)) <= NEEDS_A_GPU


def test_a_full_backend_is_asked_at_least_150_questions():
    for backend in ("dispatch:batched", "experts:torch", "experts:fp8_torch"):
        cases = FULL[backend](4)
        assert len(cases) >= 150
        assert len({case.name for case in cases}) == len(cases)


def test_the_same_cases_each_time():
    for make in FULL.values():
        assert [case.name for case in make(2)] == [case.name for case in make(2)]
