"""`TorchGroup`: the ranks of a layer as a `torch.distributed` group, NCCL or gloo."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from moe_core.errors import MoEError


class TorchGroup:
    """A `Group` (see `interfaces.py`) over `torch.distributed`.

    A collective that fails raises `MoEError` with this rank and the collective's name: on gloo within the process
    group's timeout. NCCL reports on its own, by its watchdog, since its collectives end after the call.

    Args:
        torch_group: the process group; None: the default group, which must be initialised.
        timeout_s: how long a rank that has not built a layer yet is waited for, when plans are compared. Collectives
            have the process group's own timeout.
    """

    def __init__(self, torch_group: dist.ProcessGroup | None = None, *, timeout_s: float = 300.0) -> None:
        if not dist.is_initialized():
            raise RuntimeError("TorchGroup needs torch.distributed.init_process_group to have run; run under torchrun")
        self._group = torch_group or dist.group.WORLD
        self.timeout_s = timeout_s

    @property
    def rank(self) -> int:
        return dist.get_rank(self._group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self._group)

    @property
    def torch_group(self) -> dist.ProcessGroup:
        assert self._group is not None
        return self._group

    @property
    def store(self) -> Any:
        """The default store, under a prefix of this group's, so that two groups may use one key."""
        c10d = dist.distributed_c10d
        return c10d.PrefixStore(f"moe_core/{self.torch_group.group_name}", c10d._get_default_store())

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        with self._named("all_reduce"):
            dist.all_reduce(total, group=self._group)
        return total

    def all_gather(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        sizes = sizes or [tensor.shape[0]] * self.size
        longest = max(sizes)
        if min(sizes) == longest:
            whole = tensor.new_empty((sum(sizes), *tensor.shape[1:]))
            with self._named("all_gather"):
                dist.all_gather_into_tensor(whole, tensor.contiguous(), group=self._group)
            return whole
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))  # gloo gathers equal lengths only
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        with self._named("all_gather"):
            dist.all_gather(parts, padded, group=self._group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        sizes = sizes or [tensor.shape[0] // self.size] * self.size
        if min(sizes) == max(sizes) and tensor.is_cuda:
            own = tensor.new_empty((sizes[self.rank], *tensor.shape[1:]))
            with self._named("reduce_scatter"):
                dist.reduce_scatter_tensor(own, tensor.contiguous(), group=self._group)
            return own
        return self.all_reduce(tensor).split(sizes)[self.rank].clone()  # gloo has no reduce-scatter everywhere

    def all_to_all(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        out = tensor.new_empty((sum(receive), *tensor.shape[1:]))
        with self._named("all_to_all"):
            dist.all_to_all_single(out, tensor.contiguous(), receive, send, group=self._group)
        return out

    def barrier(self) -> None:
        with self._named("barrier"):
            dist.barrier(group=self._group)

    @contextlib.contextmanager
    def _named(self, collective: str) -> Iterator[None]:
        """Who was in what when it failed: the backend's own message says neither."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise MoEError(
                f"rank {self.rank} of {self.size} in {collective}: {reason}; another rank died, or did not come within "
                "the process group's timeout: look at the other ranks' output, and start all ranks again"
            ) from error
