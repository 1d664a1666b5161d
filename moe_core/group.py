"""`TorchGroup`: the ranks of a layer as a `torch.distributed` group, NCCL or gloo."""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_core.errors import CollectiveError
from moe_core.interfaces import Finish
from moe_core.watchdog import limited

# torch 2.13 renamed both and warns at the old names; 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_REPORT_TIMEOUT_S = 2.0
"""After a failure, how long the other ranks are given to report theirs, so that the silent one can be named."""
_POLL_S = 0.0005
_UNGUARDED = contextlib.nullcontext()


def connect_ranks(backend: str, timeout_s: float) -> None:
    """Makes the default process group from the launcher's environment; its threads end with `destroy_process_group`.

    Args:
        backend: of torch.distributed: "gloo", "nccl".
        timeout_s: how long a collective waits for the other ranks.
    """
    # Some default arguments in there keep the group that stands when it is imported, as transformers and dynamo do. The
    # group's threads would then outlive its end, and now and then abort the process while Python exits.
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


class TorchGroup:
    """A `moe_core.Group` over `torch.distributed`.

    A collective that fails raises `CollectiveError` with this rank and the collective's name: on gloo within the
    process group's timeout. NCCL's collectives end after the call: torch's watchdog reports after the process
    group's timeout, but not where a graph replays them; `await_device`, which a layer's `check` calls, tells of both.
    NCCL connects in the first call of a collective, and waits there without a timeout: a watchdog ends the process.

    Args:
        torch_group: the process group; None: the default group, which must be initialised.
        timeout_s: how long a rank that has not built a layer yet is waited for, when plans are compared, the device in
            `await_device`, and NCCL's connections. Collectives have the process group's own timeout.
    """

    def __init__(self, torch_group: dist.ProcessGroup | None = None, *, timeout_s: float = 300.0) -> None:
        if not dist.is_initialized():
            raise RuntimeError("TorchGroup needs torch.distributed.init_process_group to have run; run under torchrun")
        # The default group is not kept: its threads have to end with `destroy_process_group`, not while Python exits.
        self._group = torch_group
        backends = (each.split(":") for each in str(dist.get_backend_config(self._group)).split(","))
        self._connects_late = {device for device, backend in backends if backend == "nccl"}
        self._connected: set[tuple[str, str]] = set()
        self.timeout_s = timeout_s

    @property
    def rank(self) -> int:
        return dist.get_rank(self._group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self._group)

    @property
    def torch_group(self) -> dist.ProcessGroup:
        group = self._group or dist.group.WORLD
        assert group is not None
        return group

    @property
    def store(self) -> Any:
        """The default store, under a prefix of this group's, so that two groups may use one key."""
        c10d = dist.distributed_c10d
        return c10d.PrefixStore(f"moe_core/{self.torch_group.group_name}", c10d._get_default_store())

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        self._run("all_reduce", dist.all_reduce, total)
        return total

    def all_gather(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        return self._all_gather(tensor, sizes, self._run)()

    def all_gather_start(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> Finish:
        return self._all_gather(tensor, sizes, self._start)

    def reduce_scatter(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        return self._reduce_scatter(tensor, sizes, self._run)()

    def reduce_scatter_start(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> Finish:
        return self._reduce_scatter(tensor, sizes, self._start)

    def all_to_all(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        return self._all_to_all(tensor, send, receive, self._run)()

    def all_to_all_start(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> Finish:
        return self._all_to_all(tensor, send, receive, self._start)

    def barrier(self) -> None:
        by_device = next(iter(self._connects_late), "cpu")  # torch chooses: guarded where it may be NCCL
        with self._named("barrier"), self._connecting("barrier", by_device):
            dist.barrier(group=self._group)

    def await_device(self, stage: str) -> None:
        """Wait, at most `timeout_s`, for what the current CUDA stream was given, graph replays included.

        A collective of NCCL whose partner is missing does not end, and in a graph no watchdog of torch's sees it.

        Raises:
            CollectiveError: it is not done; the stage is named, and the ranks that did not come here to say the same.
        """
        if not torch.cuda.is_initialized():
            return
        done, deadline = torch.cuda.Event(), time.monotonic() + self.timeout_s
        done.record()
        while not done.query():
            if time.monotonic() > deadline:
                raise CollectiveError(
                    f"{stage}: rank {self.rank} of {self.size}: the device is not done within {self.timeout_s} s; "
                    f"another rank died, or is late ({self._suspects()}): look at the other ranks' output, and start "
                    "all of them again"
                )
            time.sleep(_POLL_S)

    def _all_gather(self, tensor: torch.Tensor, sizes: list[int] | None, run: _Run) -> Finish:
        sizes = sizes or [tensor.shape[0]] * self.size
        longest = max(sizes)
        if min(sizes) == longest:
            whole = tensor.new_empty((sum(sizes), *tensor.shape[1:]))
            wait = run("all_gather", _all_gather, whole, tensor.contiguous())
            return lambda: _after(wait, whole)
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))  # gloo gathers equal lengths only
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        wait = run("all_gather", dist.all_gather, parts, padded)

        def finish() -> torch.Tensor:
            wait()
            return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

        return finish

    def _reduce_scatter(self, tensor: torch.Tensor, sizes: list[int] | None, run: _Run) -> Finish:
        sizes, rank = sizes or [tensor.shape[0] // self.size] * self.size, self.rank
        if min(sizes) == max(sizes) and tensor.is_cuda:
            own = tensor.new_empty((sizes[rank], *tensor.shape[1:]))
            wait = run("reduce_scatter", _reduce_scatter, own, tensor.contiguous())
            return lambda: _after(wait, own)
        total = tensor.clone()
        wait = run("reduce_scatter", dist.all_reduce, total)  # gloo has no reduce-scatter everywhere
        return lambda: _after(wait, total).split(sizes)[rank].clone()

    def _all_to_all(self, tensor: torch.Tensor, send: list[int], receive: list[int], run: _Run) -> Finish:
        out = tensor.new_empty((sum(receive), *tensor.shape[1:]))
        wait = run("all_to_all", dist.all_to_all_single, out, tensor.contiguous(), receive, send)
        return lambda: _after(wait, out)

    def _run(self, name: str, collective: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
        """A whole collective; nothing is left to wait for."""
        with self._named(name), self._connecting(name, _device_of(arguments)):
            collective(*arguments, group=self._group)
        return _nothing

    def _start(self, name: str, collective: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
        """Enter a collective. The result holds its tensors and waits: the host on gloo, the current stream on NCCL."""
        with self._named(name), self._connecting(name, _device_of(arguments)):
            work = collective(*arguments, group=self._group, async_op=True)
        return functools.partial(self._wait, name, [work, *arguments])

    def _wait(self, name: str, under_way: list[Any]) -> None:
        """End what `_start` started; `under_way`, the work and its tensors, is emptied."""
        with self._named(name):
            under_way[0].wait()
        under_way.clear()

    @contextlib.contextmanager
    def _named(self, collective: str) -> Iterator[None]:
        """Who was in what when it failed: the backend's own message says neither."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise CollectiveError(
                f"rank {self.rank} of {self.size} in {collective}: {reason}; another rank died, or did not come within "
                f"the process group's timeout ({self._suspects()}): look at the other ranks' output, and start all of "
                "them again"
            ) from error

    def _connecting(self, collective: str, device: str) -> contextlib.AbstractContextManager[None]:
        """Guards the first call of a collective on this type of device, where ranks may still have to be connected."""
        unguarded = device not in self._connects_late or (collective, device) in self._connected
        return _UNGUARDED if unguarded else self._first(collective, device)

    @contextlib.contextmanager
    def _first(self, collective: str, device: str) -> Iterator[None]:
        with limited(f"rank {self.rank} of {self.size}, connecting for its first {collective}", self.timeout_s):
            yield
        self._connected.add((collective, device))

    def _suspects(self) -> str:
        """Which ranks have not failed in the same way: the one that the others waited for is among them."""
        ranks = [rank for rank in range(self.size) if rank != self.rank]
        silent, deadline = [], time.monotonic() + _REPORT_TIMEOUT_S
        try:
            store = self.store
            store.set(f"failed/{self.rank}", b"")
            for rank in ranks:
                try:
                    store.wait([f"failed/{rank}"], timedelta(seconds=max(deadline - time.monotonic(), 0.05)))
                except RuntimeError:  # torch's stores raise their DistStoreError, a RuntimeError
                    store.get(f"failed/{self.rank}")  # is it the store that is gone?
                    silent.append(rank)
        except RuntimeError:
            return "the store is gone too, with the rank or launcher that kept it"
        named = ", ".join(f"rank {rank}" for rank in silent)
        return f"no failure is reported by {named}" if silent else "every rank reports a failure"


_Run = Callable[..., Callable[[], None]]


def _device_of(arguments: Sequence[Any]) -> str:
    """The type of the device that a collective's tensors are on."""
    return next(each.device.type for each in arguments if isinstance(each, torch.Tensor))


def _nothing() -> None:
    """Waits for what is done already."""


def _after(wait: Callable[[], None], tensor: torch.Tensor) -> torch.Tensor:
    wait()
    return tensor
