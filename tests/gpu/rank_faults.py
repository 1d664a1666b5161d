"""One of two ranks on two GPUs, which fail: `python rank_faults.py RANK STORE FAULT DISPATCH`.

Rank 0 prints a line: the dispatch, the fault, seconds, and the error. Rank 1 makes the fault.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import moe_core
from moe_core.errors import MoEError
from moe_core.group import TorchGroup
from moe_core.plugins import registry

TIMEOUT_S = 3.0
"""Of the layers' groups, or, in eager mode, of torch's."""
LATE_S = TIMEOUT_S + 3
"""How late: after everybody has been told."""
PATIENT_S = 30.0
"""Where nothing is to fail."""
TOKENS = 4


def say(*what: object) -> None:
    print(*what, flush=True)


def register(name: str, package: str) -> None:
    """Installed, or beside this folder."""
    if name not in registry().dispatch:
        sys.path.insert(0, str(Path(__file__).parents[2] / "plugins" / package))
        moe_core.register_plugin(importlib.import_module(f"{package}.plugin"), name)


def layer(
    dispatch: str, rank: int, *, top_k: int = 2, collectives_s: float = PATIENT_S, timeout_s: float = TIMEOUT_S
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A layer with a group of its own (what has failed once is of no use any more), and its inputs."""
    group = TorchGroup(dist.new_group(timeout=timedelta(seconds=collectives_s)), timeout_s=timeout_s)
    config = moe_core.MoEConfig(
        num_experts=8, top_k=top_k, hidden_size=2048, intermediate_size=256, max_tokens_per_rank=8,
        dtype=torch.bfloat16, cuda_graph=True,
    )  # fmt: skip
    parallel = moe_core.MoEParallelConfig.fold(dp_size=2, dp_rank=rank, expert_parallel=True)
    made = moe_core.build_runner(config, parallel=parallel, group=group, dispatch=dispatch, device="cuda")
    for expert in made.routed_experts.expert_map.local_experts:
        for name, shape in {"gate": (256, 2048), "up": (256, 2048), "down": (2048, 256)}.items():
            made.routed_experts.load_expert(expert, name, torch.randn(shape).mul_(0.05).bfloat16())
    made.routed_experts.pack_weights()
    return made, torch.randn(TOKENS, 2048, device="cuda").bfloat16(), torch.randn(TOKENS, 8, device="cuda")


def warm_up(dispatch: str, rank: int) -> None:
    """Import and compile what a step needs: where one rank takes seconds longer for that, it would be the late one."""
    same_kernels = "all_gather" if dispatch == "all_gather" else "batched"
    made, x, logits = layer(same_kernels, rank, timeout_s=PATIENT_S)
    made(x, router_logits=logits)
    torch.cuda.synchronize()


def told(dispatch: str, fault: str, fails: Callable[[], object]) -> None:
    """What `fails` raises, and after how long."""
    began, error = time.monotonic(), "nothing was raised"
    try:
        fails()
    except MoEError as raised:
        error = str(raised).replace("\n", " ")
    say(dispatch, fault, f"{time.monotonic() - began:.1f}", error)


def another_config(dispatch: str, rank: int) -> None:
    told(dispatch, "config", lambda: layer(dispatch, rank, top_k=2 + rank))


def absent_from_a_graph(dispatch: str, rank: int, how: str) -> None:
    """Rank 1 does not replay its graph: it is late, or ends."""
    made, x, logits = layer(dispatch, rank)
    out = made(x, router_logits=logits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # vendors' own threads may call CUDA
        replayed = made(x, router_logits=logits)
    graph.replay()
    made.check()
    assert torch.equal(out, replayed)
    if rank == 1:
        if how == "dead":
            os._exit(3)
        time.sleep(LATE_S)
    graph.replay()
    if rank == 0:
        told(dispatch, how, made.check)
        if how == "dead":
            os._exit(0)  # to free the graph would wait for the device
    torch.cuda.synchronize()  # the late one has come by then


def absent(dispatch: str, rank: int) -> None:
    """Rank 1 never builds the layer."""
    if rank == 0:
        told(dispatch, "absent", lambda: layer(dispatch, rank))
    else:
        dist.new_group()  # of the layer's group, of which every rank is asked
        time.sleep(LATE_S)


def unconnected(dispatch: str, rank: int) -> None:
    """Rank 1 builds the layer, but is gone when the first connection is made."""
    if rank == 1 and dispatch == "nixl_ep":
        importlib.import_module("moe_nixl_ep.buffers").choose_transport = lambda version: time.sleep(60)
    made, x, logits = layer(dispatch, rank, collectives_s=TIMEOUT_S)
    if rank == 1:
        time.sleep(60)

    def step() -> None:
        made(x, router_logits=logits)
        made.check()

    told(dispatch, "unconnected", step)


def unanswered(dispatch: str, rank: int) -> None:
    """Rank 1 is gone from an eager step: torch's own watchdog ends rank 0."""
    made, x, logits = layer(dispatch, rank, collectives_s=TIMEOUT_S)
    made(x, router_logits=logits)
    torch.cuda.synchronize()
    time.sleep(rank * 60)
    made(x, router_logits=logits)
    torch.cuda.synchronize()


FAULTS: dict[str, Callable[[str, int], None]] = {
    "config": another_config,
    "absent": absent,
    "unconnected": unconnected,
    "unanswered": unanswered,
    "late": functools.partial(absent_from_a_graph, how="late"),
    "dead": functools.partial(absent_from_a_graph, how="dead"),
}
PACKAGES = {"batched": "moe_batched", "nixl_ep": "moe_nixl_ep"}


def main() -> None:
    rank, (store, fault, dispatch) = int(sys.argv[1]), sys.argv[2:]
    torch.cuda.set_device(rank)
    # With its device known, NCCL connects at once, and not in the first step.
    known = None if fault == "unconnected" else torch.device("cuda", rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2, device_id=known)
    for name, package in PACKAGES.items():
        register(name, package)
    warm_up(dispatch, rank)
    FAULTS[fault](dispatch, rank)
    os._exit(0)  # groups that have failed are not shut down


if __name__ == "__main__":
    main()
