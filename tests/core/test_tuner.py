"""The tuner: right before timed, stored at once, dead candidates named, interrupted runs continued."""

from __future__ import annotations

import functools
import time
from typing import ClassVar

import attrs
import pytest
import torch

import moe_core
from moe_core import timing, tuned, tuner
from moe_core.builtin.torch_experts import TorchExperts
from moe_core.plugins import registry
from moe_core.tuned import read_tuned
from moe_core.tuner import DeviceLostError, Tuner, nothing_to_tune

CPU = torch.device("cpu")


class Slow(TorchExperts):
    """Right, and slower than the built-in: by far."""

    def apply(self, *arguments):
        time.sleep(0.02)
        super().apply(*arguments)


class Searching(TorchExperts):
    """Takes {"ms": n} as launch parameters and sleeps so long; 13 breaks it."""

    tried: ClassVar[list] = []

    def __init__(self, config, parallel):
        super().__init__(config, parallel)
        self.table = ()

    def launch_search(self, rows, activation_format, weights):
        times = yield [{"ms": 30}, {"ms": 13}, {"ms": 5}]
        Searching.tried.append(times)
        assert times[1] == float("inf"), "parameters that can't run are told so"
        times = yield [{"ms": 1}]
        Searching.tried.append(times)

    def use_launch(self, table):
        self.table = tuple(table)

    def apply(self, *arguments):
        ms = self.table[0][1]["ms"] if self.table else 30
        if ms == 13:
            raise ValueError("these parameters do not fit")
        time.sleep(ms / 1000)
        super().apply(*arguments)


class Wrong(TorchExperts):
    def apply(self, dispatched, weights, workspaces, out):
        super().apply(dispatched, weights, workspaces, out)
        out.mul_(1.01)


class Breaking(TorchExperts):
    """What a kernel that reads beyond its memory looks like from the host."""

    def apply(self, *arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Idle(TorchExperts):
    """Writes nothing, so that its result is what lies in memory: another backend's, perhaps."""

    def apply(self, *arguments):
        pass


class Interrupted(TorchExperts):
    def apply(self, *arguments):
        raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(tuner, "host_us", functools.partial(timing.host_us, rounds=2, at_least_s=0))
    Searching.tried = []
    return tmp_path


@pytest.fixture
def planned(config, plugin):
    """`planned(name=class, …)`: a plan in which these experts stand beside the built-in's."""

    def make(**classes):
        capabilities = registry().find("experts", "torch").capabilities
        for name, cls in classes.items():
            plugin(name, experts=(name, lambda c, p, *_, cls=cls: cls(c, p), capabilities))
        return moe_core.plan(config(), device="cpu")

    return make


def label(name):
    return registry().experts[name].label


def test_ranges_come_from_times_of_right_results(planned, config):
    plan = planned(a_slow=Slow)
    assert plan.ranges[0].candidate.name == "a_slow", "equal priorities go by name"
    said = []
    found = Tuner(plan, CPU, tell=said.append).run([1, 8])
    assert [point.rows for point in found.of(plan.activation_format).points] == [1, 8]
    point = found.of(plan.activation_format).points[0]
    assert point.microseconds[label("a_slow")] > 20e3 > point.microseconds[label("torch")] > 0
    now = moe_core.plan(config(), device="cpu")
    assert [item.candidate.name for item in now.ranges] == ["torch"]
    assert f"measured on {found.date}" in now.explain()
    assert [line.split(" ")[:4] for line in said[:2]] == [["T", "=", "1:", "a_slow"], ["T", "=", "1:", "torch"]]


def test_the_best_launch_parameters_are_found_stored_and_used(planned, config):
    plan = planned(search=Searching)
    Tuner(plan, CPU).run([4])
    assert [len(times) for times in Searching.tried] == [3, 1]
    measured = read_tuned(plan.problem).of(plan.activation_format)
    assert measured.launch == {label("search"): ((4, {"ms": 1}),)}
    assert measured.points[0].microseconds[label("search")] < 5e3, "it is timed with what was found"
    runner = moe_core.build_runner(config(), experts="search", device="cpu")
    assert runner.kernel.experts[0].table == ((4, {"ms": 1}),)


def test_without_a_search_the_parameters_stay(planned):
    plan = planned(search=Searching)
    Tuner(plan, CPU, search=False).run([4])
    assert Searching.tried == []
    assert read_tuned(plan.problem).of(plan.activation_format).launch == {}


def test_a_wrong_result_gets_no_time_and_the_others_do(planned):
    said = []
    point = Tuner(planned(bad=Wrong), CPU, tell=said.append).run([5]).of(moe_core.ActivationFormat.STANDARD).points[0]
    assert "wrong result: relative error 1.0e-02" in point.failures[label("bad")]
    assert set(point.microseconds) == {label("torch")}
    assert any("bad skipped: MoEError: wrong result" in line for line in said)


def test_what_failed_without_harm_is_tried_again(planned, monkeypatch):
    plan = planned(bad=Wrong)
    assert label("bad") in Tuner(plan, CPU).run([5]).of(plan.activation_format).points[0].failures
    monkeypatch.setattr(Wrong, "apply", TorchExperts.apply)
    point = Tuner(plan, CPU).run([5]).of(plan.activation_format).points[0]
    assert label("bad") in point.microseconds
    assert point.failures == {}


@pytest.mark.parametrize("dispatch", ["local", "batched"])
def test_what_others_left_in_memory_is_no_result(planned, config, dispatch):
    planned(zz_idle=Idle)
    plan = moe_core.plan(config(), dispatch=dispatch, device="cpu")
    point = Tuner(plan, CPU).run([5]).of(plan.activation_format).points[0]
    assert "wrong result" in point.failures[label("zz_idle")]


def test_a_broken_device_ends_the_run_and_the_next_goes_on_after_it(planned, monkeypatch):
    plan = planned(a_break=Breaking)
    monkeypatch.setattr(tuner, "_is_lost", lambda device: True)
    with pytest.raises(DeviceLostError, match=r"experts a_break at T = 2 .* run the command again"):
        Tuner(plan, CPU).run([2])
    point = Tuner(plan, CPU).run([2]).of(plan.activation_format).points[0]
    assert "illegal memory access" in point.failures[label("a_break")]
    assert set(point.microseconds) == {label("torch")}


def test_an_interrupted_run_keeps_what_it_has_and_blames_nobody(planned):
    plan = planned(zz_stop=Interrupted)
    with pytest.raises(KeyboardInterrupt):
        Tuner(plan, CPU).run([3])
    point = read_tuned(plan.problem).of(plan.activation_format).points[0]
    assert set(point.microseconds) == {label("torch")}
    assert point.failures == {}


def test_what_is_known_is_not_measured_again_unless_asked(planned, monkeypatch):
    plan = planned(a_slow=Slow)
    first = Tuner(plan, CPU).run([1])
    monkeypatch.setattr(tuner, "host_us", lambda calls: 7.0)
    steps = []
    assert Tuner(plan, CPU).run([1], lambda: steps.append(1)) == first
    assert steps == [1]
    assert Tuner(plan, CPU, again=True).run([1]).of(plan.activation_format).points[0].microseconds == {
        label("a_slow"): 7.0,
        label("torch"): 7.0,
    }


def test_batched_and_quantized_layers_are_measured_by_their_own_truth(config, plugin, monkeypatch):
    monkeypatch.setattr(tuner, "host_us", lambda calls: float(len(calls)))
    batched = moe_core.plan(config(), dispatch="batched", device="cpu")
    assert Tuner(batched, CPU).run([3]).of(batched.activation_format).points[0].failures == {}
    bounded = moe_core.plan(config(max_tokens_per_rank=10), dispatch="batched", device="cpu")
    points = Tuner(bounded, CPU).run([2, 7]).of(bounded.activation_format).points
    assert [point.rows for point in points] == [3, 10], "the key is the row bound that a step will have"
    sizes = {"hidden_size": 128, "intermediate_size": 128}
    for scheme in ("fp8_block", "fp8_tensor_dynamic", "nvfp4_w4a4"):
        plan = moe_core.plan(config(**sizes), scheme=scheme, device="cpu")
        point = Tuner(plan, CPU).run([40]).of(plan.activation_format).points[0]
        assert point.failures == {}, scheme


def test_biases_clamps_and_transposed_weights(config, monkeypatch):
    monkeypatch.setattr(tuner, "host_us", lambda calls: 1.0)
    spec = moe_core.ActivationSpec("swiglu_oai", moe_core.GateUpLayout.INTERLEAVED, limit=7.0, bias=True)
    plan = moe_core.plan(config(activation=spec), device="cpu")
    assert Tuner(plan, CPU, transposed=True).run([6]).of(plan.activation_format).points[0].failures == {}


def test_nothing_to_tune_says_so(planned, config):
    assert "no experts but torch come into question" in nothing_to_tune(moe_core.plan(config(), device="cpu"))
    assert nothing_to_tune(planned(search=Searching)) == ""
    assert nothing_to_tune(attrs.evolve(moe_core.plan(config(), experts="search", device="cpu"))) == ""


def test_what_a_search_may_ask_for_is_known_before_it_runs(config):
    class Branching(TorchExperts):
        def launch_search(self, rows, activation_format, weights):
            times = yield ["a", "b", "c"]
            yield [f"{name}{rows}" for name in "abc" if times["abc".index(name)] == min(times)]
            if self.fails:
                raise ValueError

    experts, layout = Branching(config(), moe_core.MoEParallelConfig()), moe_core.ActivationFormat.STANDARD
    for experts.fails in (False, True):
        assert tuner._rehearsed(experts, 7, layout, None) == ["a", "b", "c", "a7", "c7"]
    assert tuner._rehearsed(TorchExperts(config(), moe_core.MoEParallelConfig()), 7, layout, None) == []
