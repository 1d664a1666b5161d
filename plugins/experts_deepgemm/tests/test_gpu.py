"""DeepGEMM itself, where it runs: both formats and both schemes against float32 on the dequantized weights.

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
from moe_core.emulated import EmulatedExperts, dequantize_weights
from moe_core.kernel import MoEKernel
from moe_core.ops import contiguous
from moe_core.quant import UNQUANTIZED, QuantScheme, QuantSpec, ScaleFormat
from moe_core.reference import moe_reference
from moe_core.types import Dispatched, ExpertWeights, GateUpLayout, Routing

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
    layout = config.activation.gate_up_layout
    rows = I if layout is None else 2 * I
    w13 = torch.randn(E, rows, H, generator=generator, device="cuda") * H**-0.5
    w2 = torch.randn(E, H, I, generator=generator, device="cuda") * I**-0.5
    if scheme.weight is None:
        return ExpertWeights(w13.bfloat16(), w2.bfloat16(), layout)
    q13, s13 = formats.quantize(w13.unflatten(1, (rows // I, I)), scheme.weight)
    q2, s2 = formats.quantize(w2, scheme.weight)
    return ExpertWeights(q13.flatten(1, 2), q2, layout, w13_scale=s13, w2_scale=s2)


def inputs(tokens: int, seed: int = 1) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, H, generator=generator, device="cuda").bfloat16()
    ids = torch.randint(-1, E, (tokens, K), generator=generator, device="cuda")
    return x, Routing(ids, torch.rand(tokens, K, generator=generator, device="cuda"))


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
    plain = weights if scheme.weight is None else dequantize_weights(weights, scheme.weight)
    for tokens in (0, 1, 3, 130, 1000):
        x, routing = inputs(tokens)
        out, _ = kernel(x, routing, weights)
        if not tokens:
            assert out.shape == (0, H)
            continue
        expected = moe_reference(x.float(), routing.topk_ids, routing.topk_weights, plain, activation)
        if scheme is UNQUANTIZED:
            assert relative(out, expected) <= 0.006, tokens
            continue
        emulated = torch.empty_like(x)
        dispatched = Dispatched(x, None, topk_ids=routing.topk_ids, topk_weights=routing.topk_weights)
        EmulatedExperts(config, scheme).apply(dispatched, weights, {}, emulated)
        assert relative(out, emulated) <= 0.02, tokens  # bf16 between the GEMMs moves some codes by one
        assert relative(out, expected) <= 1.05 * relative(emulated, expected), tokens
        assert relative(out, expected) <= 0.05, tokens


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
