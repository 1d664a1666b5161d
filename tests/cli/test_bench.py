"""`moe-core bench`: every contestant is checked before it is timed, and what can't run says why."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from moe_core.cli.app import app
from moe_core.cli.bench_layer import SHAPES, measure_case, parse_shape, random_weights

TINY = ["bench", "--shape", "64,32,8,2", "--rounds", "3", "--device", "cpu", "--dtype", "float32"]


def run(*arguments):
    return CliRunner().invoke(app, [*TINY, *arguments])


def test_it_prints_a_table_per_case():
    result = run("--tokens", "1", "--tokens", "5")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("64,32,8,2 (H 64, I 32, E 8, K 2)") == 2
    for name in ("torch", "transformers eager", "transformers grouped_mm", "transformers batched_mm"):
        assert result.stdout.count(name) >= 2
    assert "runs on cuda, not on cpu" in result.stdout


def test_json_holds_every_time_with_its_error_and_fraction():
    data = json.loads(run("--tokens", "3", "--json").stdout)
    assert data["cases"][0]["tokens"] == 3
    timed = [r for r in data["cases"][0]["results"] if r["microseconds"] is not None]
    assert {r["name"] for r in timed} == {
        "torch",
        "transformers eager",
        "transformers grouped_mm",
        "transformers batched_mm",
    }
    for result in timed:
        assert result["error"] < 1e-5
        assert 0 < result["fraction"] < 1.5
        assert result["host_microseconds"] <= result["microseconds"] * 1.5


def test_a_wrong_result_gets_no_time():
    from moe_core.builtin.torch_experts import TorchExperts

    shape = parse_shape("64,32,8,2")
    weights = random_weights(shape, torch.float32, torch.device("cpu"))
    original = TorchExperts.apply
    TorchExperts.apply = lambda self, d, w, ws, out: out.fill_(1.0)
    try:
        results = measure_case(shape, 3, weights, ["torch"], (1e9, 1e9), 2)
    finally:
        TorchExperts.apply = original
    (ours,) = [result for result in results if result.name == "torch"]
    assert ours.microseconds is None
    assert "wrong: relative error" in ours.why_not


def test_bad_arguments_are_named():
    assert "--shape '64,32'" in run("--shape", "64,32").output
    assert "unknown experts 'nonsense'" in run("--experts", "nonsense").output
    assert parse_shape("mixtral-8x7b") is SHAPES["mixtral-8x7b"]


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "roofline.png"
    assert run("--tokens", "1", "--plot", str(file)).exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_load_of_a_checkpoint_layer_by_layer(checkpoints):
    folder = checkpoints("Qwen3-MoE")
    arguments = ["bench", "--ep", str(folder), "--ranks", "2", "--tokens", "32", "--device", "cpu"]
    data = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    config = json.loads((folder / "config.json").read_text())
    assert len(data["layers"]) == config["num_hidden_layers"]
    for layer in data["layers"]:
        counts = layer["counts"]
        assert sum(counts) == 32 * config["num_experts_per_tok"], "every choice is counted once"
        assert layer["experts"] == pytest.approx(max(counts) * len(counts) / sum(counts))
        half, even = len(counts) // 2, sum(counts[::2])
        busiest = {"linear": max(sum(counts[:half]), sum(counts[half:])), "round_robin": max(even, sum(counts) - even)}
        for placement, ranks in layer["ranks"].items():
            assert ranks == {"2": pytest.approx(busiest[placement] * 2 / sum(counts))}
    shown = CliRunner().invoke(app, arguments).stdout
    assert "2 ranks, round robin" in shown
    assert shown.count("mlp.experts") == config["num_hidden_layers"]
