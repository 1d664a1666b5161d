"""Ranks that a launcher started: the same cases on real processes, for backends that need them.

Every process runs all cases in the same order, each as one rank, and hears what came of it on the others, so that all
reach the same verdict. They hear it through the group's store, which still works where a collective has failed.

A rank that fails alone between two collectives, or never sends what another waits for, leaves that one waiting for as
long as their process group waits, and breaks the group: that ends the run, with an error that names case and rank. What
a backend does then, and faults, are asked on virtual ranks.
"""

from __future__ import annotations

import atexit
import os
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from moe_core.errors import CapacityError, MoEError
from moe_core.group import TorchGroup, connect_ranks
from moe_core.testing.case import OutOfStep, Violation

TIMEOUT_S = 30.0
"""How long a collective waits for the other ranks, where nobody says otherwise."""


@attrs.frozen
class _Failed:
    """What a rank raised, as it can be sent, and after how many seconds."""

    kind: str
    duty: str
    text: str
    seconds: float

    @classmethod
    def of(cls, error: Exception, seconds: float) -> _Failed:
        text = error.text if isinstance(error, Violation) else str(error)
        return cls(type(error).__name__, getattr(error, "duty", ""), text, seconds)

    def __str__(self) -> str:
        return f"raised {self.kind} after {self.seconds:.1f} s: {self.text}"

    def error(self, rank: int) -> Exception:
        if self.kind == Violation.__name__:
            return Violation(self.duty, self.text)
        kinds = {kind.__name__: kind for kind in (CapacityError, MoEError, ValueError)}
        return kinds.get(self.kind, RuntimeError)(f"rank {rank}: {self.kind}: {self.text}")


def join(timeout_s: float) -> tuple[TorchGroup, torch.device]:
    """This process's group and device, under torchrun. A collective waits `timeout_s` for the other ranks.

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
        backend = "nccl" if device.type == "cuda" else "gloo"
        connect_ranks(backend, timeout_s)
        if backend == "gloo":
            atexit.register(_leave)
    return TorchGroup(timeout_s=timeout_s), device


def _leave() -> None:
    """Ends the group's threads: left alone they abort the process now and then, while Python exits."""
    if dist.is_initialized():
        dist.destroy_process_group()


def run_as_rank(group: TorchGroup, work: Callable[[Any], Any], *, return_errors: bool) -> list[Any]:
    """As `run_on_ranks`, for the processes of a group: what `work(group)` gave on each of them, on the CPU.

    Raises:
        OutOfStep: a rank waited in vain for another, or does not answer.
    """
    mine: Any
    began = time.monotonic()
    try:
        mine = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), work(group))
    except Exception as error:  # noqa: BLE001 - told to the other ranks, and raised on all of them
        mine = _Failed.of(error, time.monotonic() - began)
    told = _exchange(group, mine)
    raised = {rank: part for rank, part in enumerate(told) if isinstance(part, _Failed)}
    if any(part.kind != Violation.__name__ and part.seconds >= 0.95 * group.timeout_s for part in raised.values()):
        raise OutOfStep(
            "; ".join(f"rank {rank} {part}" for rank, part in raised.items())
            + f"; a rank waited {group.timeout_s:g} s in vain, so the group is broken and no more cases can be asked"
        )
    results = [part.error(rank) if isinstance(part, _Failed) else part for rank, part in enumerate(told)]
    failed = [result for result in results if isinstance(result, Exception)]
    if failed and not return_errors:
        raise failed[0]
    return results


def _exchange(group: TorchGroup, mine: Any) -> list[Any]:
    """What every rank brings, in rank order."""
    store = group.store
    number = store.add(f"conformance/{group.rank}", 1)
    keys = [f"conformance/{rank}/{number}" for rank in range(group.size)]
    store.set(keys[group.rank], pickle.dumps(mine))
    patience_s = 2 * group.timeout_s  # the others may wait for one another first
    try:
        store.wait(keys, timedelta(seconds=patience_s))
    except RuntimeError as error:
        silent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        raise OutOfStep(f"rank {group.rank} waited {patience_s:g} s for word from rank {', '.join(silent)}") from error
    told = [pickle.loads(store.get(key)) for key in keys]
    if number > 1:  # all ranks have read what came before, or they would not have got here
        store.delete_key(f"conformance/{group.rank}/{number - 1}")
    return told
