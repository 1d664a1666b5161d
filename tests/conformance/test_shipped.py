"""Every shipped backend passes the kit. A whole test module of an author's own looks like one of these classes."""

from __future__ import annotations

import pytest
import torch

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


OTHERS = [
    "dispatch:local",
    "dispatch:all_gather",
    "dispatch:batched",
    "experts:fp8_torch_cached",
    "experts:nvfp4_torch_cached",
    "runner:two_batch",
    "scheme:fp8_block_ue8m0",
    "scheme:fp8_tensor_dynamic",
    "scheme:fp8_weight_only",
    "scheme:nvfp4",
]


@pytest.mark.full
@pytest.mark.parametrize("name", OTHERS)
def test_on_four_ranks_and_what_differs_little(name):
    suite = suites(name, ranks=4)[0]
    report = run_cases(suite.cases, suite.subject, suite.device)
    assert report.verdict == "conforms", report.failures
