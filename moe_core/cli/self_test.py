"""A small layer, the whole way: plan, build, load, pack, run, compared with the dense reference.

Shape letters: T tokens · H hidden · I intermediate · E experts.
"""

from __future__ import annotations

import torch

from moe_core.build import build_runner
from moe_core.config import MoEConfig, RouterSpec
from moe_core.plugins import registry
from moe_core.reference import moe_reference
from moe_core.select import Plan

_TOKENS = 5


def largest_error() -> tuple[float, Plan]:
    """The largest difference between the runner that selection chooses on the CPU and the reference, and its plan.

    The difference is relative to the largest value.
    """
    generator = torch.Generator().manual_seed(0)
    config = MoEConfig(
        num_experts=4,
        top_k=2,
        hidden_size=16,
        intermediate_size=8,
        dtype=torch.float32,
        router=RouterSpec.of("softmax", renormalize=True),
    )
    runner = build_runner(config, device="cpu")
    layer = runner.routed_experts  # type: ignore[attr-defined]  # of the default runner
    shapes = {"gate": (8, 16), "up": (8, 16), "down": (16, 8)}
    for expert in range(config.num_experts):
        for name, shape in shapes.items():
            layer.load_expert(expert, name, torch.randn(shape, generator=generator))
    layer.pack_weights()
    hidden_states = torch.randn((_TOKENS, config.hidden_size), generator=generator)
    logits = torch.randn((_TOKENS, config.num_experts), generator=generator)
    routing = registry().find("routers", config.router.name)(config).select_experts(logits)
    expected = moe_reference(hidden_states, routing.topk_ids, routing.topk_weights, layer.weights, config.activation)
    error = (runner.forward(hidden_states, logits) - expected).abs().max() / expected.abs().max()
    return float(error), runner.plan
