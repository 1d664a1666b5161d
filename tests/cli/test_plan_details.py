"""What `explain` shows beside the plan: kernels by T with their source, and workspaces as they are allocated."""

from __future__ import annotations

import json

import attrs
import pytest
import torch

import moe_core
from moe_core import Device, MoEConfig
from moe_core.cli.plan_details import plan_details
from moe_core.kernel import MoEKernel
from moe_core.tuned import Tuned, TunedFormat

H200 = Device("cuda", (9, 0), "NVIDIA H200")
QWEN3 = MoEConfig(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768, dtype=torch.bfloat16)
SMALL = MoEConfig(num_experts=6, top_k=2, hidden_size=24, intermediate_size=16, dtype=torch.bfloat16)


def test_kernels_of_a_gpu_that_is_not_here_and_where_their_parameters_come_from():
    found = plan_details(moe_core.plan(QWEN3, device=H200))
    assert [(name, item.source) for name, item in found.launch][:2] == [("triton", "table of NVIDIA H200")] * 2
    assert found.launch[-1][1].source == "heuristics"
    assert "from 1: slots, up_n 1" in "\n".join(found.lines())
    other = plan_details(moe_core.plan(QWEN3, device=Device("cuda", (8, 0), "NVIDIA A100")))
    assert {item.source for _, item in other.launch} == {"heuristics"}


def test_interleaved_weights_may_lie_either_way():
    spec = moe_core.ActivationSpec("swiglu_oai", moe_core.GateUpLayout.INTERLEAVED, limit=7.0, bias=True)
    gpt_oss = MoEConfig(
        num_experts=128, top_k=4, hidden_size=2880, intermediate_size=2880, dtype=torch.bfloat16, activation=spec
    )  # fmt: skip
    first = [item.what for _, item in plan_details(moe_core.plan(gpt_oss, device=H200)).launch if item.first_row == 0]
    assert [what.split(",")[0] for what in first] == ["contiguous rows: slots", "contiguous columns: scan"]


def test_what_the_user_measured_comes_first():
    plan = moe_core.plan(QWEN3, device=H200)
    table = {"w13_unit": "k", "w2_unit": "k", "path": "slots", "up_n": 4, "up_k": 256, "up_warps": 4, "down_n": 8,
             "down_k": 256, "down_warps": 8}  # fmt: skip
    label = plan.ranges[0].candidate.label
    launch = {label: ((4, table), (64, {"path": "of another version"}))}
    tuned = attrs.evolve(plan, tuned=Tuned({plan.activation_format: TunedFormat((), launch)}))
    sources = {item.first_row: item.source for _, item in plan_details(tuned).launch}
    assert sources[3] == "measured here"
    assert sources[0] == sources[9] == "table of NVIDIA H200"
    assert sum(source == "measured here" for source in sources.values()) == 1, "what can't be read is left out"


@pytest.mark.parametrize("dispatch", ["local", "batched"])
def test_workspaces_are_those_that_a_step_allocates(dispatch):
    plan = moe_core.plan(SMALL, dispatch=dispatch, device="cpu")
    kernel = MoEKernel(plan)
    found = plan_details(plan, [1, 7])
    assert [item.tokens for item in found.workspaces] == [1, 7]
    for item in found.workspaces:
        allocated = kernel._workspaces(0, item.rows, torch.device("cpu"))
        assert set(item.by_name) == set(allocated)
        assert sum(item.by_name.values()) == kernel.workspace_bytes(item.rows)
        for name, tensor in allocated.items():
            assert 0 <= item.by_name[name] - tensor.nbytes < 256, "nothing but alignment on top"


def test_experts_that_cannot_be_made_here_are_named():
    plan = moe_core.plan(SMALL, device="cpu")

    def fail(*_):
        raise ImportError("libvendor.so is missing")

    (item,) = plan.ranges
    broken = attrs.evolve(plan, ranges=(attrs.evolve(item, candidate=attrs.evolve(item.candidate, factory=fail)),))
    assert plan_details(broken).missing == ("experts torch cannot be made here: ImportError: libvendor.so is missing",)


def test_explain_shows_both_as_text_and_json(checkpoints, invoke):
    folder, device = checkpoints("Mixtral"), ("--device", "h200")
    text = invoke("explain", folder, *device, "--tokens", 33).stdout
    assert "kernels of triton by T:" in text
    assert "workspaces of triton at T = 33: " in text
    plan = json.loads(invoke("explain", folder, *device, "--tokens", 33, "--json").stdout)["groups"][0]["plan"]
    assert plan["layer"]["device"] == "NVIDIA H200"
    (shown,) = plan["workspaces"]
    assert shown["bytes"] == sum(shown["by_name"].values()) > 0
    assert plan["launch"][0]["source"] == "heuristics"
    assert plan["ranges_by"].startswith("declared priorities")
