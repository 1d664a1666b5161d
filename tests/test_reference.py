"""The reference equals transformers' own expert modules, and keeps the contract where they have no say.

Shape letters: T tokens · H hidden · I intermediate · E experts · K top-k · C row capacity per expert.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import attrs
import pytest
import torch

from moe_core.config import ActivationSpec
from moe_core.reference import activation_reference, expert_rows_reference, moe_reference
from moe_core.types import ExpertWeights, GateUpLayout

T, H, I, E, K = 37, 24, 20, 7, 3
NAN = float("nan")
INTERLEAVED_OAI = ActivationSpec("swiglu_oai", GateUpLayout.INTERLEAVED, limit=7.0, bias=True)

# architecture, experts class, config class, settings of the config, our activation
MODELS: list[tuple[str, str, str, dict[str, Any], ActivationSpec]] = [
    ("mixtral", "MixtralExperts", "MixtralConfig", {"num_local_experts": E, "intermediate_size": I}, ActivationSpec()),
    (
        "mixtral",
        "MixtralExperts",
        "MixtralConfig",
        {"num_local_experts": E, "intermediate_size": I, "hidden_act": "gelu"},
        ActivationSpec("gelu"),
    ),
    (
        "gemma4",
        "Gemma4TextExperts",
        "Gemma4TextConfig",
        {"num_experts": E, "moe_intermediate_size": I, "hidden_activation": "gelu_pytorch_tanh"},
        ActivationSpec("gelu_tanh"),
    ),
    (
        "qwen3_moe",
        "Qwen3MoeExperts",
        "Qwen3MoeConfig",
        {"num_experts": E, "moe_intermediate_size": I},
        ActivationSpec(),
    ),
    (
        "gpt_oss",
        "GptOssExperts",
        "GptOssConfig",
        {"num_local_experts": E, "intermediate_size": I},
        INTERLEAVED_OAI,
    ),
    (
        "openai_privacy_filter",
        "OpenAIPrivacyFilterExperts",
        "OpenAIPrivacyFilterConfig",
        {"num_local_experts": E, "intermediate_size": I},
        ActivationSpec("swiglu_oai", limit=7.0, bias=True),
    ),
    (
        "deepseek_v4",
        "DeepseekV4Experts",
        "DeepseekV4Config",
        {"n_routed_experts": E, "moe_intermediate_size": I, "swiglu_limit": 1.5},
        ActivationSpec(limit=1.5),
    ),
    *[
        (
            "nemotron_h",
            "NemotronHExperts",
            "NemotronHConfig",
            {"n_routed_experts": E, "moe_intermediate_size": I, "mlp_hidden_act": name},
            ActivationSpec(name, None),
        )
        for name in ("relu2", "silu", "gelu")
    ],
]


def module_of(architecture: str, experts_class: str, config_class: str, settings: dict[str, Any]) -> torch.nn.Module:
    """A transformers experts module with random weights in float64, run by its own eager code."""
    package = f"transformers.models.{architecture}"
    modeling = pytest.importorskip(f"{package}.modeling_{architecture}", reason="not in this transformers")
    config_type = getattr(importlib.import_module(f"{package}.configuration_{architecture}"), config_class)
    config = config_type(hidden_size=H, **settings)
    config._experts_implementation = "eager"
    module: torch.nn.Module = getattr(modeling, experts_class)(config).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def views_of(module: Any, activation: ActivationSpec) -> ExpertWeights:
    w13 = module.gate_up_proj if activation.gated else module.up_proj
    w2 = module.down_proj
    if getattr(module, "is_transposed", False):
        w13, w2 = w13.mT, w2.mT
    return ExpertWeights(
        w13=w13.detach(),
        w2=w2.detach(),
        gate_up_layout=activation.gate_up_layout,
        w13_bias=module.gate_up_proj_bias.detach() if activation.bias else None,
        w2_bias=module.down_proj_bias.detach() if activation.bias else None,
    )


def random_weights(
    activation: ActivationSpec, dtype: torch.dtype = torch.float64, num_experts: int = E
) -> ExpertWeights:
    rows = 2 * I if activation.gated else I
    return ExpertWeights(
        w13=torch.randn(num_experts, rows, H, dtype=dtype) * 0.3,
        w2=torch.randn(num_experts, H, I, dtype=dtype) * 0.3,
        gate_up_layout=activation.gate_up_layout,
        w13_bias=torch.randn(num_experts, rows, dtype=dtype) if activation.bias else None,
        w2_bias=torch.randn(num_experts, H, dtype=dtype) if activation.bias else None,
    )


def random_routing(num_tokens: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.rand(num_tokens, E).topk(K).indices
    return ids, torch.rand(num_tokens, K, dtype=torch.float64)


def in_float64(*args: Any, **kwargs: Any) -> torch.Tensor:
    return moe_reference(*args, compute_dtype=torch.float64, **kwargs)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class TestAgainstTransformers:
    @pytest.mark.parametrize(
        ("architecture", "experts_class", "config_class", "settings", "activation"),
        MODELS,
        ids=[f"{model[0]}-{model[4].function}" for model in MODELS],
    )
    def test_experts(
        self,
        architecture: str,
        experts_class: str,
        config_class: str,
        settings: dict[str, Any],
        activation: ActivationSpec,
    ) -> None:
        module = module_of(architecture, experts_class, config_class, settings)
        weights = views_of(module, activation)
        hidden_states = torch.randn(T, H, dtype=torch.float64) * 3
        ids, router_weights = random_routing()
        with torch.no_grad():
            theirs = module(hidden_states, ids, router_weights)
        ours = in_float64(hidden_states, ids, router_weights, weights, activation)
        if activation.limit is not None:
            unlimited = attrs.evolve(activation, limit=None)
            changed = in_float64(hidden_states, ids, router_weights, weights, unlimited)
            assert not torch.allclose(ours, changed), "the clamp had nothing to do, so it was not compared"
        # The privacy filter computes parts in float32 whatever its weights are in.
        rtol = 1e-4 if architecture == "openai_privacy_filter" else 1e-11
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * theirs.abs().max().item())

    def test_llama4_puts_the_router_weight_on_the_input(self) -> None:
        transformers = pytest.importorskip("transformers")
        modeling = pytest.importorskip("transformers.models.llama4.modeling_llama4")
        config = transformers.Llama4TextConfig(
            hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K
        )
        block = modeling.Llama4TextMoe(config).double()
        for name, parameter in block.named_parameters():
            torch.nn.init.normal_(parameter, std=0.0 if name.startswith("shared_expert") else 0.5)
        hidden_states = torch.randn(T, H, dtype=torch.float64)
        with torch.no_grad():
            theirs, logits = block(hidden_states)
            chosen = logits.topk(K)
            # That model's router takes its sigmoid in float32 and rounds to its own dtype.
            scores = chosen.values.float().sigmoid().double()
        experts = block.experts
        weights = ExpertWeights(experts.gate_up_proj.detach().mT, experts.down_proj.detach().mT, GateUpLayout.GATE_UP)
        ours = in_float64(hidden_states, chosen.indices, scores, weights, ActivationSpec(), router_weight_on_input=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-10)

    def test_float32_inside_is_near_float64(self) -> None:
        activation = ActivationSpec()
        weights = random_weights(activation, torch.bfloat16)
        hidden_states = torch.randn(T, H).bfloat16()
        ids, router_weights = random_routing()
        default = moe_reference(hidden_states, ids, router_weights.float(), weights, activation)
        exact = in_float64(hidden_states, ids, router_weights.float(), weights, activation)
        assert default.dtype == torch.float32
        assert exact.dtype == torch.float64
        torch.testing.assert_close(default.double(), exact, rtol=1e-5, atol=1e-5)


class TestActivation:
    GATE, UP = -2.5, 9.0

    def expected(self, spec: ActivationSpec) -> float:
        """The docstring of `ActivationSpec`, once more, on Python floats."""
        g, u = self.GATE, self.UP
        if spec.limit is not None:
            g, u = min(g, spec.limit), max(-spec.limit, min(u, spec.limit))
        tanh_arg = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
        value = {
            "silu": g / (1 + math.exp(-g)),
            "gelu": 0.5 * g * (1 + math.erf(g / math.sqrt(2))),
            "gelu_tanh": 0.5 * g * (1 + math.tanh(tanh_arg)),
            "swiglu_oai": g / (1 + math.exp(-spec.alpha * g)),
            "relu2": max(g, 0.0) ** 2,
        }[spec.function]
        if not spec.gated:
            return value
        return value * (u + 1 if spec.function == "swiglu_oai" else u)

    @pytest.mark.parametrize("limit", [None, 1.0, 7.0])
    @pytest.mark.parametrize("layout", list(GateUpLayout))
    @pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh", "swiglu_oai"])
    @pytest.mark.parametrize("gate", [-9.0, 0.5, 9.0])
    def test_gated(self, function: str, layout: GateUpLayout, limit: float | None, gate: float) -> None:
        self.GATE = gate
        spec = ActivationSpec(function, layout, limit=limit)
        for self.UP in (-9.0, 0.25, 9.0):
            pairs = {
                GateUpLayout.GATE_UP: [gate, gate, self.UP, self.UP],
                GateUpLayout.UP_GATE: [self.UP, self.UP, gate, gate],
                GateUpLayout.INTERLEAVED: [gate, self.UP, gate, self.UP],
            }
            got = activation_reference(torch.tensor([pairs[layout]], dtype=torch.float64), spec)
            assert got.tolist() == [[pytest.approx(self.expected(spec), rel=1e-12)] * 2]

    @pytest.mark.parametrize("function", ["silu", "gelu", "relu2"])
    @pytest.mark.parametrize("value", [-9.0, 0.5, 9.0])
    def test_ungated(self, function: str, value: float) -> None:
        self.GATE = value
        spec = ActivationSpec(function, None)
        got = activation_reference(torch.tensor([value], dtype=torch.float64), spec)
        assert got.tolist() == [pytest.approx(self.expected(spec), rel=1e-12)]

    def test_alpha(self) -> None:
        spec = ActivationSpec("swiglu_oai", alpha=0.5)
        got = activation_reference(torch.tensor([self.GATE, self.UP], dtype=torch.float64), spec)
        assert got.item() == pytest.approx(self.expected(spec), rel=1e-12)


class TestContract:
    """-1, duplicates, NaN, expert maps, strides: what backends are held to."""

    @pytest.mark.parametrize("layout", list(GateUpLayout))
    def test_the_storage_decides_the_layout(self, layout: GateUpLayout) -> None:
        weights, (ids, router_weights) = random_weights(INTERLEAVED_OAI), random_routing()
        hidden_states = torch.randn(T, H, dtype=torch.float64)
        expected = in_float64(hidden_states, ids, router_weights, weights, INTERLEAVED_OAI)
        order = {
            GateUpLayout.INTERLEAVED: torch.arange(2 * I),
            GateUpLayout.GATE_UP: torch.cat([torch.arange(0, 2 * I, 2), torch.arange(1, 2 * I, 2)]),
            GateUpLayout.UP_GATE: torch.cat([torch.arange(1, 2 * I, 2), torch.arange(0, 2 * I, 2)]),
        }[layout]
        assert weights.w13_bias is not None
        packed = attrs.evolve(
            weights, w13=weights.w13[:, order], w13_bias=weights.w13_bias[:, order], gate_up_layout=layout
        )
        torch.testing.assert_close(in_float64(hidden_states, ids, router_weights, packed, INTERLEAVED_OAI), expected)

    @pytest.mark.parametrize("on_input", [False, True])
    @pytest.mark.parametrize("activation", [ActivationSpec(), INTERLEAVED_OAI], ids=["plain", "bias"])
    def test_dropped_choices_contribute_nothing(self, activation: ActivationSpec, on_input: bool) -> None:
        weights, (ids, router_weights) = random_weights(activation), random_routing()
        hidden_states = torch.randn(T, H, dtype=torch.float64)
        zeroed, dropped = router_weights.clone(), ids.clone()
        zeroed[:, 1], dropped[:, 1] = 0.0, -1
        poisoned = router_weights.clone()
        poisoned[:, 1] = NAN
        # A weight of 0 on the output is another way to say "no contribution"; on the input the biases would stay.
        if not (on_input and activation.bias):
            torch.testing.assert_close(
                in_float64(hidden_states, dropped, poisoned, weights, activation, router_weight_on_input=on_input),
                in_float64(hidden_states, ids, zeroed, weights, activation, router_weight_on_input=on_input),
            )
        rest = in_float64(
            hidden_states, ids[:, ::2], router_weights[:, ::2], weights, activation, router_weight_on_input=on_input
        )
        got = in_float64(hidden_states, dropped, poisoned, weights, activation, router_weight_on_input=on_input)
        torch.testing.assert_close(got, rest)

    def test_nan_rows_without_an_expert_give_zeros(self) -> None:
        weights, (ids, router_weights) = random_weights(INTERLEAVED_OAI), random_routing()
        hidden_states = torch.randn(T, H, dtype=torch.float64)
        clean = in_float64(hidden_states, ids, router_weights, weights, INTERLEAVED_OAI)
        hidden_states[5:9], ids[5:9], router_weights[5:9] = NAN, -1, NAN
        got = in_float64(hidden_states, ids, router_weights, weights, INTERLEAVED_OAI)
        assert torch.equal(got[5:9], torch.zeros(4, H, dtype=torch.float64))
        torch.testing.assert_close(got[:5], clean[:5])
        torch.testing.assert_close(got[9:], clean[9:])

    def test_duplicate_ids_add_their_weights(self) -> None:
        activation = ActivationSpec()
        weights, (_, router_weights) = random_weights(activation), random_routing()
        hidden_states = torch.randn(T, H, dtype=torch.float64)
        same = torch.randint(0, E, (T, 1))
        torch.testing.assert_close(
            in_float64(hidden_states, same.expand(T, K), router_weights, weights, activation),
            in_float64(hidden_states, same, router_weights.sum(-1, keepdim=True), weights, activation),
        )

    @pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
    def test_ranks_add_up_to_the_whole(self, id_dtype: torch.dtype) -> None:
        weights, (ids, router_weights) = random_weights(INTERLEAVED_OAI), random_routing()
        ids[3, 1] = ids[11] = -1
        hidden_states = torch.randn(T, H, dtype=torch.float64)
        total = torch.zeros(T, H, dtype=torch.float64)
        for own in (torch.tensor([0, 2, 5]), torch.tensor([1, 6, 3, 4])):
            expert_map = torch.full((E,), -1, dtype=torch.int32)
            expert_map[own] = torch.arange(len(own), dtype=torch.int32)
            mine = attrs.evolve(
                weights,
                **{name: getattr(weights, name)[own] for name in ("w13", "w2", "w13_bias", "w2_bias")},
            )
            total += in_float64(
                hidden_states, ids.to(id_dtype), router_weights, mine, INTERLEAVED_OAI, expert_map=expert_map
            )
        expected = in_float64(hidden_states, ids, router_weights, weights, INTERLEAVED_OAI)
        torch.testing.assert_close(total, expected)

    def test_strides_and_dtypes_of_the_inputs(self) -> None:
        activation = ActivationSpec()
        weights, (ids, router_weights) = random_weights(activation, torch.bfloat16), random_routing()
        hidden_states = torch.randn(H, 2 * T).bfloat16().T[::2]
        transposed = attrs.evolve(weights, w13=weights.w13.mT.contiguous().mT, w2=weights.w2.mT.contiguous().mT)
        assert not hidden_states.is_contiguous()
        assert not transposed.w13.is_contiguous()
        torch.testing.assert_close(
            in_float64(hidden_states, ids.int().T.contiguous().T, router_weights, transposed, activation),
            in_float64(hidden_states.double().contiguous(), ids, router_weights, weights, activation),
        )

    def test_inputs_are_read_only(self) -> None:
        weights, (ids, router_weights) = random_weights(INTERLEAVED_OAI), random_routing()
        hidden_states = torch.randn(T, H, dtype=torch.float64)
        tensors = [hidden_states, ids, router_weights, *(t for t in attrs.astuple(weights) if torch.is_tensor(t))]
        before = [tensor.clone() for tensor in tensors]
        for on_input in (False, True):
            in_float64(hidden_states, ids, router_weights, weights, INTERLEAVED_OAI, router_weight_on_input=on_input)
        assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))

    def test_no_tokens_and_no_local_experts(self) -> None:
        activation = ActivationSpec()
        ids, router_weights = random_routing(0)
        assert in_float64(torch.randn(0, H), ids, router_weights, random_weights(activation), activation).shape == (
            0,
            H,
        )
        ids, router_weights = random_routing()
        nobody = torch.full((E,), -1, dtype=torch.int32)
        none = random_weights(activation, num_experts=0)
        got = in_float64(torch.randn(T, H), ids, router_weights, none, activation, expert_map=nobody)
        assert torch.equal(got, torch.zeros(T, H, dtype=torch.float64))


class TestExpertRows:
    COUNTS = (4, 0, 9, 1, 9, 2, 0)
    CAPACITY = 9

    def test_equals_one_choice_of_weight_one_per_row(self) -> None:
        weights = random_weights(INTERLEAVED_OAI)
        x = torch.randn(E, self.CAPACITY, H, dtype=torch.float64)
        counts = torch.tensor(self.COUNTS, dtype=torch.int32)
        for expert, count in enumerate(self.COUNTS):
            x[expert, count:] = NAN
        got = expert_rows_reference(x, counts, weights, INTERLEAVED_OAI, compute_dtype=torch.float64)
        for expert, count in enumerate(self.COUNTS):
            rows = x[expert, :count]
            ids, one = torch.full((count, 1), expert), torch.ones(count, 1, dtype=torch.float64)
            torch.testing.assert_close(got[expert, :count], in_float64(rows, ids, one, weights, INTERLEAVED_OAI))
            assert not got[expert, count:].any()

    @pytest.mark.parametrize("count", [-1, 10])
    def test_a_count_beyond_the_capacity(self, count: int) -> None:
        counts = torch.tensor([0, 0, count, 0, 0, 0, 0], dtype=torch.int32)
        with pytest.raises(ValueError, match=rf"tokens_per_expert\[2\] = {count}; legal values: 0 to C = 9"):
            expert_rows_reference(torch.zeros(E, 9, H), counts, random_weights(ActivationSpec()), ActivationSpec())


class TestErrors:
    def run(self, weights: ExpertWeights, activation: ActivationSpec, ids: torch.Tensor | None = None) -> None:
        if ids is None:
            ids = torch.zeros(2, 1, dtype=torch.int64)
        in_float64(torch.zeros(2, H), ids, torch.ones(2, 1), weights, activation)

    @pytest.mark.parametrize("bad", [-2, E, 99])
    def test_id_out_of_range(self, bad: int) -> None:
        with pytest.raises(ValueError, match=f"topk_ids holds {bad}; legal values: 0 to {E - 1}, and -1"):
            self.run(random_weights(ActivationSpec()), ActivationSpec(), torch.tensor([[0], [bad]]))

    def test_gate_disagrees(self) -> None:
        with pytest.raises(ValueError, match="either both have a gate or neither has"):
            self.run(random_weights(ActivationSpec("relu2", None)), ActivationSpec())

    def test_biases_disagree(self) -> None:
        with pytest.raises(ValueError, match=r"bias = False and for ExpertWeights\.w13_bias one"):
            self.run(random_weights(ActivationSpec(bias=True)), ActivationSpec())
        with pytest.raises(ValueError, match=r"bias = True and for ExpertWeights\.w13_bias none"):
            self.run(random_weights(ActivationSpec()), ActivationSpec(bias=True))

    def test_packed_weights(self) -> None:
        packed = attrs.evolve(random_weights(ActivationSpec()), w2_scale=torch.ones(E))
        with pytest.raises(ValueError, match="dequantize them first"):
            self.run(packed, ActivationSpec())
