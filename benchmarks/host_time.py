"""Host time of one eager step at T = 1, layer of software by layer: what a graph would save.

    python -m benchmarks.host_time [--shapes qwen3-30b,…] [--json out.json]

The device is idle before each call, so a figure is what the call itself takes until it returns: the median of 300, and
of five rounds over all calls the best one, because a busy host only ever adds. T tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

import moe_core
from benchmarks import cases
from benchmarks.experts import host_us, our_step
from moe_core import GateUpLayout, MoEConfig, RouterSpec
from moe_core.plugins import registry
from moe_core.types import ExpertWeights, Routing

ROUNDS = 5
LIMIT_US = 60.0
"""What a kernel call may take."""
PACKED = ("nvfp4", "fp8_block", "fp8_channel", "fp8_tensor")
PACKED_LIMIT_US = 70.0
"""What it may take with packed experts of these schemes, where the packages that bring them are installed."""


def calls(shape: cases.Shape, tokens: int = 1) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    weights = cases.make_weights(shape, "cuda")
    inputs = cases.make_inputs(shape, tokens, 0, "cuda")
    logits = torch.randn(tokens, shape.experts, device="cuda", dtype=torch.bfloat16)
    prepare, _ = our_step(shape, weights)
    runner: Any = moe_core.build_runner(layer_config(shape), device="cuda")
    runner.routed_experts.w13.data.copy_(weights.w13)
    runner.routed_experts.w2.data.copy_(weights.w2)
    kernel, routing = runner.kernel, Routing(inputs.ids, inputs.weights)
    record = ExpertWeights(weights.w13, weights.w2, GateUpLayout.GATE_UP)
    router = runner._router
    twin = getattr(router, "twin", router)
    key = runner._layer_key
    found: dict[str, Callable[[], Any]] = {
        "launcher": prepare(inputs),
        "kernel call": lambda: kernel(inputs.x, routing, record),
        "routing": lambda: router.select_experts(logits),
        "routing, torch operators": lambda: twin.select_experts(logits),
        "runner's step: routing and kernel": lambda: runner.run_step(inputs.x, logits, None, None),
        "the same through the opaque op": lambda: torch.ops.moe_core.moe_forward(inputs.x, logits, None, key),
        "runner": lambda: runner(inputs.x, logits),
    }
    return found | packed_calls(shape, inputs) | bridge_calls(shape, weights, inputs)


def layer_config(shape: cases.Shape) -> MoEConfig:
    return MoEConfig(
        num_experts=shape.experts, top_k=shape.top_k, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        dtype=torch.bfloat16, router=RouterSpec.of("softmax", renormalize=True),
    )  # fmt: skip


def packed_calls(shape: cases.Shape, inputs: cases.Inputs) -> dict[str, Callable[[], Any]]:
    """The kernel call with packed experts."""
    found: dict[str, Callable[[], Any]] = {}
    routing = Routing(inputs.ids, inputs.weights)
    for scheme in PACKED:
        if scheme not in registry().quant_methods:
            continue
        runner: Any = moe_core.build_runner(layer_config(shape), scheme=scheme, device="cuda")
        for tensor in runner.routed_experts.parameters():
            tensor.data.fill_(1)  # launching takes as long, whatever is in them
        runner.routed_experts.pack_weights()
        kernel, record = runner.kernel, runner.routed_experts.weights
        found[f"kernel call, {scheme}"] = lambda kernel=kernel, record=record: kernel(inputs.x, routing, record)
    return found


def bridge_calls(shape: cases.Shape, weights: cases.Weights, inputs: cases.Inputs) -> dict[str, Callable[[], Any]]:
    """The experts module of a transformers model, run by the bridge and by transformers itself."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        from moe_core.integrations.transformers import IMPLEMENTATION, layer_for
    except ImportError:
        return {}
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate, num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )  # fmt: skip

    def module(implementation: str) -> Any:
        config._experts_implementation = implementation
        with torch.device("meta"):
            made = Qwen3MoeExperts(config)
        made.gate_up_proj = torch.nn.Parameter(weights.w13, requires_grad=False)
        made.down_proj = torch.nn.Parameter(weights.w2, requires_grad=False)
        return made

    ids, router_weights = inputs.ids.long(), inputs.weights.to(inputs.x.dtype)
    ours = module(IMPLEMENTATION)
    layer = layer_for(ours)

    def run(implementation: str) -> Callable[[], Any]:
        def call() -> Any:
            config._experts_implementation = implementation
            return ours(inputs.x, ids, router_weights)

        return call

    return {
        "bridge layer": lambda: layer.forward(inputs.x, ids, router_weights),
        "experts module, by the bridge": run(IMPLEMENTATION),
        "the bridge through its opaque op": lambda: torch.ops.moe_core.experts_forward(
            inputs.x, ids, router_weights, layer.key
        ),
        "experts module, transformers grouped_mm": run("grouped_mm"),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3-30b,deepseek-v3-tp8,mixtral-8x7b,gpt-oss-120b-dims")
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    report: dict[str, dict[str, float]] = {}
    for name in arguments.shapes.split(","):
        measured = calls(cases.SHAPES[name])
        rounds = [{what: host_us(call) for what, call in measured.items()} for _ in range(ROUNDS)]
        times = report[name] = {what: min(found[what] for found in rounds) for what in measured}
        print(f"{name}, T = 1: host microseconds")
        for what, us in times.items():
            print(f"  {us:8.1f}  {what}")
        op = times["the same through the opaque op"] - times["runner's step: routing and kernel"]
        packed = max((us for what, us in times.items() if what.startswith("kernel call, ")), default=0.0)
        within = times["kernel call"] <= LIMIT_US and packed <= PACKED_LIMIT_US
        print(
            f"  the opaque op adds {op:.1f}; the kernel calls are {'within' if within else 'ABOVE'} their "
            f"{LIMIT_US:.0f}, with packed experts {PACKED_LIMIT_US:.0f}", flush=True,
        )  # fmt: skip
        torch.cuda.empty_cache()
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "host_us": report}, file, indent=1)


if __name__ == "__main__":
    main()
