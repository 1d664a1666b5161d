"""Packed experts spread over two processes: each rank holds its share, and the logits are those of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_core
from moe_core.build import method_for_checkpoint
from moe_core.checkpoint import Checkpoint, load_experts
from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.errors import MoEError, UnsupportedError
from moe_core.testing import run_on_ranks

pytest.importorskip("transformers")
packed = pytest.importorskip("moe_core.integrations.transformers.packed")

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = [("fp8_qwen3_moe", "ep"), ("fp8_qwen3_moe", "tp"), ("nvfp4_gpt_oss", "tp"), ("nvfp4_mixtral", "ep")]
IDS = torch.arange(3, 23)[None]

_RANK = """
import sys, torch, torch.distributed as dist
from moe_core.config import MoEParallelConfig
from moe_core.group import TorchGroup
from moe_core.integrations.transformers.packed import from_pretrained

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
group, results = TorchGroup(), {}
for case in sys.argv[3:]:
    name, axis = case.split(":")
    parallel = MoEParallelConfig(**{f"{axis}_size": 2, f"{axis}_rank": rank})
    model = from_pretrained(name, parallel=parallel, group=group, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.arange(3, 23)[None]).logits
    held = [m for n, m in model.named_modules() if n.endswith("experts.packed")]
    results[case] = logits, sum(m.w13.numel() + m.w2.numel() for m in held)
torch.save(results, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[torch.Tensor, int]]]:
    """What both ranks got, by case: starting them costs seconds, so they do all cases at once."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = [f"{FIXTURES / name}:{axis}" for name, axis in CASES]
    ranks = [
        subprocess.Popen([sys.executable, "-c", _RANK, str(rank), str(folder), *cases], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=90)[1].decode()[-2000:] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.full  # two processes that import transformers
@pytest.mark.parametrize(("name", "axis"), CASES)
def test_logits_are_those_of_one_process(name, axis, by_rank):
    model = packed.from_pretrained(FIXTURES / name, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(IDS).logits
    held = [m for n, m in model.named_modules() if n.endswith("experts.packed")]
    whole = sum(m.w13.numel() + m.w2.numel() for m in held)
    shares = [results[f"{FIXTURES / name}:{axis}"] for results in by_rank]
    assert [numel for _, numel in shares] == [whole // 2, whole // 2]
    for logits, _ in shares:
        assert float((logits - expected).norm() / expected.norm()) <= 1e-5
    assert torch.equal(shares[0][0], shares[1][0])


@pytest.mark.parametrize("axis", ["ep", "tp"])
def test_one_layer_on_virtual_ranks(axis):
    """The layer alone, without a model around it: transformers does not load two models at once in one process."""
    folder, config = (
        FIXTURES / "nvfp4_mixtral",
        MoEConfig(num_experts=4, top_k=2, hidden_size=64, intermediate_size=32, dtype=torch.float32),
    )
    torch.manual_seed(0)
    x, ids, weights = torch.randn(9, 64), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)

    def run(group: Any) -> torch.Tensor:
        spread = {f"{axis}_size": group.size, f"{axis}_rank": group.rank} if group else {}
        with Checkpoint.open(folder) as checkpoint:
            method = method_for_checkpoint(checkpoint.config["quantization_config"])
            chosen = moe_core.plan(config, parallel=MoEParallelConfig(**spread), scheme=method.scheme, device="cpu",
                                   routing_is_external=True)  # fmt: skip
            experts = packed.PackedExperts(chosen, method, torch.device("cpu"), group)
            load_experts(checkpoint, "model.layers.0.block_sparse_moe", experts)
        return experts(x, ids, weights)

    expected = run(None)
    for out in run_on_ranks(2, run):
        torch.testing.assert_close(out, expected)


def test_transformers_own_sharding_is_refused():
    with pytest.raises(UnsupportedError, match=r"tp_plan.*parallel= and group="):
        packed.from_pretrained(FIXTURES / "nvfp4_mixtral", tp_plan="auto")
    with pytest.raises(MoEError, match="group is None"):
        packed.from_pretrained(FIXTURES / "nvfp4_mixtral", parallel=MoEParallelConfig(tp_size=2))
    with pytest.raises(UnsupportedError, match="cuts a group"):  # 32 columns on 4 ranks are 8 each, half a group
        packed.from_pretrained(FIXTURES / "nvfp4_mixtral", parallel=MoEParallelConfig(tp_size=4))
