"""One foreign module over its life: moved, changed, copied, compiled, deleted, and called in every odd way."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import attrs
import pytest
import torch

import moe_core
import moe_core.integrations.transformers as bridge
from moe_core import MoEError
from moe_core.integrations.transformers.layer import _layers, experts_forward
from moe_core.kernel import MoEKernel


def routed(module, tokens=5, top_k=2, seed=0):
    """Hidden states `[T, H]`, distinct ids `[T, K]` and weights `[T, K]` for an experts module."""
    generator = torch.Generator().manual_seed(seed)
    hidden = module.down_proj.shape[2 if module.is_transposed else 1]
    x = torch.randn(tokens, hidden, generator=generator).to(module.down_proj.dtype)
    scores = torch.rand(tokens, module.num_experts, generator=generator)
    weights, ids = scores.topk(top_k)
    return x, ids, weights


@torch.no_grad()
def eager(module, *arguments):
    """transformers' own result for an experts module."""
    before = module.config._experts_implementation
    module.config._experts_implementation_internal = "eager"
    try:
        return module(*arguments)
    finally:
        module.config._experts_implementation_internal = before


@torch.no_grad()
def ours(module, *arguments):
    return experts_forward(module, *arguments)


# ---- weights that change


def test_bfloat16_after_float32_replans_and_keeps_the_dtype(tiny, mixed):
    module = tiny(mixed).experts[0]
    x, ids, weights = routed(module)
    full = ours(module, x, ids, weights)
    module.to(torch.bfloat16)
    half = ours(module, x.bfloat16(), ids, weights)
    assert half.dtype is torch.bfloat16
    assert bridge.layer_for(module).plans[2].config.dtype is torch.bfloat16
    error = float((half.float() - full).abs().max() / full.abs().max())
    assert 0 < error < 0.03


def test_updates_in_place_are_seen_without_new_views(tiny, mixed, close):
    module = tiny(mixed).experts[0]
    arguments = routed(module)
    before = ours(module, *arguments)
    views = bridge.layer_for(module).weights
    with torch.no_grad():
        module.down_proj.mul_(2.0)
    after = ours(module, *arguments)
    close(after, eager(module, *arguments))
    assert float((after - before).abs().max()) > 0.01
    assert bridge.layer_for(module).weights is views


@pytest.mark.parametrize("how", ["parameter", "data", "load_state_dict"])
def test_rebound_parameters_are_seen(tiny, mixed, how, close):
    module = tiny(mixed).experts[0]
    arguments = routed(module)
    before = ours(module, *arguments)
    plan = bridge.layer_for(module).plans[2]
    fresh = torch.randn_like(module.down_proj) * 0.2
    if how == "parameter":
        module.down_proj = torch.nn.Parameter(fresh)
    elif how == "data":
        module.down_proj.data = fresh
    else:
        module.load_state_dict({**module.state_dict(), "down_proj": fresh}, assign=True)
    after = ours(module, *arguments)
    close(after, eager(module, *arguments))
    assert float((after - before).abs().max()) > 0.01
    assert bridge.layer_for(module).plans[2] is plan, "the same shapes need no new plan"


def test_a_gate_that_changes_is_recognised_anew(tiny, close):
    module = tiny("gpt_oss").experts[0]
    arguments = routed(module)
    before = ours(module, *arguments)
    module.limit = 0.1
    close(ours(module, *arguments), eager(module, *arguments))
    assert float((ours(module, *arguments) - before).abs().max()) > 1e-3
    other = tiny("mixtral").experts[0]
    ours(other, *routed(other))
    other.act_fn = torch.nn.GELU()
    close(ours(other, *routed(other)), eager(other, *routed(other)))


# ---- calls


def test_no_tokens(tiny, mixed):
    module = tiny(mixed).experts[0]
    out = ours(module, *routed(module, tokens=0))
    assert out.shape == (0, routed(module)[0].shape[1])


def test_another_k_than_planned_makes_another_plan(tiny, mixed, close):
    one = tiny(mixed)
    plans = bridge.attach(one.model)
    module = one.experts[0]
    arguments = routed(module, top_k=3)
    close(ours(module, *arguments), eager(module, *arguments))
    assert set(bridge.layer_for(module).plans) == {2, 3}
    assert bridge.layer_for(module).plans[2] is next(iter(plans.values()))


@pytest.mark.parametrize("marked", [True, None], ids=["marked", "before 5.18"])
def test_sentinel_ids_contribute_nothing(tiny, mixed, marked, close):
    module = tiny(mixed).experts[0]
    x, ids, weights = routed(module, top_k=3)
    dropped = torch.arange(ids.numel()).reshape(ids.shape) % 4 == 0
    dropped[0] = True
    if marked is None:
        vars(module).pop("_is_expert_parallel", None)
    else:
        module._is_expert_parallel = True
    sentinel = ids.masked_fill(dropped, module.num_experts)
    out = ours(module, x, sentinel, weights.masked_fill(dropped, float("nan")))
    close(out, eager(module, x, ids, weights.masked_fill(dropped, 0.0)))
    assert not out[0].any()


def test_more_choices_than_experts_of_this_rank(tiny, close):
    """Two ranks of four experts each, K = 6: what each rank computes adds up to the whole."""
    module = tiny("mixtral").experts[0]
    x, ids, weights = routed(module, top_k=6)
    expected = eager(module, x, ids, weights)
    total = torch.zeros_like(expected)
    for rank in range(2):
        part = copy.deepcopy(module)
        part._is_expert_parallel, part.num_experts = True, 4
        for name in ("gate_up_proj", "down_proj"):
            setattr(part, name, torch.nn.Parameter(getattr(module, name).data[rank * 4 : rank * 4 + 4]))
        local = ids - rank * 4
        foreign = (local < 0) | (local >= 4)
        total += ours(part, x, local.masked_fill(foreign, 4), weights.masked_fill(foreign, 0.0))
    close(total, expected)


def test_router_weights_and_hidden_states_in_other_dtypes(tiny, close):
    module = tiny("mixtral").experts[0]
    x, ids, weights = routed(module)
    expected = ours(module, x, ids, weights)
    close(ours(module, x, ids.int(), weights.double()), expected)
    half = ours(module, x.bfloat16(), ids, weights)
    assert half.dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        close(ours(module, x, ids, weights), expected)
    close(ours(module, x.reshape(1, 5, -1), ids, weights), expected.reshape(1, 5, -1))


def test_inputs_are_not_written(tiny, mixed):
    module = tiny(mixed).experts[0]
    arguments = routed(module)
    before = [tensor.clone() for tensor in arguments]
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    ours(module, *arguments)
    assert all(torch.equal(now, then) for now, then in zip(arguments, before, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_a_gradient_is_refused_not_lost(tiny):
    one = tiny("mixtral")
    one.model.set_experts_implementation("moe_core")
    loss = one.model(input_ids=one.ids).logits.sum()
    with pytest.raises(MoEError, match="inference only"):
        loss.backward()


def test_a_step_does_no_planning(tiny, mixed, monkeypatch):
    module = tiny(mixed).experts[0]
    arguments = routed(module)
    ours(module, *arguments)

    def forbidden(*_, **__):
        raise AssertionError("a second step planned something")

    monkeypatch.setattr("moe_core.integrations.transformers.layer.make_plan", forbidden)
    monkeypatch.setattr("moe_core.integrations.transformers.layer.views", forbidden)
    monkeypatch.setattr("moe_core.integrations.transformers.layer.check_supported", forbidden)
    monkeypatch.setattr(MoEKernel, "__init__", forbidden)
    ours(module, *arguments)


# ---- state


def test_state_is_neither_saved_nor_visible(tiny):
    one = tiny("mixtral")
    keys, parameters = list(one.model.state_dict()), list(dict(one.model.named_parameters()))
    attributes = [set(vars(module)) for module in one.experts]
    one.logits("moe_core")
    assert list(one.model.state_dict()) == keys
    assert list(dict(one.model.named_parameters())) == parameters
    assert [set(vars(module)) for module in one.experts] == attributes


def test_a_dead_model_leaves_nothing_behind(tiny):
    gc.collect()  # models of earlier tests
    one = tiny("inkling2_text" if "inkling2" in bridge.supported_architectures() else "gpt_oss")
    one.logits("moe_core")
    module = one.experts[0]
    key, before = bridge.layer_for(module).key, len(_layers)
    watched = [weakref.ref(module), weakref.ref(bridge.layer_for(module)), weakref.ref(module.down_proj)]
    layers = one.layers
    del one, module
    gc.collect()
    assert [ref() for ref in watched] == [None, None, None]
    assert len(_layers) == before - layers
    with pytest.raises(MoEError, match=key):
        torch.ops.moe_core.experts_forward(torch.randn(1, 4), torch.zeros(1, 1).long(), torch.ones(1, 1), key)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_its_own_state(tiny, mixed, how, close):
    one = tiny(mixed)
    bridge.attach(one.model, dispatch="local")
    module = one.experts[0]
    arguments = routed(module)
    before = ours(module, *arguments)
    copied = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
    with torch.no_grad():
        copied.down_proj.mul_(3.0)
    close(ours(copied, *arguments), eager(copied, *arguments))
    close(ours(module, *arguments), before)
    original, its = bridge.layer_for(module), bridge.layer_for(copied)
    assert its is not original
    assert its.key != original.key
    assert its.weights.w2.data_ptr() == copied.down_proj.data_ptr()


# ---- torch.compile


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("attached", [True, False], ids=["attached", "first call compiled"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_compiled_whole_with_any_token_count(tiny, name, attached, close, fresh_dynamo):
    one = tiny(name)
    if attached:
        bridge.attach(one.model)
    else:
        one.model.set_experts_implementation("moe_core")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(one.model, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (9, 4, 6):
        ids = one.ids[:, :tokens]
        close(one.logits(model=compiled, ids=ids), one.logits(ids=ids))
    called = [
        str(node.target) for graph in graphs for node in graph.graph.nodes if "experts_forward" in str(node.target)
    ]
    assert len(called) == len(graphs) * one.layers, "each MoE layer is one opaque op"
    keys = {node.args[3] for graph in graphs for node in graph.graph.nodes if "experts_forward" in str(node.target)}
    assert keys == {bridge.layer_for(module).key for module in one.experts}
    close(one.logits("moe_core"), one.logits("eager"))


def test_compiled_by_inductor(tiny, close, fresh_dynamo):
    module = tiny("mixtral").experts[0]
    module.config._experts_implementation_internal = "moe_core"
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, dynamic=True)
        for tokens in (5, 7):
            arguments = routed(module, tokens=tokens)
            close(compiled(*arguments), eager(module, *arguments))


def test_layers_compiled_one_by_one_do_not_share_a_graph(tiny, close, fresh_dynamo):
    """All layers run the same code, so only a guard keeps one layer's key out of the other's graph."""
    one = tiny("mixtral")
    expected = one.logits("eager")
    one.model.set_experts_implementation("moe_core")
    for layer in one.model.model.layers:
        layer.mlp.compile(fullgraph=True, dynamic=True, backend="eager")
    close(one.logits(), expected)


def test_a_copy_that_is_compiled_before_it_ever_ran(tiny, close, fresh_dynamo):
    one = tiny("mixtral")
    one.logits("moe_core")
    copied = copy.deepcopy(one.model)
    with torch.no_grad():
        for module in bridge.experts_modules(copied).values():
            module.down_proj.mul_(-1.0)
    compiled = torch.compile(copied, fullgraph=True, backend="eager")
    close(one.logits(model=compiled), one.logits("eager", model=copied))


def test_compiled_sees_rebound_parameters(tiny, close, fresh_dynamo):
    one = tiny("mixtral")
    one.model.set_experts_implementation("moe_core")
    compiled = torch.compile(one.model, fullgraph=True, backend="eager")
    one.logits(model=compiled)
    for module in one.experts:
        module.down_proj = torch.nn.Parameter(torch.randn_like(module.down_proj))
    changed = one.logits(model=compiled)
    close(changed, one.logits("eager"))


@pytest.mark.filterwarnings("ignore:.*autograd kernel.*")
def test_compiled_with_gradients_enabled_runs_and_refuses_the_backward(tiny, close, fresh_dynamo):
    one = tiny("mixtral")
    expected = one.logits("eager")
    one.model.set_experts_implementation("moe_core")
    out = torch.compile(one.model, fullgraph=True, backend="aot_eager")(input_ids=one.ids, use_cache=False)[0]
    close(out.detach(), expected)
    with pytest.raises(MoEError, match="inference only"):
        out.sum().backward()


@pytest.mark.parametrize("tokens", [0, 5])
def test_the_op_passes_opcheck(tiny, tokens):
    module = tiny("mixtral").experts[0]
    arguments = (*routed(module, tokens=tokens), bridge.layer_for(module).key)
    torch.library.opcheck(torch.ops.moe_core.experts_forward.default, arguments)


def test_the_op_returns_a_new_tensor(tiny):
    module = tiny("mixtral").experts[0]
    x, ids, weights = routed(module)
    out = torch.ops.moe_core.experts_forward(x, ids, weights, bridge.layer_for(module).key)
    assert out.data_ptr() != x.data_ptr()


def test_records_of_the_bridge_are_frozen(tiny):
    plan = next(iter(bridge.attach(tiny("mixtral").model).values()))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        plan.payload = "other"
    assert isinstance(plan, moe_core.Plan)
