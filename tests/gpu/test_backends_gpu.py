"""Both experts through the whole layer on a GPU: plan, runner, graph capture, compilation, the bridge."""

from __future__ import annotations

import copy

import pytest
import torch

import moe_core
from moe_core import ActivationSpec, GateUpLayout, MoEConfig, RouterSpec, SharedExpertsOrder
from moe_core.reference import moe_reference

pytestmark = pytest.mark.gpu

E, K, H, I = 16, 4, 256, 192
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def layer(dispatch=None, experts=None, shared=None, **changes):
    config = MoEConfig(
        **{
            "num_experts": E,
            "top_k": K,
            "hidden_size": H,
            "intermediate_size": I,
            "router": RouterSpec.of("softmax", renormalize=True),
            "has_shared_experts": shared is not None,
            **changes,
        }
    )
    runner = moe_core.build_runner(config, device="cuda", dispatch=dispatch, experts=experts, shared_experts=shared)
    generator = torch.Generator("cuda").manual_seed(0)
    for parameter in runner.routed_experts.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return runner


def inputs(tokens, dtype, seed=1):
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = {"generator": generator, "device": "cuda"}
    return torch.randn(tokens, H, **draw).to(dtype), torch.randn(tokens, E, **draw)


def error(got, runner, x, logits):
    """Relative Frobenius error against fp64."""
    routing = runner._router.select_experts(logits)
    weights, spec = runner.routed_experts.weights, runner.plan.config.activation
    wanted = moe_reference(x, routing.topk_ids, routing.topk_weights, weights, spec, compute_dtype=torch.float64)
    return ((got.double() - wanted).norm() / wanted.norm()).item() if wanted.numel() else 0.0


@pytest.mark.parametrize("dispatch", ["local", "batched"])
@pytest.mark.parametrize("experts", ["triton", "torch"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_backends_give_the_reference(dispatch, experts, dtype):
    for spec in (
        ActivationSpec(),
        ActivationSpec("swiglu_oai", GateUpLayout.INTERLEAVED, limit=7.0, bias=True),
        ActivationSpec("relu2", None),
    ):
        runner = layer(dispatch, experts, dtype=dtype, activation=spec)
        for tokens in (0, 1, 7, 130, 1000):
            x, logits = inputs(tokens, dtype)
            assert error(runner(x, logits), runner, x, logits) <= TOLERANCE[dtype], (spec, tokens)


def test_triton_is_chosen_on_a_gpu_without_being_asked():
    plan = layer().plan
    assert (plan.dispatch.name, [r.candidate.name for r in plan.ranges]) == ("local", ["triton"])


@pytest.mark.parametrize("dispatch", ["local", "batched"])
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_a_captured_step_is_right_with_other_routings(dispatch, tokens):
    runner = layer(dispatch, cuda_graph=True, max_tokens_per_rank=tokens)
    x, logits = inputs(tokens, torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        runner(x, logits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = runner(x, logits)
    for seed in range(5):
        new_x, new_logits = inputs(tokens, torch.bfloat16, seed)
        x.copy_(new_x)
        logits.copy_(new_logits)
        graph.replay()
        assert error(out, runner, x, logits) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("order", list(SharedExpertsOrder)[1:])
def test_shared_experts_in_every_order(order):
    shared = torch.nn.Linear(H, H, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    runner = layer(shared=shared, shared_experts_order=order)
    plain = layer()
    for seed in range(10):
        x, logits = inputs(64, torch.bfloat16, seed)
        torch.testing.assert_close(runner(x, logits), plain(x, logits) + shared(x))


def test_a_compiled_layer_equals_the_eager_one():
    torch._dynamo.reset()
    runner = layer()
    compiled = torch.compile(lambda x, logits: torch.relu(runner(x * 2, logits)), fullgraph=True, dynamic=True)
    for tokens in (3, 17, 200):
        x, logits = inputs(tokens, torch.bfloat16)
        torch.testing.assert_close(compiled(x, logits), torch.relu(runner(x * 2, logits)))


def test_steps_are_bit_equal():
    runner = layer(deterministic=True)
    for tokens in (1, 16, 300):
        x, logits = inputs(tokens, torch.bfloat16)
        first = runner(x, logits)
        assert all(runner(x, logits).equal(first) for _ in range(5))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_bridge_runs_these_experts_without_being_told(family):
    transformers = pytest.importorskip("transformers")
    import moe_core.integrations.transformers as bridge

    base = {
        "vocab_size": 128,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    cls = {"mixtral": transformers.MixtralConfig, "gpt_oss": transformers.GptOssConfig}[family]
    model = transformers.AutoModelForCausalLM.from_config(cls(**base)).eval().cuda().float()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.1)
    other = copy.deepcopy(model)
    other.set_experts_implementation("eager")
    plans = bridge.attach(model)
    assert {r.candidate.name for plan in plans.values() for r in plan.ranges} == {"triton"}
    ids = torch.randint(0, 128, (2, 9), device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, other(ids).logits, atol=2e-4, rtol=2e-4)
        greedy = {"max_new_tokens": 8, "do_sample": False}
        assert model.generate(ids, **greedy).equal(other.generate(ids, **greedy))
