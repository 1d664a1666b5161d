"""The processes that torchrun started, as the ranks of a command; without torchrun there is one, and no group."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import attrs
import torch
import torch.distributed as dist

from moe_core.cli.options import real_device
from moe_core.errors import MoEError
from moe_core.group import TorchGroup, connect_ranks
from moe_core.interfaces import Group

TIMEOUT_S = 300.0
"""How long a rank waits for the others, in a collective and before one, while they read their experts."""


@attrs.frozen
class Ranks:
    """Where this process stands.

    Attributes:
        device: what it runs on.
        group: all processes; None: it is the only one.
    """

    device: torch.device
    group: Group | None = None


@contextlib.contextmanager
def ranks(device: str | None) -> Iterator[Ranks]:
    """Join the processes that torchrun started, on a device each. The first of them speaks, the others only of errors.

    Args:
        device: as for `real_device`.

    Raises:
        MoEError: what the command raised, with the rank in front.
    """
    target = real_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(target)
        return
    if target.type == "cuda":
        target = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(target)
    _connect("nccl" if target.type == "cuda" else "gloo")
    group = TorchGroup(timeout_s=TIMEOUT_S)
    try:
        with contextlib.ExitStack() as stack:
            if group.rank > 0:
                silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(silence))
                stack.enter_context(contextlib.redirect_stderr(silence))
            yield Ranks(target, group)
            group.barrier()  # nobody leaves while another one still has to ask it something
    except (MoEError, ValueError) as error:
        raise MoEError(f"rank {group.rank} of {group.size}: {error}") from error
    finally:
        dist.destroy_process_group()


def _connect(backend: str) -> None:
    try:
        connect_ranks(backend, TIMEOUT_S)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MoEError(
            f"rank {os.environ.get('RANK', '?')} of {os.environ['WORLD_SIZE']}, connecting by {backend}: {reason}; are "
            "all ranks started, by one torchrun on each machine, with the same --nnodes and --rdzv-endpoint?"
        ) from error
