"""The routers that come with the core, registered through the same hook that any other plugin uses.

| name | scores | chosen by | used by |
|---|---|---|---|
| `softmax` | softmax over E | scores (+ bias) | Mixtral, Qwen-MoE, OLMoE, Jamba |
| `topk_softmax` | softmax over the chosen K | logits (+ bias) | gpt-oss, Granite |
| `sigmoid` | sigmoid | scores (+ bias) | MiniMax-M2, Flint, LFM2 |
| `grouped_sigmoid` | sigmoid | scores (+ bias) in the best groups | DeepSeek-V3, GLM-4, Kimi, Nemotron-H |
| `llama4` | sigmoid | logits (+ bias) | Llama 4 |
| `custom` | a function of the user | that function | |
| `simulated` | hashed noise, logits ignored | a chosen distribution | load tests |

On an NVIDIA GPU the first five are one kernel, where a layer is built there (`on_gpu.py`).

Shared by all: mathematics in float32, ids int64 (what `torch.topk` gives), weights float32, both new tensors. The
correction bias takes part in the choice alone. The routed scaling factor is in no router's weights: it is the
runner's duty, so weights of models whose own router multiplies it in are ours times that factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moe_core.hookspecs import PLUGIN_API, hookimpl
from moe_core.interfaces import RouterFactory
from moe_core.route.custom import CustomRouter
from moe_core.route.sigmoid import GroupedSigmoidRouter, Llama4Router, SigmoidRouter
from moe_core.route.simulated import SimulatedRouter
from moe_core.route.softmax import SoftmaxRouter, TopKSoftmaxRouter

__all__ = [
    "ROUTERS",
    "CustomRouter",
    "GroupedSigmoidRouter",
    "Llama4Router",
    "SigmoidRouter",
    "SimulatedRouter",
    "SoftmaxRouter",
    "TopKSoftmaxRouter",
]

moe_core_api = PLUGIN_API

ROUTERS: Mapping[str, RouterFactory] = {
    "softmax": SoftmaxRouter.from_config,
    "topk_softmax": TopKSoftmaxRouter.from_config,
    "sigmoid": SigmoidRouter.from_config,
    "grouped_sigmoid": GroupedSigmoidRouter.from_config,
    "llama4": Llama4Router.from_config,
    "custom": CustomRouter.from_config,
    "simulated": SimulatedRouter.from_config,
}


@hookimpl
def moe_core_register_routers(register: Callable[..., None]) -> None:
    for name, factory in ROUTERS.items():
        register(name, factory)
