"""NVFP4 experts on a CUDA device, elsewhere skipped: `python -m pytest plugins/quant_nvfp4/tests/test_gpu.py`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from nvfp4_case import Case, poisoned, relative_error, run, run_batched

import moe_core
from moe_core import ActivationSpec, GateUpLayout, MoEConfig, RouterSpec
from moe_core.emulated import dequantize_weights
from moe_core.ops import Nvfp4BatchedLauncher, Nvfp4ExpertsLauncher
from moe_core.ops._launch import MAX_ALTERNATING, AlternatingConfig
from moe_core.ops._nvfp4_launch import (
    SHORTEST,
    GemmTile,
    Nvfp4BatchedConfig,
    Nvfp4GemmConfig,
    Nvfp4RowsConfig,
    Nvfp4SlotsConfig,
    WarpsConfig,
)
from moe_core.plugins import registry
from moe_core.reference import moe_reference
from quant_nvfp4 import plugin
from quant_nvfp4.schemes import MMA_LAYOUT, NVFP4

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="needs a CUDA device of compute capability 8.0",
    ),
]
TOLERANCE = 0.006
PATHS = {
    "slots": Nvfp4SlotsConfig(WarpsConfig(1, 4, depth=2), WarpsConfig(2, 4, depth=2), pdl=HOPPER),
    "slots together": Nvfp4SlotsConfig(
        WarpsConfig(1, 2, registers=80, together=True), WarpsConfig(1, 4, depth=4, together=True), pdl=HOPPER
    ),
    "rows": Nvfp4RowsConfig(WarpsConfig(4, 1, registers=72, fenced=True), WarpsConfig(4, 1, tiles=3), 1, pdl=HOPPER),
    "wide": Nvfp4RowsConfig(WarpsConfig(8, 1, registers=128), WarpsConfig(2, 2, registers=128), 3, pdl=HOPPER),
    "gemm": Nvfp4GemmConfig(GemmTile(128), GemmTile(64, group=2)),
    "gemm alternating": Nvfp4GemmConfig(GemmTile(64), AlternatingConfig(256, 1, 2)),
    "gemm alternating in two": Nvfp4GemmConfig(GemmTile(128), AlternatingConfig(128, 2, 2)),
}
NAMES = [name for name in PATHS if HOPPER or not name.startswith("gemm")]
OAI = ActivationSpec("swiglu_oai", GateUpLayout.INTERLEAVED, limit=1.0, bias=True)
SIZES = [
    (1, 2880, 1408, 8, 4), (33, 1408, 512, 16, 6), (90, 512, 2880, 1, 1), (31, 64, 64, 64, 16), (70, 1344, 256, 9, 3),
]  # fmt: skip
BATCHED = Nvfp4BatchedConfig(PATHS["rows"], GemmTile(64), few=8)
CHANGES = [
    {}, {"routing": "one"}, {"routing": "none"}, {"extreme": True}, {"row_stride": 264}, {"row_stride": 259},
    {"num_rows": 7}, {"num_rows": 0}, {"ids_dtype": torch.int64, "weight_on_input": True}, {"activation": OAI},
    {"activation": ActivationSpec("gelu", GateUpLayout.UP_GATE, limit=0.7, bias=True)},
    {"activation": ActivationSpec("relu2", None, bias=True)},
]  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def plugin_of_this_checkout() -> None:
    """A GPU machine may hold the checkout alone: then the plugin is registered in process."""
    from moe_core.plugins import register_plugin, registry

    if "nvfp4_triton" not in registry().experts:
        register_plugin(plugin, "nvfp4")


def check(case: Case, config=None) -> None:
    out, expected = run(case, config)
    assert relative_error(out, expected) <= TOLERANCE


@pytest.mark.parametrize("path", NAMES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_paths_and_odd_sizes(path, size):
    if path.startswith("gemm") and min(size[1:3]) < SHORTEST:
        pytest.skip("the GEMMs are for longer dot products")
    if "alternating" in path and size[2] > MAX_ALTERNATING:
        pytest.skip("for short I")
    check(Case(*size), PATHS[path])


@pytest.mark.parametrize("path", NAMES)
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_variants(path, change):
    inner = 256 if "alternating" in path else 320
    check(dataclasses.replace(Case(20, 256, inner, top_k=3), **change), PATHS[path])


@pytest.mark.parametrize("tokens", [1, 3, 17, 100, 700, 3000])
def test_own_choice(tokens):
    check(Case(tokens, 512, 384, 16, 4, routing="distinct"))


def test_no_tokens():
    out, _ = run(Case(0))
    assert out.shape == (0, 256)


@pytest.mark.parametrize("path", NAMES)
def test_nan_and_inf_reach_their_own_token_and_no_other(path):
    case = Case(9, 256, 256, top_k=2, routing="distinct")
    launcher = Nvfp4ExpertsLauncher(case.packed(case.record()), top_k=2, plan=((None, PATHS[path]),))
    x, ids, router = case.inputs()

    def step(x):
        out = torch.full_like(x, float("nan"))
        launcher(x, ids, router, poisoned(launcher.workspace(9), "cuda"), out)
        return out

    clean, dirty = step(x), x.clone()
    dirty[2, 5], dirty[6, 100] = float("nan"), float("inf")
    got = step(dirty)
    assert not bool(got[2].isfinite().any())
    assert not bool(got[6].isfinite().all())
    kept = [0, 1, 3, 4, 5, 7, 8]
    assert torch.equal(got[kept], clean[kept])


@pytest.mark.parametrize("activation", [ActivationSpec(), OAI], ids=["plain", "oai"])
@pytest.mark.parametrize("counts", [[0, 0, 0, 0, 0, 0], [1, 64, 0, 130, 3, 0], [200] * 6, [3, 0, 77, 1, 16, 9]])
def test_batched(counts, activation):
    case = Case(1, 320, 192, activation=activation)
    out, expected = run_batched(case, counts, 200)
    assert relative_error(out, expected) <= TOLERANCE


@pytest.mark.skipif(not HOPPER, reason="the GEMMs are for Hopper")
@pytest.mark.parametrize("activation", [ActivationSpec(), OAI], ids=["plain", "oai"])
@pytest.mark.parametrize("config", [None, BATCHED], ids=["own choice", "few: 8"])
@pytest.mark.parametrize("counts", [[0, 8, 9, 0, 0, 0], [1, 64, 0, 130, 3, 0], [200] * 6, [17, 0, 77, 1, 16, 9]])
@pytest.mark.parametrize("gap", [0, 1000], ids=["whole", "gaps"])
def test_batched_with_few_and_with_many_rows(counts, config, activation, gap):
    case = Case(1, 320, 448, activation=activation)
    out, expected = run_batched(case, counts, 200, config, gap)
    assert relative_error(out, expected) <= TOLERANCE


@pytest.mark.parametrize("counts", [[3, 0, 77, 1, 16, 9], [0] * 6])
def test_batched_rows_past_the_counts_stay(counts):
    case = Case(1, 320, 448)
    launcher = Nvfp4BatchedLauncher(case.packed(case.record()))
    x = torch.full((6, 100, 320), float("nan"), device="cuda", dtype=torch.bfloat16)
    out = torch.full_like(x, 7.0)
    valid = torch.arange(100, device="cuda") < torch.tensor(counts, device="cuda")[:, None]
    x[valid] = 1.0
    launcher(x, torch.tensor(counts, dtype=torch.int32, device="cuda"), poisoned(launcher.workspace(100), "cuda"), out)
    assert bool((out[~valid] == 7).all())


@pytest.mark.parametrize("tokens", [1, 12, 300])
def test_same_bits_every_time(tokens):
    case = Case(tokens, 512, 384, 16, 4)
    first, _ = run(case)
    for _ in range(5):
        assert torch.equal(run(case)[0], first)


@pytest.mark.parametrize("tokens", [1, 4, 48, 400])
def test_one_graph_and_many_routings(tokens):
    case = Case(tokens, 256, 128, 16, 4)
    record = case.record()
    launcher = Nvfp4ExpertsLauncher(case.packed(record), top_k=4)
    x, ids, router = case.inputs()
    out, workspace = torch.full_like(x, float("nan")), poisoned(launcher.workspace(tokens), "cuda")
    launcher(x, ids, router, workspace, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launcher(x, ids, router, workspace, out)
    for seed in range(20):
        for old, new in zip((x, ids, router), case.inputs(seed), strict=True):
            old.copy_(new)
        for name, tensor in poisoned(launcher.workspace(tokens), "cuda").items():
            workspace[name].copy_(tensor)
        out.fill_(float("nan"))
        graph.replay()
        assert relative_error(out, case.expected(record, x, ids, router)) <= TOLERANCE, seed


def layer(dispatch="local", **changes):
    sizes = {"num_experts": 16, "top_k": 4, "hidden_size": 256, "intermediate_size": 192, "dtype": torch.bfloat16}
    config = MoEConfig(**{**sizes, "router": RouterSpec.of("softmax", renormalize=True), **changes})
    runner = moe_core.build_runner(config, scheme="nvfp4", device="cuda", dispatch=dispatch)
    generator = torch.Generator().manual_seed(0)
    for expert in range(16):
        for name, shape in {"gate": (192, 256), "up": (192, 256), "down": (256, 192)}.items():
            runner.routed_experts.load_expert(expert, name, torch.randn(shape, generator=generator) / 10)
    runner.routed_experts.pack_weights()
    return runner


def truth(runner, x, logits):
    routing = runner._router.select_experts(logits)
    plain = dequantize_weights(runner.routed_experts.weights, NVFP4.weight)
    return moe_reference(
        x, routing.topk_ids, routing.topk_weights, plain, runner.plan.config.activation, compute_dtype=torch.float64
    )


@pytest.mark.parametrize("dispatch", ["local", "batched"])
def test_a_layer_runs_these_experts_without_being_told(dispatch):
    if dispatch not in registry().dispatch:
        pytest.skip(f"the package that brings dispatch {dispatch} is not installed")
    runner = layer(dispatch)
    assert [r.candidate.name for r in runner.plan.ranges] == ["nvfp4_triton"]
    assert runner.plan.weight_layout == MMA_LAYOUT
    for tokens in (0, 1, 7, 130, 1000):
        x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
        logits = torch.randn(tokens, 16, device="cuda")
        if tokens == 0:
            assert runner(x, logits).shape == (0, 256)
        else:
            assert relative_error(runner(x, logits), truth(runner, x, logits)) <= TOLERANCE


def test_a_compiled_layer_equals_the_eager_one():
    torch._dynamo.reset()
    runner = layer()
    compiled = torch.compile(lambda x, logits: torch.relu(runner(x * 2, logits)), fullgraph=True, dynamic=True)
    for tokens in (3, 17, 200):
        x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
        logits = torch.randn(tokens, 16, device="cuda")
        torch.testing.assert_close(compiled(x, logits), torch.relu(runner(x * 2, logits)))
