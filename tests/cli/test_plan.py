"""`moe-core plan`: a dry run from a config or a shape. That its numbers are right, `tests/planner` says."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest

from moe_core.cli.devices import SHEETS, times
from moe_core.cli.layers import Layers, groups, spread_over
from moe_core.cli.plan_output import duration, percent, size, work
from moe_core.config import MoEConfig

SHAPE = "E=64,K=8,H=2048,I=1024"
ALL = ["Mixtral", "Qwen3-MoE", "DeepSeek-V3", "gpt-oss"]


@pytest.fixture
def planned(invoke):
    """`planned(SHAPE, "--world", "8")`: what --json says."""

    def call(*arguments):
        result = invoke("plan", *arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return call


def chosen(entry):
    return next(pair for pair in entry["pairs"] if pair["verdict"] == "chosen")


@pytest.mark.parametrize("name", ALL)
def test_from_a_model_and_from_its_config_alone(name, checkpoints, invoke):
    result = invoke("plan", checkpoints(name), "--world", "2", "--tokens", "16")
    assert result.exit_code == 0, result.output
    assert "memory of one layer's step" in result.stdout
    assert re.search(r"all_gather \+ \w+ +chosen", result.stdout)
    assert invoke("plan", checkpoints(name) / "config.json", "--world", "2", "--tokens", "16").stdout == result.stdout


def test_bytes_of_a_shape(planned):
    (entry,) = planned(SHAPE, "--world", "8", "--tokens", "32")["plans"]
    cost = chosen(entry)["cost"]
    assert cost["weight_bytes"] == 8 * 3 * 2048 * 1024 * 2
    assert cost["loading_bytes"] == 3 * 2048 * 1024 * 2
    assert cost["footprint"]["combine_wire_bytes"] == 7 * 32 * 2048 * 2
    assert cost["slots"] == 8 * 32
    assert chosen(entry)["seconds"]["bound"] == "memory"


def test_buffers_are_sized_by_the_most_tokens(planned):
    small, large = (
        chosen(planned(SHAPE, "--world", "8", "--tokens", "32", "--max-tokens", most)["plans"][0])["cost"]
        for most in ("32", "64")
    )
    assert large["footprint"]["rows"] == 2 * small["footprint"]["rows"]
    assert large["choices"] == small["choices"]


def test_over_the_numbers_of_ranks(planned):
    entries = planned(SHAPE, "--world", "1..1024")["plans"]
    assert [entry["ranks"] for entry in entries] == [1 << n for n in range(11)]
    assert [entry["groups"] for entry in entries] == [1] * 7 + [2, 4, 8, 16]
    weights = [chosen(entry)["cost"]["weight_bytes"] for entry in entries]
    assert weights == [weights[0] >> min(n, 6) for n in range(11)]
    wire = [chosen(entry)["cost"]["wire_bytes"] for entry in entries[:7]]
    assert wire == sorted(wire)


def test_the_table_over_the_numbers_of_ranks(invoke):
    text = invoke("plan", SHAPE, "--world", "1,128,1024").stdout
    assert "128 ranks in 2 groups of 64" in text
    assert "1,024 ranks in 16 groups of 64" in text
    assert "…" not in text, "nothing is cut"
    assert "figures of NVIDIA H200" in text


def test_other_spreads(planned, invoke):
    (entry,) = planned(SHAPE, "--world", "4", "--spread", "tp", "--tokens", "16")["plans"]
    cost = chosen(entry)["cost"]
    assert cost["weight_bytes"] == 64 * 3 * 2048 * 256 * 2
    assert cost["reduce_wire_bytes"] == 2 * 16 * 2048 * 2 * 3 // 4
    assert cost["needed_wire_bytes"] is None
    (entry,) = planned(SHAPE, "--world", "4", "--spread", "ep-replicated", "--tokens", "16")["plans"]
    assert chosen(entry)["dispatch"] == "local"
    assert "I = 1024 can't be split over 3 ranks" in invoke("plan", SHAPE, "--world", "3", "--spread", "tp").stdout


@pytest.mark.parametrize("world", [1, 2, 3, 6, 48, 60, 64, 96, 1000, 1024])
def test_every_rank_has_a_group(world):
    config = MoEConfig(num_experts=60, top_k=4, hidden_size=64, intermediate_size=64)
    parallel = spread_over(world, "ep", config)
    assert groups(world, parallel) * parallel.ep_size == world
    assert parallel.ep_size <= 60


def test_every_figure_says_where_it_is_from(planned):
    for name, sheet in SHEETS.items():
        figures = planned(SHAPE, "--device", name)["figures"]
        assert len(figures) == 4 + len(sheet.matmul)
        assert all("data sheet" in f["source"] or "measured" in f["source"] or "400 Gb/s" in f["source"]
                   for f in figures.values())  # fmt: skip


def test_floors_on_paper(planned):
    """One token on one GPU reads K experts; many tokens are bound by the matmul rate."""
    (entry,) = planned(SHAPE, "--tokens", "1")["plans"]
    bytes_ = 8 * 3 * 2048 * 1024 * 2 + 4 * 2048 + 8 * 8
    assert chosen(entry)["seconds"]["experts"] == pytest.approx(bytes_ / 4.26e12, rel=1e-9)
    (entry,) = planned(SHAPE, "--tokens", "16384")["plans"]
    assert chosen(entry)["seconds"]["experts"] == pytest.approx(6 * 16384 * 8 * 2048 * 1024 / 800e12)
    assert chosen(entry)["seconds"]["bound"] == "compute"
    (entry,) = planned(SHAPE, "--world", "16", "--tokens", "64", "--device", "h100")["plans"]
    received, seconds = chosen(entry)["cost"]["wire_bytes"], chosen(entry)["seconds"]["wire"]
    assert seconds == pytest.approx(max(received / 450e9, received * 8 / 15 / 8 / 50e9))
    (entry,) = planned(SHAPE, "--world", "4", "--tokens", "64", "--device", "mi300x")["plans"]  # 3 of 7 links
    assert chosen(entry)["seconds"]["wire"] == pytest.approx(chosen(entry)["cost"]["wire_bytes"] / (448e9 * 3 / 7))


def test_a_device_without_figures_has_no_times(planned, invoke):
    (entry,) = planned(SHAPE, "--device", "cpu")["plans"]
    assert chosen(entry)["seconds"] == {"experts": None, "bound": "", "wire": None}
    assert "no times: the device's rates are not known" in invoke("plan", SHAPE, "--device", "cpu").stdout


def test_fp32_has_no_matmul_rate(planned):
    (entry,) = planned(SHAPE + ",dtype=float32")["plans"]
    assert chosen(entry)["seconds"]["experts"] is None


def test_too_large_for_the_device_is_said(invoke):
    assert "DOES NOT FIT" in invoke("plan", "E=256,K=8,H=7168,I=2048,layers=58", "--world", "8").stdout
    assert "DOES NOT FIT" not in invoke("plan", "E=256,K=8,H=7168,I=2048,layers=58", "--world", "16").stdout


@pytest.mark.skipif(importlib.util.find_spec("quant_fp8") is None, reason="moe-quant-fp8 is not installed")
def test_a_scheme(planned):
    (plain,) = planned(SHAPE)["plans"]
    (packed,) = planned(SHAPE, "--scheme", "fp8_block")["plans"]
    blocks = 64 * 3 * (2048 // 128) * (1024 // 128)
    assert chosen(packed)["cost"]["weight_bytes"] == chosen(plain)["cost"]["weight_bytes"] // 2 + 4 * blocks


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(suffix, invoke, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plan.{suffix}"
    result = invoke("plan", SHAPE, "--world", "1..64", "--plot", file)
    assert result.exit_code == 0, result.output
    assert file.stat().st_size > 10_000
    assert f"drawn: {file}" in result.stderr


def test_a_picture_that_cannot_be_written(tmp_path, refused):
    pytest.importorskip("matplotlib")
    assert "plan.nonsense" in refused("plan", SHAPE, "--plot", tmp_path / "plan.nonsense")


MEASURED = {
    "device": "NVIDIA H200",
    "shapes": {"acme": {"name": "acme", "hidden": 2048, "intermediate": 1024, "experts": 64, "top_k": 8}},
    "steps": [
        {"shape": "acme", "tokens": 1, "who": "moe-core", "us": 30.0},
        {"shape": "acme", "tokens": 1, "who": "torch grouped_mm", "us": 60.0},
        {"shape": "acme", "tokens": 4096, "who": "moe-core"},
    ],
}


def test_predicted_beside_measured(planned, invoke, tmp_path):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(MEASURED))
    (row,) = planned(SHAPE, "--measured", file)["measured"]["steps"]
    floor = (8 * 3 * 2048 * 1024 * 2 + 4 * 2048 + 8 * 8) / 4.26e12 * 1e6
    assert row == {"shape": "acme", "tokens": 1, "predicted_us": pytest.approx(floor), "measured_us": 30.0,
                   "error": pytest.approx(floor / 30 - 1)}  # fmt: skip
    text = invoke("plan", SHAPE, "--measured", file).stdout
    assert "experts' step, predicted for NVIDIA H200, measured on NVIDIA H200" in text
    assert "median error 21 %, largest 21 %" in text


def test_measurements_of_something_else(refused, tmp_path):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(MEASURED))
    assert "none of its shapes is planned here; it holds acme" in refused(
        "plan", "E=8,K=2,H=64,I=64", "--measured", file
    )
    file.write_text("[]")
    assert "not the JSON of `python -m benchmarks.experts" in refused("plan", SHAPE, "--measured", file)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("E=64,K=8",), "missing H, I"),
        (("E=64,K=8,H=x,I=4",), "not a number: H=x"),
        (("E=64,K=8,H=4,I=4,Z=3",), "unknown Z"),
        (("E=64,K=8,H=4,I=4,dtype=int3",), "dtype 'int3' is none of float32"),
        (("E=4,K=8,H=4,I=4",), "top_k = 8"),
        ((SHAPE, "--world", "0"), "expected numbers from 1 to 1024"),
        ((SHAPE, "--world", "8..2"), "write 2..8"),
        ((SHAPE, "--tokens", "8", "--max-tokens", "4"), "buffers must hold a step"),
        ((SHAPE, "--device", "h900"), "h100, h200, b200, mi300x"),
        ((SHAPE, "--scheme", "nonsense"), "unknown quantization scheme 'nonsense'"),
    ],
)
def test_what_cannot_be_planned(arguments, said, refused):
    assert said in refused("plan", *arguments)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "?"), (0, "0"), (999, "999 B"), (1024, "1 KiB"), (43_500_000, "41.5 MiB"), (2**40, "1 TiB")],
)
def test_sizes(value, text):
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (4.15e-5, "41.5 us"), (0.0025, "2.5 ms"), (12.0, "12 s"), (5000.0, "5000 s")],
)
def test_durations(value, text):
    assert duration(value) == text


@pytest.mark.parametrize(("flops", "text"), [(2e6, "2 MFLOP"), (9.02e10, "90.2 GFLOP"), (5e16, "50,000 TFLOP")])
def test_work(flops, text):
    assert work(flops) == text


@pytest.mark.parametrize(("part", "whole", "text"), [(1, 2, "50 %"), (1, 300, "0.3 %"), (None, None, "?"), (3, 0, "–")])
def test_percentages(part, whole, text):
    assert percent(part, whole) == text


def test_a_gather_crosses_the_network_once_for_a_server():
    """So that its floor is that of the links, on two servers as on one."""
    import moe_core
    from moe_core.config import MoEParallelConfig
    from moe_core.planner import cost_of

    config = MoEConfig(num_experts=64, top_k=4, hidden_size=512, intermediate_size=64, max_tokens_per_rank=16)
    sheet, rates = SHEETS["h200"], []
    for ranks in (8, 16):
        parallel = MoEParallelConfig(ep_size=ranks, dp_size=ranks)
        cost = cost_of(moe_core.plan(config, parallel=parallel, dispatch="all_gather", device=sheet.device), 16)
        rates.append(cost.wire_bytes / times(cost, sheet).wire)
    assert rates == pytest.approx([391e9, 391e9])


def test_layers_that_run_by_their_modules_own_functions_are_not_planned(invoke, monkeypatch):
    from moe_core.cli import plan

    config = MoEConfig(num_experts=4, top_k=2, hidden_size=64, intermediate_size=64)
    unfused = Layers(title="acme", count=2, config=config, own_gate=True, note="runs unfused: it has a norm")
    monkeypatch.setattr(plan, "layers_of", lambda *_: [unfused])
    text = invoke("plan", "anything").stdout
    assert "note: runs unfused: it has a norm" in text
    assert "1 rank: not planned: nothing is known of the module's own functions" in text


def test_a_named_shape_is_the_one_that_bench_and_tune_name(planned):
    named, typed = (planned(shape)["plans"] for shape in ("qwen3-30b", "E=128,K=8,H=2048,I=768"))
    assert [chosen(entry)["cost"] for entry in named] == [chosen(entry)["cost"] for entry in typed]
