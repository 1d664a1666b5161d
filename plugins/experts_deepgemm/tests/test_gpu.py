"""DeepGEMM itself, where it runs: bf16 against float32, FP8 against Hopper's own arithmetic and float32, both formats.

T tokens · H hidden · I intermediate · E experts · K top-k · C row capacity.
"""

from __future__ import annotations

import attrs
import pytest
import torch

import moe_core
from experts_deepgemm.availability import probe
from moe_core import formats, ops
from moe_core.config import ActivationSpec, MoEConfig
from moe_core.emulated import dequantize_weights
from moe_core.kernel import MoEKernel
from moe_core.ops import contiguous
from moe_core.quant import UNQUANTIZED, QuantScheme, QuantSpec, ScaleFormat
from moe_core.reference import moe_reference
from moe_core.types import ExpertWeights, GateUpLayout, Routing
from tests.quant.hopper_fp8 import HopperStep, matrix_unit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_library = pytest.mark.skipif(not probe().ok, reason=probe().reason)

E, K, H, I = 4, 2, 256, 128
CONFIG = MoEConfig(num_experts=E, top_k=K, hidden_size=H, intermediate_size=I, dtype=torch.bfloat16)


def fp8(scale: ScaleFormat) -> QuantScheme:
    name = "fp8_block" if scale is ScaleFormat.FP32 else "fp8_block_ue8m0"
    return QuantScheme(
        name,
        QuantSpec("float8_e4m3fn", (128, 128), scale),
        QuantSpec("float8_e4m3fn", (1, 128), scale, dynamic=True),
    )


SCHEMES = {"bf16": UNQUANTIZED, "fp8": fp8(ScaleFormat.FP32), "ue8m0": fp8(ScaleFormat.UE8M0)}


def weights_of(config: MoEConfig, scheme: QuantScheme) -> ExpertWeights:
    generator = torch.Generator("cuda").manual_seed(0)
    layout, hidden, inner = config.activation.gate_up_layout, config.hidden_size, config.intermediate_size
    halves, experts = 1 if layout is None else 2, config.num_experts
    w13 = torch.randn(experts, halves * inner, hidden, generator=generator, device="cuda") * hidden**-0.5
    w2 = torch.randn(experts, hidden, inner, generator=generator, device="cuda") * inner**-0.5
    if scheme.weight is None:
        return ExpertWeights(w13.bfloat16(), w2.bfloat16(), layout)
    q13, s13 = formats.quantize(w13.unflatten(1, (halves, inner)), scheme.weight)
    q2, s2 = formats.quantize(w2, scheme.weight)
    return ExpertWeights(q13.flatten(1, 2), q2, layout, w13_scale=s13, w2_scale=s2)


def inputs(tokens: int, seed: int = 1, config: MoEConfig = CONFIG) -> tuple[torch.Tensor, Routing]:
    generator, top_k = torch.Generator("cuda").manual_seed(seed), config.top_k
    x = torch.randn(tokens, config.hidden_size, generator=generator, device="cuda").bfloat16()
    ids = torch.randint(-1, config.num_experts, (tokens, top_k), generator=generator, device="cuda")
    return x, Routing(ids, torch.rand(tokens, top_k, generator=generator, device="cuda"))


def relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-9))


def assert_same_codes(q: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit by bit; only the sign of a NaN is free."""
    nan = expected.float().isnan()
    assert torch.equal(q.float().isnan(), nan)
    assert torch.equal(q.view(torch.uint8)[~nan], expected.view(torch.uint8)[~nan])


@needs_library
@pytest.mark.parametrize("dispatch", ["local", "batched"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize(
    "activation", [ActivationSpec("silu"), ActivationSpec("swiglu_oai", GateUpLayout.UP_GATE, limit=1.0)],
    ids=["silu", "up_gate"],
)  # fmt: skip
def test_numbers(dispatch, scheme, activation) -> None:
    config = attrs.evolve(CONFIG, activation=activation)
    kernel = MoEKernel(moe_core.plan(config, scheme=scheme, dispatch=dispatch, experts="deepgemm", device="cuda"))
    weights = weights_of(config, scheme)
    for tokens in (0, 1, 3, 130, 1000):
        x, routing = inputs(tokens)
        out, _ = kernel(x, routing, weights)
        if not tokens:
            assert out.shape == (0, H)
            continue
        if scheme is UNQUANTIZED:
            expected = moe_reference(x.float(), routing.topk_ids, routing.topk_weights, weights, activation)
            assert relative(out, expected) <= 0.006, tokens
            continue
        # the library's sums are the matrix unit's, its first result is bf16
        step = HopperStep(config, scheme, weights, matrix_unit, matrix_unit, between=torch.bfloat16)
        assert relative(out, step(x, routing.topk_ids, routing.topk_weights)) <= 0.001, tokens


SIZES = {"qwen3": (8, 2048, 768), "deepseek_tp8": (8, 7168, 256), "mixtral": (2, 4096, 14336)}
"""K, H and I of models."""


@needs_library
@pytest.mark.parametrize("size", SIZES)
def test_error_at_the_sizes_of_models(size) -> None:
    """Of the whole output. A single row's is the format's and varies: 0.03 to 0.066 where rows are short."""
    top_k, hidden, inner = SIZES[size]
    config = attrs.evolve(CONFIG, num_experts=8, top_k=top_k, hidden_size=hidden, intermediate_size=inner)
    scheme = SCHEMES["fp8"]
    assert scheme.weight is not None
    kernel = MoEKernel(moe_core.plan(config, scheme=scheme, dispatch="local", experts="deepgemm", device="cuda"))
    weights = weights_of(config, scheme)
    plain = dequantize_weights(weights, scheme.weight)
    for tokens, steps in ((1, 16), (256, 1)):
        outs, expected = [], []
        for seed in range(steps):
            x, routing = inputs(tokens, seed, config)
            outs.append(kernel(x, routing, weights)[0])
            expected.append(moe_reference(x.float(), routing.topk_ids, routing.topk_weights, plain, config.activation))
        assert relative(torch.cat(outs), torch.cat(expected)) <= 0.048, tokens


@needs_library
def test_transposed_weights() -> None:
    weights = weights_of(CONFIG, UNQUANTIZED)
    stored = {name: getattr(weights, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("w13", "w2")}
    kernel = MoEKernel(moe_core.plan(CONFIG, dispatch="local", experts="deepgemm", device="cuda"))
    x, routing = inputs(130)
    expected, _ = kernel(x, routing, weights)
    out, _ = kernel(x, routing, attrs.evolve(weights, **stored))
    assert relative(out, expected) <= 0.003


@needs_library
@pytest.mark.parametrize("dispatch", ["local", "batched"])
def test_a_captured_step_follows_its_inputs(dispatch) -> None:
    scheme = SCHEMES["fp8"]
    config = attrs.evolve(CONFIG, cuda_graph=True)
    kernel = MoEKernel(moe_core.plan(config, scheme=scheme, dispatch=dispatch, experts="deepgemm", device="cuda"))
    weights = weights_of(config, scheme)
    x, routing = inputs(130)
    kernel(x, routing, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = kernel(x, routing, weights)
    for seed in (2, 3):
        fresh, other = inputs(130, seed)
        x.copy_(fresh), routing.topk_ids.copy_(other.topk_ids), routing.topk_weights.copy_(other.topk_weights)
        graph.replay()
        expected, _ = kernel(fresh, other, weights)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_rows_are_quantized_bit_by_bit(power_of_two) -> None:
    """Needs no library: our kernels against their twins, NaN, Inf, zeros and ties among the values."""
    quantize = ops.RowQuantization(power_of_two)
    problem, activation = ops.ExpertsProblem(E, K, H, I, gated=False), ops.Activation("relu2", None)
    x, routing = inputs(700)
    x[::7] *= 1e4
    x[5, 3], x[9, 200], x[11, :128], x[13] = torch.nan, torch.inf, 0, 2.0**-20
    layer = ops.ContiguousRows(problem, activation, quantize)
    shapes = ops.contiguous_workspace(problem, torch.bfloat16, 700, quantize)
    space = {name: torch.empty(shape, dtype=dtype, device="cuda") for name, (shape, dtype) in shapes.items()}
    layer.gather(x, None, routing.topk_ids, None, space)
    slot_of_row, expert_of_row = contiguous.gather_rows_torch(routing.topk_ids, E)
    used = slot_of_row >= 0
    assert torch.equal(space["expert_of_row"], expert_of_row)
    space["h"].normal_()
    layer.activate(space)
    act = torch.relu(space["h"][used].float()).square().bfloat16()
    for name, source in (("x", x[slot_of_row[used] // K]), ("act", act)):
        q, scale = contiguous.quantize_rows_torch(source, quantize)
        spec = fp8(ScaleFormat.UE8M0 if power_of_two else ScaleFormat.FP32).activation
        assert_same_codes(q, formats.quantize(source, spec)[0])
        got = contiguous.transposed_scale(space[f"{name}_scale"], source.shape[1] // 128)[used]
        torch.testing.assert_close(got, scale, rtol=0, atol=0, equal_nan=True)
        assert_same_codes(space[name][used], q)
