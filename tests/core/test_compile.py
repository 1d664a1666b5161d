"""The opaque ops: what `torch.compile` sees of a layer, and what it must not see."""

from __future__ import annotations

import pytest
import torch

from moe_core import MoEError

H, E = 24, 6


class TwoLayers(torch.nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x, logits, valid=None):
        x = x + self.first(x * 1.5, logits, num_valid_tokens=valid)
        return torch.relu(self.second(x, logits.flip(-1), shared_experts_input=x + 1))


@pytest.fixture
def model(config, build):
    shared = torch.nn.Linear(H, H).requires_grad_(False)
    return TwoLayers(
        build(config(), seed=1),
        build(config(has_shared_experts=True), seed=2, dispatch="batched", shared_experts=shared),
    )


def test_a_model_with_two_layers_compiles_whole_and_takes_any_token_count(model):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (3, 8, 5):
        x, logits = torch.randn(tokens, H), torch.randn(tokens, E)
        torch.testing.assert_close(compiled(x, logits), model(x, logits))
        torch.testing.assert_close(compiled(x, logits, torch.tensor([2])), model(x, logits, torch.tensor([2])))
    assert len(graphs) == 2, "one graph with and one without num_valid_tokens, whatever the token count"
    called = [str(node.target) for node in graphs[0].graph.nodes if "moe_core" in str(node.target)]
    assert called == ["moe_core.moe_forward", "moe_core.moe_forward_shared"] or called == [
        "moe_core.moe_forward.default",
        "moe_core.moe_forward_shared.default",
    ]


def test_compiled_by_inductor_equals_eager(model):
    torch._dynamo.reset()
    x, logits = torch.randn(7, H), torch.randn(7, E)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x, logits), model(x, logits))


@pytest.mark.parametrize("tokens", [0, 1, 6])
@pytest.mark.parametrize("valid", [None, 1])
def test_the_ops_pass_opcheck(model, tokens, valid):
    x, logits, wide = torch.randn(tokens, H), torch.randn(tokens, E), torch.randn(tokens, H)
    count = None if valid is None else torch.tensor([valid])
    ops = torch.ops.moe_core
    torch.library.opcheck(ops.moe_forward.default, (x, logits, count, model.first._layer_key))
    torch.library.opcheck(ops.moe_forward_shared.default, (x, logits, wide, count, model.second._layer_key))


def test_outputs_never_alias_inputs(config, build):
    runner = build(config(has_shared_experts=True), shared_experts=torch.nn.Identity())
    x, logits = torch.randn(4, H), torch.randn(4, E)
    routed, shared = torch.ops.moe_core.moe_forward_shared(x, logits, x, None, runner._layer_key)
    assert shared.data_ptr() != x.data_ptr()
    assert routed.data_ptr() != x.data_ptr()
    torch.testing.assert_close(shared, x)


def test_an_op_called_for_a_dead_layer_says_so():
    with pytest.raises(MoEError, match="'moe_layer_none'"):
        torch.ops.moe_core.moe_forward(torch.randn(2, H), torch.randn(2, E), None, "moe_layer_none")
