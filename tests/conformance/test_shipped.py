"""Every shipped backend passes the kit. A whole test module of an author's own looks like one of these classes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import moe_core
from moe_core.testing import (
    ExpertsConformance,
    PrepareFinalizeConformance,
    QuantMethodConformance,
    RouterConformance,
    RunnerConformance,
    registered,
    run_cases,
    suites,
)


class TestLocal(PrepareFinalizeConformance):
    ranks = 2

    def backend(self):
        return registered("dispatch", "local")


class TestAllGather(PrepareFinalizeConformance):
    ranks = 2

    def backend(self):
        return registered("dispatch", "all_gather")


class TestBatched(PrepareFinalizeConformance):
    ranks = 3

    def backend(self):
        return registered("dispatch", "batched")


class TestTorchExperts(ExpertsConformance):
    def backend(self):
        return registered("experts", "torch")


class TestTritonExperts(ExpertsConformance):
    """Its declaration everywhere; its numbers where there is a GPU."""

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def backend(self):
        return registered("experts", "triton")


class TestFp8Experts(ExpertsConformance):
    def backend(self):
        return registered("experts", "fp8_torch")


class TestNvfp4Experts(ExpertsConformance):
    def backend(self):
        return registered("experts", "nvfp4_torch")


class TestUnquantized(QuantMethodConformance):
    def backend(self):
        return registered("scheme", "unquantized")


class TestFp8Block(QuantMethodConformance):
    def backend(self):
        return registered("scheme", "fp8_block")


class TestFp8Channel(QuantMethodConformance):
    def backend(self):
        return registered("scheme", "fp8_channel")


class TestFp8Tensor(QuantMethodConformance):
    def backend(self):
        return registered("scheme", "fp8_tensor")


class TestNvfp4(QuantMethodConformance):
    def backend(self):
        return registered("scheme", "nvfp4_w4a4")


def chosen(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """The scores of the K best of each row, zero elsewhere."""
    return scores.where(scores >= scores.topk(top_k, dim=1).values[:, -1:], torch.zeros_like(scores))


def softmax(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    return chosen(logits.softmax(dim=1), top_k)


def softmax_of_chosen(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    kept = chosen(logits.softmax(dim=1), top_k) > 0
    return logits.masked_fill(~kept, -torch.inf).softmax(dim=1)


def sigmoid(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    return chosen(logits.sigmoid(), top_k)


class TestSoftmaxRouter(RouterConformance):
    def reference(self, logits, top_k):
        return softmax(logits, top_k)

    def backend(self):
        return registered("router", "softmax")


class TestTopKSoftmaxRouter(RouterConformance):
    def reference(self, logits, top_k):
        return softmax_of_chosen(logits, top_k)

    def backend(self):
        return registered("router", "topk_softmax")


class TestSigmoidRouter(RouterConformance):
    def reference(self, logits, top_k):
        return sigmoid(logits, top_k)

    def backend(self):
        return registered("router", "sigmoid")


class TestLlama4Router(RouterConformance):
    def reference(self, logits, top_k):
        return sigmoid(logits, top_k)

    def backend(self):
        return registered("router", "llama4")


class TestGroupedSigmoidRouter(RouterConformance):
    params = {"num_groups": 2, "topk_groups": 2, "renormalize": False}  # noqa: RUF012 - read only

    def reference(self, logits, top_k):
        return sigmoid(logits, top_k)

    def backend(self):
        return registered("router", "grouped_sigmoid")


def best_of_sigmoids(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    best = logits.float().topk(top_k, dim=1)
    return best.indices, best.values.sigmoid()


class TestCustomRouter(RouterConformance):
    params = {"function": best_of_sigmoids}  # noqa: RUF012 - read only

    def reference(self, logits, top_k):
        return sigmoid(logits, top_k)

    def backend(self):
        return registered("router", "custom")


class TestSimulatedRouter(RouterConformance):
    def backend(self):
        return registered("router", "simulated")


class TestRunner(RunnerConformance):
    def backend(self):
        return registered("runner", "default")


ROOT = Path(__file__).parents[2]
ABOVE = {":".join(found) for found in re.findall(r'registered\("(\w+)", "(\w+)"\)', Path(__file__).read_text())}
SLOW = {"experts:fp8_torch_cached", "experts:nvfp4_torch_cached"}
"""What differs from a backend above in where it keeps its weights alone."""


def others() -> list[str]:
    """Whatever else is registered, so that nothing ships without being asked."""
    found = []
    for record in moe_core.plugins():
        package = record.module.partition(".")[0]
        if not (ROOT / "plugins" / package / "tests" / "test_conformance.py").exists():  # else it is asked there
            found += [name for name in record.registers if name not in ABOVE]
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name in SLOW else []) for name in others()]
)
def test_everything_else_that_is_registered(name):
    """Of backends for GPUs their declarations everywhere, their numbers where there is one."""
    for suite in suites(name, ranks=2):
        report = run_cases(suite.cases, suite.subject, suite.device)
        assert report.failures == ()
        computes = report.verdict == "conforms"
        kind, _, called = name.partition(":")
        assert computes or (kind == "experts" and "cpu" not in registered(kind, called).capabilities.device_types)


@pytest.mark.full
@pytest.mark.parametrize("name", ["local", "all_gather", "batched"])
def test_on_four_ranks(name):
    (suite,) = suites(f"dispatch:{name}", ranks=4)
    report = run_cases(suite.cases, suite.subject, suite.device)
    assert report.verdict == "conforms", report.failures
