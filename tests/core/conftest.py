"""Layers, ranks and deliberately wrong backends that the core's tests share."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch

import moe_core
from moe_core import MoEConfig, MoEParallelConfig, RouterSpec
from moe_core.reference import moe_reference
from moe_core.testing import run_on_ranks

SMALL = {"num_experts": 6, "top_k": 2, "hidden_size": 24, "intermediate_size": 16, "dtype": torch.float32}


def small_config(**changes: Any) -> MoEConfig:
    """A layer small enough for any test: E = 6, K = 2, H = 24, I = 16, fp32, renormalised softmax."""
    return MoEConfig(**{**SMALL, "router": RouterSpec.of("softmax", renormalize=True), **changes})


@pytest.fixture
def config() -> Callable[..., MoEConfig]:
    return small_config


def fill(runner: Any, seed: int = 0) -> Any:
    """Load random weights expert by expert, as a checkpoint would: the same for every split over ranks."""
    generator = torch.Generator().manual_seed(seed)
    c = runner.plan.config
    rows = {"gate": (c.intermediate_size, c.hidden_size), "up": (c.intermediate_size, c.hidden_size)}
    shapes: dict[str, tuple[int, ...]] = {**rows, "down": (c.hidden_size, c.intermediate_size)}
    if c.activation.bias:
        shapes |= {f"{name}_bias": shape[:1] for name, shape in list(shapes.items())}
    for expert in range(c.num_experts):
        for name, shape in shapes.items():
            runner.routed_experts.load_expert(expert, name, torch.randn(shape, generator=generator) * 0.3)
    runner.routed_experts.pack_weights()
    return runner


@pytest.fixture
def build() -> Callable[..., Any]:
    """`build(config, **arguments of build_runner)`: a runner on the CPU with random weights."""

    def make(config: MoEConfig, seed: int = 0, **arguments: Any) -> Any:
        return fill(moe_core.build_runner(config, device="cpu", **arguments), seed)

    return make


@pytest.fixture
def routed_truth() -> Callable[..., torch.Tensor]:
    """`routed_truth(runner, tokens, logits)`: what a one-rank runner's routed experts must give, in fp64."""

    def compute(runner: Any, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        routing = runner._router.select_experts(logits, runner.correction_bias)
        c = runner.plan.config
        return moe_reference(
            tokens,
            routing.topk_ids,
            routing.topk_weights,
            runner.routed_experts.weights,
            c.activation,
            router_weight_on_input=c.router_weight_on_input,
            compute_dtype=torch.float64,
        )

    return compute


@pytest.fixture
def on_ranks() -> Callable[..., list[Any]]:
    """`on_ranks(W, work)`: call `work(group)` on W virtual ranks at once; their results, in rank order."""
    return run_on_ranks


@pytest.fixture
def plugin():
    """`plugin(dispatch=…, experts=…, …)`: register backends in process for one test.

    Each value is a tuple of arguments for `register`.
    """
    names: list[str] = []

    def make(name: str = "test_backends", **kinds: tuple[Any, ...]) -> None:
        hooks = {
            "dispatch": "moe_core_register_prepare_finalize",
            "experts": "moe_core_register_experts",
            "quant_method": "moe_core_register_quant_methods",
            "router": "moe_core_register_routers",
            "runner": "moe_core_register_runners",
        }
        module = types.ModuleType(name)
        module.moe_core_api = (1, 0)
        for kind, arguments in kinds.items():

            def hook(register: Callable[..., None], arguments: tuple[Any, ...] = arguments) -> None:
                register(*arguments)

            setattr(module, hooks[kind], moe_core.hookimpl(hook))
        moe_core.register_plugin(module)
        names.append(name)

    yield make
    for name in names:
        moe_core.unregister_plugin(name)


@pytest.fixture
def backend():
    """`backend("dispatch" | "experts", name)`: a registered candidate, to derive a variant from."""
    from moe_core.plugins import registry

    def find(kind: str, name: str, **changes: Any) -> tuple[Any, Any]:
        candidate = registry().find(kind, name)
        return candidate.factory, attrs.evolve(candidate.capabilities, **changes)

    return find


@pytest.fixture
def parallel() -> type[MoEParallelConfig]:
    return MoEParallelConfig
