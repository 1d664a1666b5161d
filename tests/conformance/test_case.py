"""Cases, results, reports, known failures, pairs, and guarded memory: the parts of the kit."""

from __future__ import annotations

import itertools
import json

import attrs
import pytest
import torch

from moe_core.testing import Case, Outcome, Skip, Tier, Violation, run_case, run_cases
from moe_core.testing.compare import Guarded, Truth, Untouched, check_numbers
from moe_core.testing.pairwise import pairwise


def case(check, name="a case", duty="rows", tier=Tier.REQUIRED):
    return Case(name, duty, tier, "every backend", check)


def fails():
    raise Violation("router weight", "it was not applied")


def skips():
    raise Skip("not here")


def breaks():
    raise KeyError("hidden_size")


@pytest.mark.parametrize(
    ("check", "outcome", "duty", "text"),
    [
        (lambda: None, Outcome.PASSED, "rows", ""),
        (fails, Outcome.FAILED, "router weight", "it was not applied"),
        (breaks, Outcome.FAILED, "rows", "raised KeyError: 'hidden_size'"),
        (skips, Outcome.SKIPPED, "rows", "not here"),
    ],
)
def test_what_comes_of_a_case(check, outcome, duty, text):
    result = run_case(case(check))
    assert (result.outcome, result.duty) == (outcome, duty)
    assert result.text.startswith(text)


def test_uninitialised_memory_is_nan_in_a_case_and_the_modes_are_restored():
    seen = []
    run_case(case(lambda: seen.append((torch.empty(4), torch.get_num_threads()))))
    assert seen[0][0].isnan().all()
    assert seen[0][1] == 1
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_known_failure_is_strict_and_needs_a_case_and_a_reason():
    known = {"a case": "mended in 0.2"}
    assert run_case(case(fails), known).outcome is Outcome.XFAILED
    passed = run_case(case(lambda: None), known)
    assert passed.outcome is Outcome.XPASSED
    assert passed.bad
    assert run_case(case(skips), known).outcome is Outcome.SKIPPED
    with pytest.raises(ValueError, match="xfail names the case 'another'"):
        run_cases([case(fails)], "x", "cpu", xfail={"another": "why"})
    with pytest.raises(ValueError, match="gives no reason"):
        run_cases([case(fails)], "x", "cpu", xfail={"a case": " "})


def test_a_report_counts_by_duty_and_tier_and_is_json():
    cases = [case(lambda: None), case(fails, "b"), case(skips, "c"), case(lambda: None, "d", tier=Tier.OPTIONAL)]
    told = []
    report = run_cases(cases, "dispatch x", "cpu", each=told.append)
    assert [result.case.name for result in told] == ["a case", "b", "c", "d"]
    assert report.verdict == "fails"
    rows = {(row["duty"], row["tier"]): row for row in report.rows()}
    assert rows["router weight", "required"]["failed"] == 1
    assert (rows["rows", "required"]["passed"], rows["rows", "required"]["skipped"]) == (1, 1)
    assert rows["rows", "optional"]["passed"] == 1
    shown = json.loads(json.dumps(report.to_dict()))
    assert [entry["outcome"] for entry in shown["cases"]] == ["passed", "failed", "skipped", "passed"]
    assert "| router weight | required | 0 | 1 |" in report.markdown()


def test_a_verdict_needs_a_case_that_computed():
    says = case(lambda: None, duty="honest claims")
    assert run_cases([says, case(skips, "b")], "x", "cpu").verdict == "not exercised"
    assert run_cases([says, case(lambda: None, "b")], "x", "cpu").verdict == "conforms"


def test_every_pair_meets_in_far_fewer_rows_than_the_product():
    axes = {"a": [1, 2, 3], "b": list("xyzw"), "c": [True, False], "d": [None, 0, 1]}
    rows = pairwise(axes)
    for (a, first), (b, second) in itertools.combinations(axes.items(), 2):
        met = {(row[a], row[b]) for row in rows}
        assert met == set(itertools.product(first, second))
    assert len(rows) <= 20
    assert rows == pairwise(axes), "the same each time"


def test_pairs_that_may_not_meet_are_left_out_and_the_others_still_meet():
    axes = {"gated": [True, False], "limit": [None, 7.0], "dtype": ["fp32", "bf16", "fp16"]}
    rows = pairwise(axes, lambda row: row["gated"] or row["limit"] is None)
    assert all(row["gated"] or row["limit"] is None for row in rows)
    assert {(row["gated"], row["dtype"]) for row in rows} == set(itertools.product([True, False], axes["dtype"]))
    assert {(row["limit"], row["dtype"]) for row in rows} == set(itertools.product([None, 7.0], axes["dtype"]))


def test_numbers_are_held_to_roundings_of_the_size_of_a_row():
    truth = Truth.of(torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64))
    near = torch.tensor([[1.0, 2.0 + 2**-22], [0.0, 0.0]])
    check_numbers(near, truth, duty="rows", steps=4)
    for wrong in ([[1.0, 2.1], [0, 0]], [[1.0, 2.0], [0, 1e-30]], [[torch.nan, 2.0], [0, 0]]):
        with pytest.raises(Violation):
            check_numbers(torch.tensor(wrong), truth, duty="rows", steps=4)


def test_an_explanation_names_the_duty_where_it_gives_what_came_out():
    truth = Truth.of(torch.ones(2, 3, dtype=torch.float64))
    others = {
        "duplicate ids: once": lambda: torch.full((2, 3), 0.5, dtype=torch.float64),
        "router weight: twice": lambda: torch.full((2, 3), 2.0, dtype=torch.float64),
    }
    with pytest.raises(Violation, match=r"twice: .*1 of 2 rows are wrong; row 1") as caught:
        check_numbers(torch.tensor([[1.0] * 3, [2.0] * 3]), truth, duty="rows", steps=4, explanations=others)
    assert caught.value.duty == "router weight"
    with pytest.raises(Violation) as caught:
        check_numbers(torch.full((2, 3), 3.0), truth, duty="expert map", steps=4, explanations=others)
    assert caught.value.duty == "expert map"


def test_guards_see_a_byte_on_either_side_and_between_rows():
    for place in (-1, 12):
        memory = Guarded((3, 4), torch.float32, torch.device("cpu"))
        memory.check("workspaces", "w")
        memory.tensor.as_strided((1,), (1,), memory.tensor.storage_offset() + place).fill_(1.0)
        with pytest.raises(Violation, match="4 bytes outside of w"):
            memory.check("workspaces", "w")
    padded = Guarded((3, 4), torch.float32, torch.device("cpu"), pad=2)
    assert padded.tensor.isnan().all()
    padded.tensor.fill_(1.0)
    padded.check("out", "out")
    padded.tensor.as_strided((1,), (1,), padded.tensor.storage_offset() + 5).fill_(1.0)
    with pytest.raises(Violation):
        padded.check("out", "out")


def test_untouched_sees_values_versions_and_what_lies_between_rows():
    def change(work, text):
        whole = torch.zeros(3, 8)
        view = whole[:, :4]
        seen = Untouched(x=view)
        work(whole, view)
        with pytest.raises(Violation, match=text):
            seen.check("apply")

    change(lambda whole, view: view.add_(1), "apply wrote into x")
    change(lambda whole, view: view.mul_(1), "the same values into x")
    change(lambda whole, view: whole[:, 6].fill_(1.0), "apply wrote into x")
    quiet = Untouched(x=torch.full((2, 2), torch.nan))
    quiet.check("apply")


def test_what_follows_a_case_that_opens_is_not_asked_if_it_fails():
    asked = []
    opening = attrs.evolve(case(fails, "one step runs"), opens=True)
    cases = [case(lambda: None, "before"), opening, case(lambda: asked.append(1), "after")]
    report = run_cases(cases, "x", "cpu")
    assert [result.outcome for result in report.results] == [Outcome.PASSED, Outcome.FAILED, Outcome.SKIPPED]
    assert report.results[-1].text == "'one step runs' failed; what follows is asked when it passes"
    assert not asked
    run_cases(cases, "x", "cpu", xfail={"one step runs": "with 0.2"})
    assert asked, "a failure that is known is no reason to stop"
