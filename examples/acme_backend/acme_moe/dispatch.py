# acme_moe/dispatch.py
import attrs
import torch

from moe_core import Dispatched, Group, MoEError, PrepareAndFinalize


@attrs.define
class Handle:
    sizes: list[int]
    consumed: bool = False


class GatherAll(PrepareAndFinalize):
    """Every rank gets all tokens; ids of experts that live elsewhere become -1."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def prepare(self, hidden_states, routing, *, num_experts, expert_map, payload):
        sizes = self.group.all_gather(torch.tensor([hidden_states.shape[0]])).tolist()
        x = self.group.all_gather(hidden_states, sizes)
        ids = self.group.all_gather(routing.topk_ids, sizes)
        weights = self.group.all_gather(routing.topk_weights, sizes)
        local = torch.where(ids >= 0, expert_map[ids.clamp(min=0)], -1)
        return Dispatched(x=x, handle=Handle(sizes), topk_ids=local, topk_weights=weights)

    def finalize(self, expert_out, handle, routing, out):
        if handle.consumed:
            raise MoEError("gather_all: finalize got a handle for the second time; prepare makes one for each step")
        handle.consumed = True
        out.copy_(self.group.reduce_scatter(expert_out, handle.sizes))
