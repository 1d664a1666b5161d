"""`TorchGroup`: the ranks of a layer as a `torch.distributed` group, NCCL or gloo."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class TorchGroup:
    """A `Group` (see `interfaces.py`) over `torch.distributed`.

    Args:
        torch_group: the process group; None: the default group, which must be initialised.
    """

    def __init__(self, torch_group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError("TorchGroup needs torch.distributed.init_process_group to have run; run under torchrun")
        self._group = torch_group or dist.group.WORLD

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
        return dist.distributed_c10d._get_default_store()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=self._group)
        return total

    def all_gather(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        sizes = sizes or [tensor.shape[0]] * self.size
        longest = max(sizes)  # gloo gathers equal lengths only
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self._group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        sizes = sizes or [tensor.shape[0] // self.size] * self.size
        return self.all_reduce(tensor).split(sizes)[self.rank].clone()

    def all_to_all(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        out = tensor.new_empty((sum(receive), *tensor.shape[1:]))
        dist.all_to_all_single(out, tensor.contiguous(), receive, send, group=self._group)
        return out

    def barrier(self) -> None:
        dist.barrier(group=self._group)
