"""`SharedExperts`: the experts that every token visits, beside the routed ones."""

from __future__ import annotations

import torch

from moe_core.interfaces import Group


class SharedExperts(torch.nn.Module):
    """Wraps the module that computes them. The runner passes it to the kernel as an argument; nobody else keeps it.

    Args:
        module: `[T, H_s] → [T, H]`; its output is new, or it is copied.
        output_is_partial: the module is split over ranks, so its output still needs a sum over them.
        group: the ranks that it is split over, where they are not the layer's: with expert parallelism over several
            dp groups, the tp ranks, which have the same tokens. None: the layer's.
    """

    def __init__(self, module: torch.nn.Module, *, output_is_partial: bool = False, group: Group | None = None) -> None:
        super().__init__()
        self.module = module
        self.output_is_partial = output_is_partial
        self.group = group

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.module(hidden_states)
        if out.untyped_storage().data_ptr() == hidden_states.untyped_storage().data_ptr():
            return out.clone()  # an opaque op's output may not alias its input
        return out
