"""Which experts of a plan run from which row bound on: measured where all contenders are known, else by priority."""

from __future__ import annotations

import json

import attrs
import pytest
import torch

import moe_core
from moe_core import ActivationFormat, Problem, UnsupportedError
from moe_core.kernel import MoEKernel
from moe_core.plugins import registry
from moe_core.ranges import choose_ranges
from moe_core.select import select
from moe_core.tuned import NOT_TUNED, Tuned, TunedFormat, TunedPoint
from moe_core.types import Routing


def experts(name, priority=0, version="1.0", **changes):
    made = registry().find("experts", "torch")
    capabilities = attrs.evolve(made.capabilities, **changes)
    return attrs.evolve(made, name=name, plugin=f"acme {version}", priority=priority, capabilities=capabilities)


DECODE, PREFILL, SPARE = experts("decode", 20), experts("prefill", 10), experts("spare", -1)


def measured(*points, failures=None):
    """`(rows, decode us, prefill us)` each."""
    return TunedFormat(
        tuple(
            TunedPoint(rows, {DECODE.label: decode, PREFILL.label: prefill}, failures or {})
            for rows, decode, prefill in points
        )
    )


def starts(ranges):
    return [(item.first_row, item.candidate.name) for item in ranges]


POINTS = measured((1, 10.0, 30.0), (16, 50.0, 50.5), (1024, 900.0, 500.0))


def test_the_fastest_runs_around_its_point_and_a_tie_goes_to_priority():
    ranges = choose_ranges([PREFILL, DECODE], POINTS)
    assert starts(ranges) == [(0, "decode"), (129, "prefill")]  # 128 = sqrt(16 · 1024)
    assert ranges[1].why == "measured at 1024 rows: decode 900.0 us, prefill 500.0 us"
    assert starts(choose_ranges([DECODE, experts("prefill", 30)], POINTS)) == [
        (0, "decode"),
        (5, "prefill"),  # at 16 rows it is 1 % slower, which is noise, and comes first
    ]


def test_without_a_time_of_each_contender_priorities_hold():
    assert starts(choose_ranges([DECODE, PREFILL], TunedFormat())) == [(0, "decode")]
    assert starts(choose_ranges([DECODE, PREFILL, experts("new", 5)], POINTS)) == [(0, "decode")]
    assert starts(choose_ranges([DECODE, experts("prefill", 10, "1.1")], POINTS)) == [(0, "decode")], "another version"


def test_a_failure_counts_as_measured_and_is_never_chosen():
    dead = experts("dead", 90)
    points = measured((1, 10.0, 30.0), (1024, 900.0, 500.0), failures={dead.label: "wrong result"})
    assert starts(choose_ranges([dead, DECODE, PREFILL], points)) == [(0, "decode"), (33, "prefill")]


def test_last_resorts_need_no_measurement_and_are_not_chosen_by_one():
    points = TunedFormat(
        tuple(attrs.evolve(p, microseconds={**p.microseconds, SPARE.label: 0.1}) for p in POINTS.points)
    )
    for known in (POINTS, points):
        assert starts(choose_ranges([SPARE, DECODE, PREFILL], known)) == [(0, "decode"), (129, "prefill")]
    assert starts(choose_ranges([SPARE], TunedFormat())) == [(0, "spare")]


@pytest.fixture
def problem(config):
    return Problem(config=config())


TUNED = Tuned({ActivationFormat.STANDARD: POINTS}, "/somewhere/layer.json", "2026-01-31")


def plan_with(problem, *candidates, tuned=NOT_TUNED, **asked):
    return select(problem, [registry().find("dispatch", "local")], candidates, tuned=tuned, **asked)


def test_plan_and_explanation_show_ranges_and_what_they_were_chosen_by(problem):
    plan = plan_with(problem, DECODE, PREFILL, tuned=TUNED)
    assert starts(plan.ranges) == [(0, "decode"), (129, "prefill")]
    assert [report.verdict for report in plan.reports] == ["chosen", "chosen"]
    text, data = plan.explain(), json.loads(json.dumps(plan.to_dict()))
    assert "ranges: times that moe-core tune measured on 2026-01-31 (/somewhere/layer.json)" in text
    assert "from 129 rows: prefill, measured at 1024 rows" in text
    assert [(item["first_row"], item["name"]) for item in data["experts"]] == [(0, "decode"), (129, "prefill")]
    assert data["ranges_by"] == plan.ranges_by
    by_priority = plan_with(problem, DECODE, PREFILL)
    assert "declared priorities; moe-core tune has not measured this layer here" in by_priority.explain()
    newer = plan_with(problem, DECODE, PREFILL, experts("new", 5), tuned=TUNED)
    assert "moe-core tune has not measured new (acme 1.0): run it again" in newer.explain()
    damaged = plan_with(problem, DECODE, tuned=Tuned(complaint="layer.json is damaged"))
    assert "layer.json is damaged" in damaged.explain()


def test_an_explicit_request_fixes_one(problem):
    plan = plan_with(problem, DECODE, PREFILL, tuned=TUNED, experts="decode")
    assert starts(plan.ranges) == [(0, "decode")]
    with pytest.raises(UnsupportedError):
        plan_with(problem, DECODE, experts("nowhere", device_types=frozenset({"cuda"})), experts="nowhere")


def test_experts_of_another_weight_layout_are_rejected_with_that_reason(problem):
    packed = experts("packed", 5, weight_layout={"unquantized": "tiles"})
    plan = plan_with(problem, DECODE, packed)
    (report,) = [report for report in plan.reports if report.experts == "packed"]
    assert report.verdict == "refused"
    assert report.rejections[0].reason == (
        "reads weights in layout 'tiles', and decode, which comes first, in 'canonical'; to run it alone, insist on "
        "experts = 'packed'"
    )
    assert plan_with(problem, DECODE, packed, experts="packed").weight_layout == "tiles"


def test_ranks_may_have_measured_differently(problem):
    plain, tuned = plan_with(problem, DECODE, PREFILL), plan_with(problem, DECODE, PREFILL, tuned=TUNED)
    assert plain.fingerprint() == tuned.fingerprint(), "measurements are not part of it"
    assert plain.advice() != tuned.advice(), "but told as advice, whose difference is a warning"
    assert plain.fingerprint() != plan_with(problem, DECODE).fingerprint(), "which backends there are, is"


def test_ranks_that_measured_differently_are_warned_and_run(config, on_ranks):
    def work(group):
        parallel = moe_core.MoEParallelConfig(ep_size=2, ep_rank=group.rank)
        tuned = TUNED if group.rank else NOT_TUNED
        return MoEKernel(plan_with(Problem(config=config(), parallel=parallel), DECODE, PREFILL, tuned=tuned), group)

    for warning in on_ranks(2, work, return_errors=True):
        assert isinstance(warning, UserWarning), "warnings are errors in these tests"
        assert "may cost speed but no numbers:\n  ranges of experts: rank 0 has [[0, 'decode (acme 1.0)']]" in str(
            warning
        )


def test_a_step_runs_the_experts_of_its_range(config):
    calls = []

    class Counted(moe_core.Experts):
        def __init__(self, name, made):
            self.name, self.made = name, made

        def workspace_shapes(self, *arguments):
            return self.made.workspace_shapes(*arguments)

        def apply(self, *arguments):
            calls.append(self.name)
            self.made.apply(*arguments)

    torch_factory = registry().find("experts", "torch").factory
    candidates = [
        attrs.evolve(item, factory=lambda *a, name=item.name: Counted(name, torch_factory(*a)))
        for item in (DECODE, PREFILL)
    ]
    layer = config()
    kernel = MoEKernel(plan_with(Problem(config=layer), *candidates, tuned=TUNED))
    runner = moe_core.build_runner(layer, device="cpu")
    torch.nn.init.normal_(runner.routed_experts.w13)
    torch.nn.init.normal_(runner.routed_experts.w2)
    for tokens in (1, 128, 129):
        routing = Routing(torch.randint(0, 6, (tokens, 2)), torch.rand(tokens, 2))
        kernel(torch.randn(tokens, 24), routing, runner.routed_experts.weights)
    assert calls == ["decode", "decode", "prefill"]
