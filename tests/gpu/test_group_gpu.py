"""NCCL's collectives in two halves on one rank: what several GPUs do is in `benchmarks/ranks.py`.

Shape letters: T tokens · H hidden · K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_core import ExpertPlacement, Routing
from moe_core.builtin.all_gather import AllGatherPrepareAndFinalize
from moe_core.group import TorchGroup
from moe_core.interfaces import PrepareAndFinalize
from moe_core.types import MODEL_DTYPE_PAYLOAD

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
E, H, K, MOST = 4, 64, 2, 8


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchGroup]:
    store: Path = tmp_path_factory.mktemp("nccl") / "store"
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    yield TorchGroup()
    dist.destroy_process_group()


def dispatch(name: str, group: TorchGroup) -> PrepareAndFinalize:
    """Between ranks, of which there is one."""
    if name == "all_gather":
        return AllGatherPrepareAndFinalize(group, max_tokens=MOST)
    from moe_batched.all_to_all import AllToAllPrepareAndFinalize

    return AllToAllPrepareAndFinalize(
        group, num_experts=E, placement=ExpertPlacement.LINEAR, num_local_experts=E, top_k=K, max_tokens=MOST
    )


def in_two_batches(backend: PrepareAndFinalize, x: torch.Tensor, routing: Routing, out: torch.Tensor) -> None:
    """Two micro-batches, interleaved; experts that double a row."""
    parts = [slice(5), slice(5, None)]
    routings = [Routing(routing.topk_ids[part], routing.topk_weights[part]) for part in parts]

    def start(number: int):
        return backend.prepare_start(
            x[parts[number]], routings[number], num_experts=E, expert_map=None, payload=MODEL_DTYPE_PAYLOAD
        )

    def experts(d):
        return d.x * 2 if d.topk_weights is None else d.x * 2 * d.topk_weights.sum(dim=1, keepdim=True)

    arrive = start(0)
    first = arrive()
    arrive = start(1)
    ends = [backend.finalize_start(experts(first), first.handle, routings[0], out[parts[0]])]
    second = arrive()
    ends.append(backend.finalize_start(experts(second), second.handle, routings[1], out[parts[1]]))
    for end in ends:
        end()


@pytest.mark.parametrize("name", ["all_gather", "batched"])
def test_two_interleaved_batches_are_captured_and_follow_their_inputs(name: str, group: TorchGroup) -> None:
    backend = dispatch(name, group)
    x, out = torch.randn(9, H, device="cuda"), torch.empty(9, H, device="cuda")
    routing = Routing(torch.randint(0, E, (9, K), device="cuda"), torch.rand(9, K, device="cuda"))
    in_two_batches(backend, x, routing, out)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        in_two_batches(backend, x, routing, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    backend.check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        in_two_batches(backend, x, routing, out)
    for _ in range(3):
        x.normal_()
        routing.topk_ids.random_(0, E)
        routing.topk_weights.uniform_()
        out.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(out, x * 2 * routing.topk_weights.sum(dim=1, keepdim=True))


def test_halves_give_what_the_whole_gives(group: TorchGroup) -> None:
    rows = torch.randn(6, H, device="cuda")
    whole = (group.all_gather(rows), group.reduce_scatter(rows), group.all_to_all(rows, [6], [6]))
    ends = (group.all_gather_start(rows), group.reduce_scatter_start(rows), group.all_to_all_start(rows, [6], [6]))
    assert all(map(torch.equal, whole, [end() for end in ends]))
