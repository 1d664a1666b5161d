"""Ranks that a launcher started: the same cases on real processes, for backends that need them.

Every process runs all cases in the same order, each as one rank, and hears what came of it on the others, so that all
reach the same verdict. A rank that fails alone between two collectives leaves the others waiting for as long as their
process group waits: that, and faults, are asked on virtual ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from moe_core.errors import CapacityError, MoEError
from moe_core.group import TorchGroup
from moe_core.testing.case import Violation


@attrs.frozen
class _Failed:
    """What a rank raised, as it can be sent."""

    kind: str
    duty: str
    text: str

    @classmethod
    def of(cls, error: Exception) -> _Failed:
        text = error.text if isinstance(error, Violation) else str(error)
        return cls(type(error).__name__, getattr(error, "duty", ""), text)

    def error(self, rank: int) -> Exception:
        if self.kind == Violation.__name__:
            return Violation(self.duty, self.text)
        kinds = {kind.__name__: kind for kind in (CapacityError, MoEError, ValueError)}
        return kinds.get(self.kind, RuntimeError)(f"rank {rank}: {self.kind}: {self.text}")


def join() -> tuple[TorchGroup, torch.device]:
    """This process's group and device, under torchrun.

    Raises:
        MoEError: nobody launched this process.
    """
    if "RANK" not in os.environ or "LOCAL_RANK" not in os.environ:
        raise MoEError(
            "--launched takes its ranks from torchrun: torchrun --nproc-per-node 2 -m moe_core conformance …"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return TorchGroup(), device


def run_as_rank(group: TorchGroup, work: Callable[[Any], Any], *, return_errors: bool) -> list[Any]:
    """As `run_on_ranks`, for the processes of a group: what `work(group)` gave on each of them, on the CPU."""
    mine: Any
    try:
        mine = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), work(group))
    except Exception as error:  # noqa: BLE001 - told to the other ranks, and raised on all of them
        mine = _Failed.of(error)
    told: list[Any] = [None] * group.size
    dist.all_gather_object(told, mine, group=group.torch_group)
    results = [part.error(rank) if isinstance(part, _Failed) else part for rank, part in enumerate(told)]
    failed = [result for result in results if isinstance(result, Exception)]
    if failed and not return_errors:
        raise failed[0]
    return results
