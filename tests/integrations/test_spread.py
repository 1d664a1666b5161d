"""A model's experts over several ranks: tokens taken in turn, own experts read alone, and the whole through torchrun.

Shape letters: T tokens · H hidden · K top-k · E experts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import moe_core
from moe_core import MoEConfig, Routing
from moe_core.build import method_for_checkpoint
from moe_core.checkpoint import Checkpoint, load_experts
from moe_core.integrations.transformers import packed, spread
from moe_core.plugins import registry
from moe_core.testing import Faults, run_on_ranks

FIXTURES = Path(__file__).parents[1] / "fixtures"
E, H, I, K, T = 5, 64, 32, 2, 11


@pytest.mark.parametrize("tokens", [0, 1, 5, 12, 13])
def test_tokens_are_taken_in_turn_and_all_come_back_in_order(tokens):
    x, ids = torch.arange(float(tokens)).view(-1, 1), torch.arange(tokens).view(-1, 1)

    def work(group):
        sizes = []

        def step(rows, routing):
            assert torch.equal(rows.flatten(), routing.topk_ids.flatten().float())
            assert torch.equal(rows, routing.topk_weights)
            sizes.append(len(rows))
            return rows * 10

        return spread.run_in_turn(step, x, Routing(ids, x), group, 2), sizes

    results = run_on_ranks(3, work, faults=Faults(jitter=0.001))
    turns = -(-tokens // 6)
    for out, sizes in results:
        assert torch.equal(out, x * 10)
        assert len(sizes) == turns, "every rank enters equally many steps"
        assert max(sizes, default=0) <= 2
    assert sum(sum(sizes) for _, sizes in results) == tokens, "each token is run once"


def test_the_dispatch_decides_whether_tokens_are_shared_out():
    def work(group):
        return [spread.parallel_over(group, name) for name in (None, "local", "all_gather")]

    for rank, found in enumerate(run_on_ranks(2, work)):
        assert [(p.ep_size, p.ep_rank, p.sp_size) for p in found] == [(2, rank, 1), (2, rank, 1), (2, rank, 2)]
    assert spread.most_tokens(None) == spread.most_tokens("all_gather") == spread.MAX_TOKENS_PER_RANK


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one block, each expert in tensors of its own."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("plain")
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (I, H), "up": (I, H), "down": (H, I)}
    save_file(
        {
            f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight": torch.randn(shape, generator=generator) * 0.2
            for expert in range(E)
            for part, shape in shapes.items()
        },
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    return folder


BLOCKS = [("plain", "model.layers.0.mlp", E), ("nvfp4_mixtral", "model.layers.0.block_sparse_moe", 4)]


@pytest.mark.parametrize("dispatch", [None, "all_gather", "batched"])
@pytest.mark.parametrize(("name", "prefix", "experts"), BLOCKS)
def test_a_layer_on_virtual_ranks_reads_its_own_experts_and_gives_what_one_rank_gives(
    name, prefix, experts, dispatch, plain, monkeypatch
):
    if dispatch == "batched" and "batched" not in registry().dispatch:
        pytest.skip("moe-batched is not installed")
    folder = plain if name == "plain" else FIXTURES / name
    read: dict[str, set[int]] = {}
    original = Checkpoint.tensor

    def noting(self: Checkpoint, tensor: str) -> torch.Tensor:
        parts = tensor.removeprefix(f"{prefix}.").split(".")
        read.setdefault(threading.current_thread().name, set()).add(int(parts[1]))
        return original(self, tensor)

    monkeypatch.setattr(Checkpoint, "tensor", noting)
    x, ids, weights = torch.randn(T, H), torch.randint(0, experts, (T, K)), torch.rand(T, K)
    config = MoEConfig(
        num_experts=experts, top_k=K, hidden_size=H, intermediate_size=I, dtype=torch.float32, max_tokens_per_rank=2
    )

    def run(group: Any) -> torch.Tensor:
        asked: dict[str, Any] = {"config": attrs.evolve(config, max_tokens_per_rank=None)}
        if group is not None:
            asked = {"config": config, "parallel": spread.parallel_over(group, dispatch), "dispatch": dispatch}
        with Checkpoint.open(folder) as checkpoint:
            method = packed._method_of(checkpoint.config.get("quantization_config"), None)
            chosen = moe_core.plan(**asked, scheme=method.scheme, device="cpu", routing_is_external=True)
            layer = packed.PackedExperts(chosen, method, torch.device("cpu"), group)
            load_experts(checkpoint, prefix, layer)
        if group is not None:
            assert read[threading.current_thread().name] == set(layer.expert_map.local_experts)
            assert len(layer.expert_map.local_experts) < experts
        return layer(x, ids, weights)

    expected = run(None)
    for out in run_on_ranks(2, run):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_the_method_is_the_formats_or_none():
    assert packed._method_of(None, None).scheme.name == "unquantized"
    stored = json.loads((FIXTURES / "nvfp4_mixtral" / "config.json").read_text())["quantization_config"]
    assert type(packed._method_of(stored, None)) is type(method_for_checkpoint(stored))


def launched(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "moe_core", "run", str(folder), "--max-new-tokens", "6", *arguments],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.mark.full  # processes that import transformers
@pytest.mark.parametrize(
    ("name", "dispatch"),
    [("fp8_qwen3_moe", "batched"), ("nvfp4_mixtral", None), ("Mixtral", "batched"), ("gpt-oss", "all_gather")],
)
def test_torchrun_generates_what_one_process_generates(name, dispatch, tmp_path):
    folder = FIXTURES / name
    if not folder.is_dir():
        from moe_core.cli.demo_models import MODELS, write

        folder = tmp_path / "checkpoint"
        write(next(model for model in MODELS if model.name == name), folder)
    asked = [] if dispatch is None else ["--dispatch", dispatch]
    ids = ["--prompt-ids", "3,4,5,6,7", "--json", "--dtype", "float32"]
    alone = subprocess.run([sys.executable, "-m", "moe_core", "run", folder, "--max-new-tokens", "6", *ids],
                           capture_output=True, text=True, timeout=150, check=True)  # fmt: skip
    spread_out = launched(folder, *ids, *asked)
    assert spread_out.returncode == 0, spread_out.stderr
    one, two = json.loads(alone.stdout), json.loads(spread_out.stdout)  # one document: rank 0's
    assert two["tokens"] == one["tokens"]
    assert {group["plan"]["dispatch"]["name"] for group in two["groups"]} == {dispatch or "local"}


@pytest.mark.full
def test_what_needs_all_experts_is_refused_by_each_rank_in_its_name():
    result = launched(FIXTURES / "nvfp4_mixtral", "--compare")
    assert result.returncode != 0
    assert not result.stdout
    for rank in range(2):
        assert f"Error: rank {rank} of 2: --compare: transformers' own experts would need all weights" in result.stderr
