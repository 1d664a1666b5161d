# acme_moe/dispatch_plugin.py
import torch

from moe_core import ActivationFormat, DispatchCapabilities, ExpertPlacement, hookimpl

moe_core_api = (1, 0)

GATHER_ALL = DispatchCapabilities(
    activation_format=ActivationFormat.STANDARD,
    dtypes=frozenset({torch.float32, torch.bfloat16}),
    device_types=frozenset({"cpu"}),
    accepts_dropped_ids=True,
    accepts_duplicate_ids=True,
    placements=frozenset(ExpertPlacement),
    min_ep_size=2,
    max_ep_size=None,
    carries_tokens=True,
    output_reduced=True,
    max_in_flight=None,
    deterministic=True,
)


def make(config, parallel, scheme, group, placement):
    from acme_moe.dispatch import GatherAll

    return GatherAll(group)


@hookimpl
def moe_core_register_prepare_finalize(register):
    register("gather_all", make, GATHER_ALL, priority=-50)
