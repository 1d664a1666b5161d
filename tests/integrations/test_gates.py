"""Recognition of a gate: by its numbers, to the last detail, or not at all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers.activations
from torch.nn import functional as F

from moe_core import ActivationSpec, GateUpLayout
from moe_core.integrations.transformers.gates import recognise_gate
from moe_core.reference import activation_reference

I = 16


class Experts(torch.nn.Module):
    """What the decorator leaves of an experts module, with a gate to order."""

    def __init__(self, gate=None, act_fn=None, concatenated=True, bias=False, **numbers):
        super().__init__()
        self.has_gate, self.has_bias, self.is_concatenated = gate is not None, bias, concatenated
        if act_fn is not None:
            self.act_fn = act_fn
        vars(self).update(numbers)
        self._gate = gate
        self.config = SimpleNamespace()

    def _apply_gate(self, gate_up):
        return self._gate(self, gate_up)


def default_gate(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


SPECS = [
    ActivationSpec(function, layout, limit=limit, alpha=alpha)
    for layout in GateUpLayout
    for function, limit, alpha in (
        ("silu", None, 1.702),
        ("silu", 10.0, 1.702),
        ("gelu", None, 1.702),
        ("gelu_tanh", 0.3, 1.702),
        ("swiglu_oai", 7.0, 1.702),
        ("swiglu_oai", None, 1.5),
    )
] + [ActivationSpec(function, None) for function in ("silu", "gelu", "relu2")]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_spec_is_recognised_from_its_own_formula(spec):
    numbers = {"swiglu_limit": spec.limit, "some_alpha": spec.alpha, "num_experts": 8}
    if spec.gated:
        module = Experts(lambda _, x: activation_reference(x, spec), **numbers)
    else:
        module = Experts(act_fn=lambda x: activation_reference(x, spec), **numbers)
    assert recognise_gate(module, I) == spec


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
    ],
)
def test_activations_of_transformers_behind_the_default_gate(name, function):
    act_fn = transformers.activations.ACT2FN[name]
    assert recognise_gate(Experts(default_gate, act_fn), I) == ActivationSpec(function)


def test_relu2_of_transformers_without_a_gate():
    act_fn = transformers.activations.ACT2FN["relu2"]
    assert recognise_gate(Experts(act_fn=act_fn), I) == ActivationSpec("relu2", None)


def test_a_gate_that_computes_in_fp32_inside_is_the_same_gate():
    def gate(self, gate_up):
        g, u = gate_up.chunk(2, dim=-1)
        return (F.silu(g.float()) * u.float()).to(g.dtype)

    assert recognise_gate(Experts(gate), I) == ActivationSpec("silu")


def _per_channel(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    scale = torch.ones(I, dtype=gate.dtype)
    scale[I - 1] = 1.001
    return F.silu(gate) * up * scale


WRONG = {
    "a limit that is written nowhere": lambda self, x: activation_reference(x, ActivationSpec("silu", limit=77.0)),
    "a clamp after the function": lambda self, x: F.silu(x[..., :I]).clamp(max=7.0) * x[..., I:].clamp(-7.0, 7.0),
    "a clamp of the gate from below too": lambda self, x: F.silu(x[..., :I].clamp(-7, 7)) * x[..., I:].clamp(-7, 7),
    "no plus one": lambda self, x: x[..., :I] * torch.sigmoid(1.702 * x[..., :I]) * x[..., I:],
    "one channel scaled": _per_channel,
    "a small factor": lambda self, x: default_silu(x) * 1.00001,
    "a tanh cap": lambda self, x: torch.tanh(x[..., :I] / 30) * 30 * torch.sigmoid(x[..., :I]) * x[..., I:],
    "a wrong width": lambda self, x: x,
    "an exception": lambda self, x: x @ torch.ones(3),
}


def default_silu(x):
    return F.silu(x[..., :I]) * x[..., I:]


@pytest.mark.parametrize("wrong", list(WRONG))
def test_near_misses_are_not_recognised(wrong):
    reason = recognise_gate(Experts(WRONG[wrong], limit=7.0), I)
    assert isinstance(reason, str)
    assert "Experts._apply_gate" in reason


def test_an_activation_that_we_lack_is_not_recognised_without_a_gate_either():
    reason = recognise_gate(Experts(act_fn=torch.nn.ReLU()), I)
    assert isinstance(reason, str)
    assert "Experts.act_fn" in reason
    assert "relu2" in reason
