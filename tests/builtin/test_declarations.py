"""What the built-ins register, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from moe_core.build import plan
from moe_core.builtin import LOCAL, TORCH_EXPERTS
from moe_core.config import ActivationSpec, MoEConfig, Problem
from moe_core.plugins import registry
from moe_core.types import Device

H200 = Device("cuda", (9, 0), "H200")


def problem(device: Device = H200, **config: object) -> Problem:
    sizes: dict[str, object] = {"num_experts": 4, "top_k": 2, "hidden_size": 64, "intermediate_size": 32}
    return Problem(config=MoEConfig(**(sizes | config)), device=device)  # type: ignore[arg-type]


def test_registered_through_the_hooks() -> None:
    found = registry()
    assert found.dispatch["local"].capabilities is LOCAL
    assert found.experts["torch"].capabilities is TORCH_EXPERTS
    assert found.dispatch["local"].plugin.startswith("moe-core")


@pytest.mark.parametrize(
    "config",
    [
        {"dtype": torch.float32},
        {"dtype": torch.float16, "activation": ActivationSpec("relu2", None)},
        {"activation": ActivationSpec("swiglu_oai", limit=7.0, bias=True), "router_weight_on_input": True},
        {"hidden_size": 33, "intermediate_size": 17, "deterministic": True},
    ],
    ids=str,
)
def test_the_fallback_fits_everything(config: dict[str, object]) -> None:
    chosen = plan(problem(**config).config, experts="torch", dispatch="local", device="cpu")
    assert chosen.dispatch.name == "local"


def test_under_capture_only_what_needs_no_host_value() -> None:
    assert TORCH_EXPERTS.refuse is not None
    refuse = TORCH_EXPERTS.refuse
    assert refuse(problem(cuda_graph=True)) is None
    assert refuse(problem(dtype=torch.float32)) is None
    assert refuse(problem(Device("cpu"), cuda_graph=True, dtype=torch.float32)) is None
    for config, shown in (
        ({"dtype": torch.float32}, "dtype = torch.float32"),
        ({"hidden_size": 60}, "H = 60"),
        ({"intermediate_size": 20}, "I = 20"),
    ):
        reason = refuse(problem(cuda_graph=True, **config))
        assert reason is not None
        assert shown in reason
    old = refuse(problem(Device("cuda", (7, 5), "T4"), cuda_graph=True))
    assert old is not None
    assert "(7, 5)" in old
