"""FP8 experts on a CUDA device (`python -m pytest plugins/quant_fp8/tests/test_gpu.py`); elsewhere all are skipped."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fp8_case import (
    OAI,
    SCHEMES,
    Case,
    check_row_quantizer,
    check_static_quantizer,
    poisoned,
    relative_error,
    run,
    run_batched,
)

import moe_core
from moe_core import ActivationSpec, GateUpLayout, MoEConfig, RouterSpec, formats
from moe_core.ops import (
    AlternatingConfig,
    Fp8ExpertsLauncher,
    Fp8GroupedConfig,
    Fp8SpecializedConfig,
    Fp8StreamConfig,
    ScanConfig,
    SlotsConfig,
    TileConfig,
)
from moe_core.timing import capture
from quant_fp8 import plugin, schemes

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a CUDA device of compute capability 8.9",
    ),
]
TILE = TileConfig(64, 128, 128, 4, 3, small_m=32, tma=HOPPER)
WARPS, TURNS = Fp8SpecializedConfig(), Fp8SpecializedConfig(5, 1, 64)
HALVES = Fp8SpecializedConfig(4, 1, 64, halves=True)
PATHS = {
    "slots": SlotsConfig(2, 256, 2, 4, 128, 4, pdl=HOPPER),
    "scan": ScanConfig(TileConfig(16, 32, 128, 4, 4), TileConfig(16, 64, 128, 4, 4), pdl=HOPPER),
    "by_slot": ScanConfig(TileConfig(16, 32, 128, 4, 4), TileConfig(16, 64, 128, 4, 4), by_slot=True, pdl=HOPPER),
    "grouped": Fp8GroupedConfig(TILE, TILE, pdl=HOPPER),
    "specialized": Fp8GroupedConfig(WARPS, WARPS, pdl=False),
    "turns": Fp8GroupedConfig(TURNS, TURNS),
    "alternating": Fp8GroupedConfig(WARPS, AlternatingConfig(256, 2, 2), pdl=False),
    "stream": Fp8StreamConfig(),
}


@pytest.fixture(scope="session", autouse=True)
def plugin_of_this_checkout() -> None:
    """A GPU machine may hold the checkout alone: then the plugin is registered in process."""
    from moe_core.plugins import register_plugin, registry

    if "fp8_triton" not in registry().experts:
        register_plugin(plugin, "fp8")


def near(case: Case) -> float:
    """How far a result may be from what it should be: where the arithmetic is known, a code in thousands may differ."""
    return 0.001 if case.is_known else 0.006


def check(case: Case, out: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor) -> None:
    """As near to float64 as the format allows, and what this device's arithmetic gives; of 40 tokens or more."""
    weight_only = case.spec.activation is None
    error, formats_own = relative_error(out, exact), relative_error(expected, exact)
    assert error <= 1.1 * formats_own + 0.003  # bf16 rows before the sum
    assert error <= (0.006 if weight_only else 0.05)
    assert relative_error(out, expected) <= near(case)


def runs(scheme: str, path: str) -> bool:
    if path == "stream":
        return HOPPER and "weight_only" not in scheme and scheme != "fp8_tensor_dynamic"
    if path == "alternating":
        return HOPPER and scheme in ("fp8_block", "fp8_block_ue8m0")
    if path in ("specialized", "turns"):
        return HOPPER and "weight_only" not in scheme and scheme != "fp8_tensor"
    return scheme != "fp8_tensor_dynamic" or path == "grouped"


@pytest.mark.parametrize(("scheme", "path"), [(s, p) for s in SCHEMES for p in PATHS if runs(s, p)])
def test_schemes_and_paths(scheme, path):
    tokens = 8 if path in ("by_slot", "stream") else 40
    case = Case(scheme, tokens, hidden=272, experts=7, top_k=3, dtype=torch.bfloat16, device="cuda")
    check(case, *run(case, PATHS[path], steps=-(-40 // tokens)))


@pytest.mark.parametrize("tokens", [1, 4, 30, 200, 1500])
@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_tensor", "fp8_tensor_dynamic", "fp8_channel", "fp8_weight_only"])
def test_own_choice(scheme, tokens):
    case = Case(scheme, tokens, 512, 256, 16, 4, routing="distinct", dtype=torch.bfloat16, device="cuda")
    check(case, *run(case, steps=-(-40 // tokens)))


@pytest.mark.parametrize("activation", [
    OAI, ActivationSpec("gelu", GateUpLayout.UP_GATE, limit=0.7), ActivationSpec("relu2", None),
], ids=["oai", "up_gate", "relu2"])  # fmt: skip
@pytest.mark.parametrize("tokens", [2, 40, 300])
def test_activations_and_layouts(activation, tokens):
    for scheme in ("fp8_block", "fp8_channel"):
        case = Case(scheme, tokens, activation=activation, num_rows=tokens - 1, dtype=torch.bfloat16, device="cuda")
        out, expected, _ = run(case)
        assert relative_error(out, expected) <= near(case)


@pytest.mark.parametrize("path", ["scan", "grouped", "specialized", "turns", "stream"])
@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_channel"])
def test_given_rows_on_any_border(scheme, path):
    """A dispatch may hand over views: of every stride, from any byte on."""
    if not runs(scheme, path):
        pytest.skip("not on this device")
    case = Case(scheme, 8, dtype=torch.bfloat16, device="cuda")
    record = case.record()
    launcher = Fp8ExpertsLauncher(case.weights(record), top_k=2, dtype=torch.bfloat16, plan=((None, PATHS[path]),))
    x, ids, router = case.inputs()
    q, scale = (part.cuda() for part in formats.quantize(x.cpu(), case.spec.activation))
    views = [q]
    for first, last in ((1, 2), (4, 4), (8, 8)):
        wide = torch.empty(8, first + case.hidden + last, dtype=torch.uint8, device="cuda")
        wide[:, first:-last] = q.view(torch.uint8)
        views.append(wide.view(torch.float8_e4m3fn)[:, first:-last])
    outs = [
        launcher(rows, ids, router, poisoned(launcher.workspace(8), "cuda"), torch.empty_like(x), None, scale)
        for rows in views
    ]
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("path", ["slots", "scan", "grouped", "stream"])
def test_gate_and_up_with_different_input_scales(path):
    if not runs("fp8_tensor", path):
        pytest.skip("not on this device")
    tokens = 8 if path == "stream" else 40
    case = Case("fp8_tensor", tokens, halves_differ=True, dtype=torch.bfloat16, device="cuda")
    out, expected, _ = run(case, PATHS[path], steps=40 // tokens)
    assert relative_error(out, expected) <= near(case)


@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_tensor", "fp8_tensor_dynamic", "fp8_channel", "fp8_weight_only"])
@pytest.mark.parametrize("given", [False, True], ids=["plain", "given"])
def test_batched(scheme, given):
    if given and scheme not in schemes.ROW_WISE:
        pytest.skip("not quantized row by row")
    counts = (0, 37, 5, 150, 1)
    case = Case(scheme, dtype=torch.bfloat16, device="cuda")
    out, expected = run_batched(case, counts, 150, given=given)
    for expert, rows in enumerate(counts):
        assert rows == 0 or relative_error(out[expert, :rows], expected[expert, :rows]) <= near(case)
        assert torch.isnan(out[expert, rows:]).all()


@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_block_ue8m0", "fp8_channel"])
def test_quantizers_have_the_formats_bits(scheme):
    check_row_quantizer(scheme, "cuda")


def test_static_scales_saturate_what_is_finite():
    check_static_quantizer("cuda")


@pytest.mark.parametrize("path", ["slots", "scan", "grouped", "specialized", "stream"])
@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_channel", "fp8_tensor"])
def test_nan_and_inf_reach_their_own_token_and_no_other(scheme, path):
    if not runs(scheme, path):
        pytest.skip("not on this device")
    case = Case(scheme, tokens=6, dtype=torch.bfloat16, device="cuda")
    record = case.record()
    launcher = Fp8ExpertsLauncher(case.weights(record), top_k=2, dtype=torch.bfloat16, plan=((None, PATHS[path]),))
    x, _, _ = case.inputs()
    ids = torch.tensor([[0, 1], [2, -1], [-1, -1], [2, 3], [0, 3], [3, 1]], dtype=torch.int32, device="cuda")
    ones = torch.ones(6, 2, device="cuda")

    def step() -> torch.Tensor:
        out = torch.full_like(x, float("nan"))
        return launcher(x, ids, ones, poisoned(launcher.workspace(6), "cuda"), out)

    clean = step()
    assert bool((clean[2] == 0).all())
    x[1, 5], x[4, 7], x[2, 3] = torch.inf, torch.nan, torch.nan
    got = step()
    assert not bool(got[[1, 4]].isfinite().any())
    kept = [0, 2, 3, 5]
    assert torch.equal(got[kept], clean[kept])


@pytest.mark.parametrize("given", [False, True], ids=["plain", "given"])
@pytest.mark.parametrize("changes", [
    {"routing": "none"}, {"routing": "one", "num_rows": 3}, {"num_rows": 0}, {"num_rows": 5, "ids_dtype": torch.int64},
    {"activation": ActivationSpec("silu", GateUpLayout.UP_GATE)}, {"hidden": 4112, "intermediate": 1552},
    {"experts": 60, "top_k": 8},
], ids=["none", "one", "no_rows", "int64", "up_gate", "large", "all_experts"])  # fmt: skip
@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_block_ue8m0", "fp8_channel", "fp8_tensor"])
def test_stream(scheme, changes, given):
    if not runs(scheme, "stream") or (given and scheme not in schemes.ROW_WISE):
        pytest.skip("not on this device, or not quantized row by row")
    for tokens in (8, 1, 5):
        rows = changes.get("num_rows")
        own = changes if rows is None else {**changes, "num_rows": min(rows, tokens)}
        case = Case(scheme, tokens, dtype=torch.bfloat16, device="cuda", **own)
        out, expected, _ = run(case, PATHS["stream"], given=given, steps=3)
        assert relative_error(out, expected) <= near(case)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU (compute capability 9.0)")
@pytest.mark.parametrize("changes", [
    {"routing": "none"}, {"routing": "one"}, {"num_rows": 0}, {"num_rows": 77}, {"intermediate": 112},
    {"hidden": 1040}, {"experts": 150}, {"activation": ActivationSpec("silu", GateUpLayout.UP_GATE)},
], ids=["none", "one", "no_rows", "rows", "one_block", "wide", "many_experts", "up_gate"])  # fmt: skip
def test_loading_warps(changes):
    case = Case("fp8_block", 300, dtype=torch.bfloat16, device="cuda", **changes)
    short = [(WARPS, AlternatingConfig(128, 3, 4)), (TURNS, AlternatingConfig(256, 1, 2))]
    for up, down in [(WARPS, WARPS), (TURNS, TURNS), *short]:
        out, expected, _ = run(case, Fp8GroupedConfig(up, down, early=False), steps=2)
        assert relative_error(out, expected) <= near(case)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU (compute capability 9.0)")
@pytest.mark.parametrize(("up", "down"), [
    (TURNS, TURNS), (TURNS, AlternatingConfig(128, 3, 4)), (HALVES, HALVES), (HALVES, AlternatingConfig(128, 3, 4)),
], ids=["turns", "turns_alternating", "halves", "halves_alternating"])  # fmt: skip
def test_kernels_that_come_early_or_share_tiles_change_no_bit(up, down):
    """One graph of steps whose rows and their number change, against kernels that come one after the other."""
    case = Case("fp8_block", 300, hidden=272, intermediate=256, experts=11, dtype=torch.bfloat16, device="cuda")
    steps = [
        (case.inputs(seed), torch.tensor([rows], dtype=torch.int32, device="cuda"))
        for seed, rows in enumerate((300, 1, 0, 40, 299, 7))
    ]
    plain = Fp8GroupedConfig(TURNS, down if isinstance(down, AlternatingConfig) else TURNS, early=False)
    weights, outs = case.weights(case.record()), []
    for config in (plain, Fp8GroupedConfig(up, down)):
        launcher = Fp8ExpertsLauncher(weights, top_k=case.top_k, dtype=case.dtype, plan=((None, config),))
        space = poisoned(launcher.workspace(case.tokens), "cuda")
        outs.append([torch.full_like(x, float("nan")) for (x, _, _), _ in steps])
        calls = [
            partial(launcher, x, ids, router, space, out, rows)
            for ((x, ids, router), rows), out in zip(steps, outs[-1], strict=True)
        ]
        graph = capture(calls)
        for out in outs[-1]:
            out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
    assert all(map(torch.equal, *outs))
    assert not any(bool(out.isnan().any()) for out in outs[0])


def test_blocks_of_zeros_and_of_the_largest_values():
    case = Case("fp8_block", tokens=9, hidden=256, intermediate=256, dtype=torch.bfloat16, device="cuda")
    record = case.record()
    record.w13.view(torch.uint8)[:, :128, :128] = 0
    record.w2.view(torch.uint8)[:, 128:, 128:] = 0x7E  # 448
    x, ids, router = case.inputs()
    x[3], x[4] = 0, 3e4
    for path in ("slots", "scan", "grouped"):
        launcher = Fp8ExpertsLauncher(case.weights(record), top_k=2, dtype=torch.bfloat16, plan=((None, PATHS[path]),))
        out = launcher(x, ids, router, poisoned(launcher.workspace(9), "cuda"), torch.empty_like(x))
        wanted = case.expected(record, PATHS[path], x=x, topk_ids=ids, topk_weights=router)
        assert relative_error(out, wanted) <= near(case)


SIZES = {"qwen3": (8, 2048, 768), "deepseek_tp8": (8, 7168, 256), "mixtral_tp4": (2, 4096, 3584)}
"""K, H and I of models."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_channel"])
def test_error_at_the_sizes_of_models(scheme, size):
    """Of the whole output. A single row's is the format's and varies: 0.035 to 0.055 in float32 arithmetic too."""
    top_k, hidden, inner = SIZES[size]
    for tokens, steps in ((1, 16), (256, 1)):
        case = Case(scheme, tokens, hidden, inner, 8, top_k, routing="distinct", dtype=torch.bfloat16, device="cuda")
        record = case.record()
        launcher = Fp8ExpertsLauncher(case.weights(record), top_k=top_k, dtype=case.dtype)
        space, outs, exact = poisoned(launcher.workspace(tokens), "cuda"), [], []
        for seed in range(steps):
            x, ids, router = case.inputs(seed)
            outs.append(launcher(x, ids, router, space, torch.empty_like(x)))
            exact.append(case.exact(record, x, ids, router))
        assert relative_error(torch.cat(outs), torch.cat(exact)) <= 0.048, tokens


E, H, I, K = 16, 256, 384, 4


def layer(scheme, **changes):
    dispatch, experts = changes.pop("dispatch", None), changes.pop("experts", None)
    config = MoEConfig(
        **{"num_experts": E, "top_k": K, "hidden_size": H, "intermediate_size": I, "dtype": torch.bfloat16,
           "router": RouterSpec.of("softmax", renormalize=True), **changes}
    )  # fmt: skip
    runner = moe_core.build_runner(config, scheme=scheme, device="cuda", dispatch=dispatch, experts=experts)
    generator = torch.Generator().manual_seed(0)
    for expert in range(E):
        for name, shape in {"gate": (I, H), "up": (I, H), "down": (H, I)}.items():
            runner.routed_experts.load_expert(expert, name, torch.randn(shape, generator=generator) * 0.1)
            if scheme == "fp8_tensor":
                runner.routed_experts.load_expert(expert, f"{name}_input_scale", torch.tensor(8.0 / 448))
    runner.routed_experts.pack_weights()
    return runner


def inputs(tokens, seed=1):
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = {"generator": generator, "device": "cuda"}
    return torch.randn(tokens, H, **draw).to(torch.bfloat16), torch.randn(tokens, E, **draw)


@pytest.mark.parametrize("scheme", [scheme.name for scheme in schemes.SCHEMES])
def test_chosen_on_a_gpu_without_being_told(scheme):
    runner = layer(scheme)
    assert [r.candidate.name for r in runner.plan.ranges] == ["fp8_triton"]
    case = Case(scheme, 0, H, I, E, K, dtype=torch.bfloat16, device="cuda")
    record = runner.routed_experts.weights
    launcher = Fp8ExpertsLauncher(case.weights(record), top_k=K, dtype=torch.bfloat16)
    for tokens in (0, 1, 9, 300):
        x, logits = inputs(tokens)
        got = runner(x, logits)
        router, ids = logits.softmax(dim=1).topk(K, dim=1)
        router = router / router.sum(dim=1, keepdim=True)
        wanted = case.expected(record, launcher.config(tokens), x=x, topk_ids=ids, topk_weights=router)
        assert tokens == 0 or relative_error(got, wanted) <= near(case)


@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_tensor", "fp8_tensor_dynamic", "fp8_channel"])
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_a_captured_step_never_waits_and_follows_the_routing(scheme, tokens):
    runner = layer(scheme, cuda_graph=True, max_tokens_per_rank=tokens)
    x, logits = inputs(tokens)
    with torch.cuda.stream(torch.cuda.Stream()):
        runner(x, logits)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner(x, logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = runner(x, logits)
    for seed in range(3):
        new_x, new_logits = inputs(tokens, seed)
        x.copy_(new_x)
        logits.copy_(new_logits)
        graph.replay()
        assert torch.equal(out, runner(x, logits)), "the same bits in a graph and out of it, every time"


def test_a_compiled_layer_equals_the_eager_one():
    torch._dynamo.reset()
    runner = layer("fp8_block")
    compiled = torch.compile(lambda x, logits: torch.relu(runner(x * 2, logits)), fullgraph=True, dynamic=True)
    for tokens in (3, 200):
        x, logits = inputs(tokens)
        torch.testing.assert_close(compiled(x, logits), torch.relu(runner(x * 2, logits)))
