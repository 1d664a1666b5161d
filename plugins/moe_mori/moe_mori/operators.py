"""MoRI's operators: one for all layers of a shape, on one symmetric heap per process, with a watch over their kernels.

Shape letters: H hidden · E_l local experts · K top-k · W ranks · M the largest T of any rank.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import inspect
import weakref
from typing import Any

import attrs
import torch

from moe_core.agreement import check_agreement
from moe_core.errors import MoEError
from moe_core.interfaces import Group
from moe_core.pool import Lease, SharedPool
from moe_core.watchdog import StepWatch, limited
from moe_mori.library import Library

DISPATCH, COMBINE = 0, 1
_WARPS = 16


@attrs.frozen
class OperatorShape:
    """What an operator's buffers are sized by; layers with the same share one.

    Attributes:
        ranks: W.
        experts_per_rank: E_l.
        max_tokens: M.
        top_k: K.
        hidden: H.
        dtype: the model's.
        scales: scales of a quantized row; 0: rows travel in the model dtype.
        scale_bytes: bytes of one.
    """

    ranks: int
    experts_per_rank: int
    max_tokens: int
    top_k: int
    hidden: int
    dtype: torch.dtype
    scales: int
    scale_bytes: int


@attrs.define(eq=False)
class SharedOperator:
    """A ready operator.

    Attributes:
        raw: MoRI's `EpDispatchCombineOp`.
        device: where its tensors live.
        watch: over its kernels, where these wait for a missing rank for ever.
        returns_routing: dispatch gives a routing handle when asked, and combine takes it.
        in_flight: dispatches of any layer whose combine is to come. Its buffers are single, so never more than one.
    """

    raw: Any
    device: torch.device
    watch: StepWatch | None
    returns_routing: bool
    in_flight: int = 0

    def stage(self, index: int) -> contextlib.AbstractContextManager[None]:
        """The kernels that are launched within belong to `DISPATCH` or `COMBINE`."""
        return contextlib.nullcontext() if self.watch is None else self.watch.stage(index)


def _destroy(operator: SharedOperator) -> None:
    if operator.watch is not None:
        operator.watch.close()
    if operator.device.type == "cuda":
        torch.cuda.synchronize(operator.device)
    operator.raw = None  # there is no call for it: the last reference frees the symmetric memory


POOL: SharedPool[SharedOperator] = SharedPool(_destroy)
_worlds: weakref.WeakKeyDictionary[Any, weakref.ReferenceType[Any]] = weakref.WeakKeyDictionary()
"""`Library.shmem` → the group that its world consists of: one per process."""


def lease_operator(library: Library, group: Group, shape: OperatorShape, timeout_s: float) -> Lease[SharedOperator]:
    """The operator of this shape. The layer that is first to ask makes it, on every rank at once.

    Args:
        library: MoRI, or its stand-in.
        group: the layer's ranks.
        shape: the operator's.
        timeout_s: how long a stage of a step, and the making of the operator, may take.

    Raises:
        MoEError: a rank did not come in time, or differs in its library or in its operators; or another group's layers
            hold the symmetric heap already.
    """
    owner: Any = group if group.torch_group is None else group.torch_group
    return POOL.lease(owner, (library, shape), lambda: _make(library, group, owner, shape, timeout_s))


def _make(library: Library, group: Group, owner: Any, shape: OperatorShape, timeout_s: float) -> SharedOperator:
    check_agreement(
        group,
        {"MoRI": str(library), "MoRI operator": attrs.asdict(shape), "MoRI blocks": library.blocks},
    )
    who = f"moe-mori, rank {group.rank} of {group.size}"
    watch = None
    with contextlib.ExitStack() as guarded:
        if library.unbounded:
            guarded.enter_context(limited(f"{who}, making an operator of {library}", timeout_s))
            watch = StepWatch(who, ("dispatch", "combine"), timeout_s, library.device)
        _join_world(library, group, owner)
        raw = library.ops.EpDispatchCombineOp(_config(library, group, shape))
        _warm_up(raw, shape, group.rank, library.device)
    returns_routing = "return_routing" in inspect.signature(raw.dispatch).parameters
    return SharedOperator(raw, library.device, watch, returns_routing)


def _warm_up(raw: Any, shape: OperatorShape, rank: int, device: torch.device) -> None:
    """One step with a row for this rank itself: kernels are compiled when they first run, and that may be a capture."""
    x = torch.zeros(1, shape.hidden, dtype=shape.dtype, device=device)
    weights = torch.zeros(1, shape.top_k, device=device)
    ids = torch.full((1, shape.top_k), rank * shape.experts_per_rank, dtype=torch.int32, device=device)
    received, *_ = raw.dispatch(x, weights, None, ids)
    raw.combine(torch.zeros_like(received), None, ids)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _join_world(library: Library, group: Group, owner: Any) -> None:
    """Start the symmetric heap, once per process. The id goes by the group's store, so that any group will do."""
    if library.shmem in _worlds:
        if _worlds[library.shmem]() is not owner:
            raise MoEError(
                "dispatch mori: MoRI has one world of ranks per process, and layers of another group are in it; use "
                "one group for all layers, or another dispatch for these"
            )
        return
    key = "moe_mori/unique_id"
    if group.rank == 0:
        group.store.set(key, library.shmem.shmem_get_unique_id())
    unique_id = group.store.get(key)
    status = library.shmem.shmem_init_attr(
        library.shmem.MORI_SHMEM_INIT_WITH_UNIQUEID, group.rank, group.size, unique_id
    )
    if status:
        raise MoEError(
            f"dispatch mori, rank {group.rank}: shmem_init_attr returned {status}; is MORI_SHMEM_HEAP_SIZE "
            "(2 GiB where it is not set) enough for all layers' buffers?"
        )
    _worlds[library.shmem] = weakref.ref(owner)


@atexit.register
def _leave_worlds() -> None:
    """Operators first, then the heap that they lie in."""
    POOL.close()
    for shmem in list(_worlds):
        shmem.shmem_finalize()


def _config(library: Library, group: Group, shape: OperatorShape) -> Any:
    """MoRI's own configuration record; releases differ in its fields, so it gets those that it has."""
    ops = library.ops
    wanted = {
        "data_type": shape.dtype,
        "rank": group.rank,
        "world_size": shape.ranks,
        "hidden_dim": shape.hidden,
        "scale_dim": shape.scales,
        "scale_type_size": shape.scale_bytes,
        "max_token_type_size": shape.dtype.itemsize,
        "max_num_inp_token_per_rank": shape.max_tokens,
        "num_experts_per_rank": shape.experts_per_rank,
        "num_experts_per_token": shape.top_k,
        "warp_num_per_block": _WARPS,
        "block_num": library.blocks,
        "kernel_type": ops.EpDispatchCombineKernelType.IntraNode,
        "gpu_per_node": shape.ranks,
        "use_external_inp_buf": True,
    }
    known = {field.name for field in dataclasses.fields(ops.EpDispatchCombineConfig)}
    return ops.EpDispatchCombineConfig(**{name: value for name, value in wanted.items() if name in known})
