"""Every path of the experts step against its twin, in the interpreter: odd sizes, variants, poisoned memory."""

import dataclasses

import pytest
import torch
from case import ExpertsCase, poisoned, relative_error, run

from moe_core.ops import (
    Activation,
    BatchedExpertsLauncher,
    GroupedConfig,
    ScanConfig,
    SlotsConfig,
    TileConfig,
    experts_batched_torch,
    experts_step,
)

POINTERS = TileConfig(32, 16, 32, 4, 2, small_m=16, group=2, tma=False)
MAPS = TileConfig(32, 16, 32, 4, 2, small_m=16, group=2)
SCAN = ScanConfig(TileConfig(16, 16, 32, 4, 2), TileConfig(16, 16, 32, 4, 2), pdl=False)
PATHS = {
    "slots": SlotsConfig(4, 32, 4, 8, 16, 4, preload=2, pdl=False),
    "scan": SCAN,
    "by_slot": dataclasses.replace(SCAN, by_slot=True),
    "pointers": GroupedConfig(POINTERS, POINTERS, pdl=False),
    "maps": GroupedConfig(MAPS, MAPS, pdl=False),
    "split": GroupedConfig(MAPS, dataclasses.replace(MAPS, block_m=16, small_m=0), pdl=False),
    "walk": GroupedConfig(dataclasses.replace(MAPS, persistent=1), dataclasses.replace(MAPS, persistent=1), pdl=False),
    "tall": GroupedConfig(dataclasses.replace(MAPS, tall=True), dataclasses.replace(MAPS, tall=True), pdl=False),
}
GPT_OSS = Activation("swiglu_oai", "interleaved", limit=1.0)
BASE = ExpertsCase(6, 72, 40, 4, 2)
VARIANTS = {
    "gpt_oss": {"activation": GPT_OSS, "bias": True, "transposed": True, "top_k": 3},
    "up_gate": {"activation": Activation("gelu", "up_gate", limit=0.7), "bias": True, "num_rows": 4},
    "ungated": {"activation": Activation("relu2", None), "weight_on_input": True},
    "tanh_int64": {"activation": Activation("gelu_tanh", "interleaved"), "ids_dtype": torch.int64, "row_stride": 80},
    "fp16": {"dtype": torch.float16},
}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3}


def check(case: ExpertsCase, config=None) -> None:
    out, expected = run(case, config)
    assert relative_error(out, expected) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", PATHS)
def test_variants(path, variant):
    case = dataclasses.replace(BASE, **VARIANTS[variant])
    check(case, PATHS[path])


@pytest.mark.parametrize("routing", ["one", "none"])
@pytest.mark.parametrize("path", PATHS)
def test_all_tokens_to_one_expert_or_to_none(path, routing):
    check(dataclasses.replace(BASE, routing=routing, tokens=8), PATHS[path])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("experts", "top_k", "hidden", "intermediate"), [(1, 1, 88, 24), (5, 16, 32, 56)])
def test_one_expert_and_many_choices(path, experts, top_k, hidden, intermediate):
    check(ExpertsCase(3, hidden, intermediate, experts, top_k), PATHS[path])


@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_own_choice(tokens):
    case = ExpertsCase(tokens, 64, 32, 4, 2)
    launcher, weights = case.launcher()
    # The chosen configuration with programmatic launch off, which the interpreter does not know.
    plan = tuple((end, dataclasses.replace(config, pdl=False)) for end, config in launcher.plan)
    x, ids, router = case.inputs()
    out = experts_step(x, ids, router, **weights, activation=case.activation, plan=plan)
    if tokens:
        assert relative_error(out, case.expected(weights, x, ids, router)) <= 1e-6


@pytest.mark.parametrize(
    "buffers",
    [
        lambda hidden: torch.full((4, 40, 80), float("nan"))[:, :, :hidden],
        lambda hidden: torch.full((40, 4, hidden), float("nan")).transpose(0, 1),
        lambda hidden: torch.full((4, 43, hidden + 1), float("nan"))[:, 2:42, 1:],
    ],
    ids=["longer rows", "experts side by side", "odd places"],
)
@pytest.mark.parametrize("tile", [POINTERS, MAPS], ids=["pointers", "maps"])
def test_batched(tile, buffers):
    case = dataclasses.replace(BASE, bias=True)
    weights = case.weights()
    walk = dataclasses.replace(tile, persistent=1)
    launcher = BatchedExpertsLauncher(
        **weights, activation=case.activation, config=GroupedConfig(walk, walk, pdl=False)
    )
    counts = (0, 37, 5, 40)
    x, out = (buffers(case.hidden) for _ in range(2))
    for expert, rows in enumerate(counts):
        x[expert, :rows] = torch.randn(rows, case.hidden)
    count = torch.tensor(counts, dtype=torch.int32)
    launcher(x, count, poisoned(launcher.workspace(40), "cpu"), out)
    expected = experts_batched_torch(x, count, **weights, activation=case.activation)
    for expert, rows in enumerate(counts):
        assert relative_error(out[expert, :rows], expected[expert, :rows]) <= 1e-6 or rows == 0
        assert torch.isnan(out[expert, rows:]).all()
