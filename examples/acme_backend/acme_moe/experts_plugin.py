# acme_moe/experts_plugin.py
import torch

from moe_core import ActivationFormat, ExpertsCapabilities, GateUpLayout, hookimpl
from moe_core.types import STANDARD_EXPERTS_DUTIES

moe_core_api = (1, 0)

LOOP = ExpertsCapabilities(
    owns={ActivationFormat.STANDARD: STANDARD_EXPERTS_DUTIES},
    dtypes=frozenset({torch.float32, torch.bfloat16}),
    device_types=frozenset({"cpu"}),
    activations=frozenset({"silu"}),
    gate_up_layouts=frozenset({GateUpLayout.GATE_UP}),
    accepts_dropped_ids=True,
    accepts_duplicate_ids=True,
    deterministic=True,
)


def make(config, parallel, scheme, group, placement):
    from acme_moe.experts import LoopExperts

    return LoopExperts()


@hookimpl
def moe_core_register_experts(register):
    register("acme_loop", make, LOOP, priority=-50)
