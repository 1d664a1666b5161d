"""The experts step on a GPU against its twin: every path, odd sizes, poisoned memory, graphs, determinism."""

import dataclasses

import pytest
import torch
from case import ExpertsCase, poisoned, relative_error, run

from moe_core.ops import (
    Activation,
    AlternatingConfig,
    BatchedExpertsLauncher,
    GroupedConfig,
    ScanConfig,
    SlotsConfig,
    TileConfig,
    experts_batched_torch,
)

TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3, torch.float32: 1e-5}
GPT_OSS = Activation("swiglu_oai", "interleaved", limit=1.0)

SLOTS = SlotsConfig(2, 512, 4, 4, 256, 4, preload=1)
SLOTS_N = SlotsConfig(32, 32, 4, 32, 32, 8, preload=1)
SCAN = ScanConfig(TileConfig(16, 32, 128, 4, 3), TileConfig(16, 64, 128, 4, 3))
POINTERS = GroupedConfig(TileConfig(64, 64, 64, 4, 3, 32, tma=False), TileConfig(64, 128, 64, 4, 3, 32, tma=False))
MAPS = GroupedConfig(TileConfig(128, 128, 64, 8, 4, 64), TileConfig(128, 256, 64, 8, 4, 64))
WALK = GroupedConfig(TileConfig(128, 128, 64, 8, 3, 64, persistent=1), TileConfig(128, 256, 64, 8, 3, persistent=1))
TALL = GroupedConfig(TileConfig(128, 128, 64, 8, 4, 64, tall=True), TileConfig(128, 256, 64, 8, 4, 64, tall=True))
KEEP = dataclasses.replace(TALL, keep_x=True, pdl=False)
ALTERNATING = GroupedConfig(TileConfig(64, 128, 64, 8, 4, 32), AlternatingConfig(128, 2, 2))
ALTERNATING_WIDE = GroupedConfig(TileConfig(128, 128, 64, 8, 4, 64), AlternatingConfig(256, 1, 2))


@pytest.fixture(autouse=True)
def _plain_float32_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def check(case: ExpertsCase, config=None) -> None:
    out, expected = run(case, config)
    assert relative_error(out, expected) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "config", [SLOTS, SCAN, POINTERS, MAPS, WALK], ids=["slots", "scan", "pointers", "maps", "walk"]
)
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate", "experts", "top_k"),
    [(1, 2880, 1408, 8, 4), (5, 776, 776, 3, 1), (33, 1408, 512, 16, 6), (60, 512, 2880, 1, 1), (31, 256, 128, 64, 16)],
)
def test_paths_and_odd_sizes(config, dtype, tokens, hidden, intermediate, experts, top_k):
    check(ExpertsCase(tokens, hidden, intermediate, experts, top_k, dtype=dtype, device="cuda"), config)


@pytest.mark.parametrize("config", [SLOTS_N, SCAN, POINTERS, MAPS], ids=["slots", "scan", "pointers", "maps"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_transposed_interleaved_with_bias(config, tokens):
    case = ExpertsCase(
        tokens, 720, 360, 8, 4, GPT_OSS, bias=True, transposed=True, dtype=torch.bfloat16, device="cuda"
    )  # fmt: skip
    check(case, config)


@pytest.mark.parametrize(
    "config", [SLOTS, SCAN, POINTERS, MAPS, None], ids=["slots", "scan", "pointers", "maps", "own"]
)
@pytest.mark.parametrize("change", [
    {"weight_on_input": True}, {"num_rows": 7}, {"num_rows": 0}, {"ids_dtype": torch.int64}, {"routing": "one"},
    {"routing": "none"}, {"row_stride": 520}, {"row_stride": 515}, {"bias": True},
    {"activation": Activation("gelu", "up_gate", limit=0.7)}, {"activation": Activation("relu2", None)},
    {"activation": Activation("gelu_tanh", "interleaved")},
], ids=str)  # fmt: skip
def test_variants(config, change):
    case = ExpertsCase(20, 512, 256, 8, 3, dtype=torch.bfloat16, device="cuda")
    check(dataclasses.replace(case, **change), config)


@pytest.mark.parametrize("tokens", [1, 3, 17, 100, 700, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_own_choice(tokens, dtype):
    check(ExpertsCase(tokens, 512, 384, 32, 8, dtype=dtype, device="cuda", routing="distinct"))


@pytest.mark.parametrize(
    "config", [ALTERNATING, ALTERNATING_WIDE, TALL, KEEP], ids=["turns", "wide turns", "tall", "keep"]
)
@pytest.mark.parametrize("routing", ["random", "one"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(512, 256), (712, 200), (2880, 136)])
@pytest.mark.parametrize("tokens", [1, 90, 1500])
def test_gemms_for_many_rows(config, routing, hidden, intermediate, tokens):
    case = ExpertsCase(
        tokens, hidden, intermediate, 12, 3, bias=True, routing=routing, dtype=torch.bfloat16, device="cuda"
    )
    check(case, config)


@pytest.mark.parametrize("tokens", [1300, 2800])
def test_tall_tiles_of_more_experts_than_one_program_lists(tokens):
    check(ExpertsCase(tokens, 520, 256, 70, 8, row_stride=523, dtype=torch.bfloat16, device="cuda"), KEEP)


def test_many_rows_of_one_expert():
    check(ExpertsCase(5000, 256, 256, 512, 2, routing="one", dtype=torch.bfloat16, device="cuda"))


def test_no_tokens():
    out, _ = run(ExpertsCase(0, 64, 64, 2, 1, dtype=torch.bfloat16, device="cuda"))
    assert out.shape == (0, 64)


@pytest.mark.parametrize("tokens", [1, 12, 300])
def test_same_bits_every_time(tokens):
    case = ExpertsCase(tokens, 512, 384, 16, 4, dtype=torch.bfloat16, device="cuda")
    first, _ = run(case)
    for _ in range(5):
        again, _ = run(case)
        assert torch.equal(first, again)


@pytest.mark.parametrize("tokens", [1, 8, 48, 400])
def test_thousand_routings_through_one_graph(tokens):
    """One capture; 250 routings a size, each on poisoned workspaces."""
    case = ExpertsCase(tokens, 256, 128, 16, 4, dtype=torch.bfloat16, device="cuda")
    launcher, weights = case.launcher()
    x, ids, router = case.inputs()
    out = torch.full_like(x, float("nan"))
    workspace = poisoned(launcher.workspace(tokens), "cuda")
    launcher(x, ids, router, workspace, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launcher(x, ids, router, workspace, out)
    for seed in range(250):
        for old, new in zip((x, ids, router), case.inputs(seed), strict=True):
            old.copy_(new)
        for name, tensor in poisoned(launcher.workspace(tokens), "cuda").items():
            workspace[name].copy_(tensor)
        out.fill_(float("nan"))
        graph.replay()
        assert relative_error(out, case.expected(weights, x, ids, router)) <= 5e-3, seed


@pytest.mark.parametrize("strides", ["plain", "experts side by side", "longer rows", "odd places"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (1, 64, 0, 130), (200, 200, 200, 200), (3, 0, 77, 1)])
def test_batched(counts, transposed, strides):
    activation = GPT_OSS if transposed else Activation()
    case = ExpertsCase(
        1, 720, 360, 4, 1, activation, bias=True, transposed=transposed, dtype=torch.bfloat16, device="cuda"
    )
    weights = case.weights()
    launcher = BatchedExpertsLauncher(**weights, activation=activation)
    capacity = 200
    size, view = {
        "plain": ((4, capacity, 720), lambda buffer: buffer),
        "experts side by side": ((capacity, 4, 720), lambda buffer: buffer.transpose(0, 1)),
        "longer rows": ((4, capacity, 728), lambda buffer: buffer[:, :, :720]),
        "odd places": ((4, capacity + 3, 721), lambda buffer: buffer[:, 2:-1, 1:]),
    }[strides]
    x, out = (view(torch.full(size, float("nan"), dtype=torch.bfloat16, device="cuda")) for _ in range(2))
    for expert, count in enumerate(counts):
        x[expert, :count] = torch.randn(count, 720, device="cuda", dtype=torch.bfloat16)
    count = torch.tensor(counts, dtype=torch.int32, device="cuda")
    launcher(x, count, poisoned(launcher.workspace(capacity), "cuda"), out)
    expected = experts_batched_torch(x, count, **weights, activation=activation)
    for expert, rows in enumerate(counts):
        if rows:
            assert relative_error(out[expert, :rows], expected[expert, :rows]) <= 5e-3
