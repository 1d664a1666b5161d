"""A runner around float64 experts, and what its layer must give: what every runner case stands on.

Shape letters: T tokens on this rank · H hidden · I intermediate · E experts · K top-k.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch

from moe_core.answers import probed
from moe_core.config import ActivationSpec, MoEConfig, MoEParallelConfig, Problem, RouterSpec
from moe_core.forms import made_runner
from moe_core.interfaces import Group, RunnerFactory
from moe_core.plugins import registry
from moe_core.quant import UNQUANTIZED, QuantMethod, QuantScheme
from moe_core.routed_experts import RoutedExperts
from moe_core.select import Plan, select
from moe_core.shared_experts import SharedExperts
from moe_core.testing import material
from moe_core.testing.compare import Truth, check_numbers
from moe_core.testing.material import F64, Problem64
from moe_core.testing.oracle import oracle_experts
from moe_core.testing.virtual import VirtualGroup, run_on_ranks
from moe_core.types import Device, RoutedScaling, SharedExpertsOrder

PLAIN = ActivationSpec("silu")
TWIN = QuantScheme("kit_twin")
"""Unquantized weights under another name: what a runner is told to change its method to."""


@attrs.frozen(kw_only=True)
class Setting:
    """One layer and one kind of step.

    Attributes:
        tokens: T. `leading`: the dims before H instead.
        gate: the runner holds the gate.
        shared: None, or the order in which shared experts run.
        partial: the shared experts are split over the ranks.
        shared_input: they read something else than the hidden states.
        padded: H of the weights.
        scale, inverse: the routed scaling factor, and its other convention.
        valid: rows that are real; None: all.
        bias: a correction bias.
        latent: modules around the routed experts.
        world: ranks, with the same tokens each.
    """

    tokens: int = 5
    leading: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    hidden: int = 24
    gate: bool = False
    shared: SharedExpertsOrder | None = None
    partial: bool = False
    shared_input: bool = False
    padded: int | None = None
    scale: float = 1.0
    inverse: bool = False
    valid: int | None = None
    bias: bool = False
    latent: bool = False
    on_input: bool = False
    world: int = 1
    scheme: QuantScheme = UNQUANTIZED

    @property
    def config(self) -> MoEConfig:
        return MoEConfig(
            num_experts=6,
            top_k=1 if self.on_input else 2,
            hidden_size=self.inner_hidden,
            padded_hidden_size=self.padded,
            intermediate_size=8,
            dtype=self.dtype,
            activation=PLAIN,
            router=RouterSpec.of("sigmoid", renormalize=True),
            routed_scaling_factor=self.scale,
            routed_scaling=RoutedScaling.INVERSE_ON_SHARED if self.inverse else RoutedScaling.ON_ROUTED,
            router_weight_on_input=self.on_input,
            has_shared_experts=self.shared is not None,
            shared_experts_order=self.shared,
        )

    @property
    def inner_hidden(self) -> int:
        """H of the routed experts."""
        return self.hidden // 2 if self.latent else self.hidden

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leading if self.leading is not None else (self.tokens,)

    def inputs(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states, logits, and what the shared experts read."""
        count = int(torch.tensor(self.shape).prod()) if self.shape else 1
        x = material.tokens(count, self.hidden, self.dtype, seed).view(*self.shape, self.hidden)
        other = material.tokens(count, self.hidden, self.dtype, seed, 9).view(*self.shape, self.hidden)
        gate = linear(self.hidden, 6, 4, torch.float32).weight
        logits = (x.float() @ gate.T).to(self.dtype)
        return x, logits, other if self.shared_input else x


def linear(wide: int, narrow: int, seed: int, dtype: torch.dtype, parts: int = 1) -> torch.nn.Linear:
    """`[T, wide] → [T, narrow]`; `parts` of them add up to the whole."""
    module = torch.nn.Linear(wide, narrow, bias=False).requires_grad_(False)
    weight = torch.randn(narrow, wide, generator=material.generator(6, seed)) / wide**0.5
    module.weight.data = (weight / parts).to(dtype)
    return module


@attrs.frozen(eq=False)
class RunnerBench:
    """The runner under test."""

    factory: RunnerFactory
    device: torch.device

    def plan(self, setting: Setting, group: Group | None, scheme: QuantScheme) -> Plan:
        parallel = MoEParallelConfig()
        if group is not None:
            parallel = MoEParallelConfig.fold(tp_size=group.size, tp_rank=group.rank, expert_parallel=True)
        problem = Problem(config=setting.config, parallel=parallel, scheme=scheme, device=Device.of(self.device))
        local = probed(registry().find("dispatch", "local"))
        return select(problem, [local], [oracle_experts(PLAIN, scheme)])

    def build(self, setting: Setting, group: VirtualGroup | None = None, seed: int = 0) -> Any:
        """The layer, with its weights, as one rank has it."""

        def replan(*, scheme: QuantScheme) -> Plan:
            return self.plan(setting, group, scheme)

        plan = replan(scheme=setting.scheme)
        layer = RoutedExperts(plan, method_of(setting.scheme), self.device)
        router = registry().find("routers", plan.config.router.name)(plan.config)
        shared = None
        if setting.shared is not None:
            parts = setting.world if setting.partial else 1
            module = linear(setting.hidden, setting.hidden, 2, setting.dtype, parts).to(self.device)
            shared = SharedExperts(module, output_is_partial=setting.partial)
        wide, narrow = setting.hidden, setting.inner_hidden
        inward = linear(wide, narrow, 7, setting.dtype).to(self.device) if setting.latent else None
        outward = linear(narrow, wide, 8, setting.dtype).to(self.device) if setting.latent else None
        runner = made_runner(
            self.factory,
            "the runner",
            plan,
            layer,
            router,
            replan=replan,
            group=group,
            gate=linear(wide, 6, 4, setting.dtype).to(self.device) if setting.gate else None,
            shared_experts=shared,
            correction_bias=correction_bias().to(self.device) if setting.bias else None,
            routed_input_transform=inward,
            routed_output_transform=outward,
        )
        fill(layer, setting, seed)
        return runner

    def step(self, setting: Setting, runner: Any, seed: int = 0) -> torch.Tensor:
        x, logits, shared_in = (tensor.to(self.device) for tensor in setting.inputs(seed))
        valid = None if setting.valid is None else torch.tensor([setting.valid], device=self.device)
        out: torch.Tensor = runner.forward(
            x,
            None if setting.gate else logits,
            shared_in if setting.shared_input else None,
            valid,
        )
        return out

    def run(self, setting: Setting, seed: int = 0) -> list[torch.Tensor]:
        """A fresh layer's output, on every rank."""
        if setting.world == 1:
            return [self.step(setting, self.build(setting), seed)]

        @torch.no_grad()
        def work(group: VirtualGroup) -> torch.Tensor:
            return self.step(setting, self.build(setting, group), seed)

        return run_on_ranks(setting.world, work, timeout_s=5.0)

    def check(self, setting: Setting, out: torch.Tensor, duty: str, *, seed: int = 0, weights: int = 0) -> None:
        """Hold an output to the truth; `weights`: the seed of the experts' weights."""
        flat = out.cpu().reshape(-1, out.shape[-1]) if out.numel() else out.cpu().reshape(0, out.shape[-1])
        truth = expected(setting, seed, weights)
        others = {
            "routed scaling factor: it was not applied": lambda: expected(setting, seed, weights, scale=1.0).value,
            "routed scaling factor: it was applied twice": lambda: (
                expected(setting, seed, weights, scale=setting.scale**2).value
            ),
            "shared experts: they are missing": lambda: expected(setting, seed, weights, shared=0.0).value,
            "shared experts: they were added twice": lambda: expected(setting, seed, weights, shared=2.0).value,
            "shared experts: they were added once for every rank": lambda: (
                expected(setting, seed, weights, shared=float(setting.world)).value
            ),
            "cross-rank reduce: it was summed once too often": lambda: setting.world * truth.value,
        }
        steps = {torch.float32: 64.0, torch.float16: 16.0, torch.bfloat16: 16.0}[setting.dtype]
        check_numbers(flat, truth, duty=duty, steps=steps, dtype=setting.dtype, explanations=others)


def correction_bias() -> torch.Tensor:
    return torch.tensor([0.0, 0.5, -0.5, 0.3, 0.0, -0.2])


def method_of(scheme: QuantScheme) -> QuantMethod:
    """The method of unquantized weights, under the scheme's name."""
    method: QuantMethod = registry().find("quant_methods", UNQUANTIZED.name).factory()
    if scheme != UNQUANTIZED:
        method.scheme = scheme
    return method


def fill(layer: RoutedExperts, setting: Setting, seed: int = 0) -> None:
    weights = material.random_weights(6, setting.inner_hidden, 8, PLAIN, setting.dtype, seed)
    for expert in layer.expert_map.local_experts:
        for name, tensor in material.gate_and_up(weights, expert).items():
            layer.load_expert(expert, name, tensor)
    layer.pack_weights()


def expected(
    setting: Setting, seed: int = 0, weights: int = 0, *, scale: float | None = None, shared: float = 1.0
) -> Truth:
    """What the layer must give, in float64; `shared`: how often the shared experts are added."""
    x, logits, shared_in = (tensor.reshape(-1, tensor.shape[-1]) for tensor in setting.inputs(seed))
    if setting.gate:
        logits = torch.nn.functional.linear(x, linear(setting.hidden, 6, 4, setting.dtype).weight)
    config = setting.config
    router = registry().find("routers", config.router.name)(config)
    routing = router.select_experts(logits, correction_bias() if setting.bias else None)
    if setting.valid is not None:
        padding = (torch.arange(len(x)) >= setting.valid).unsqueeze(1)
        routing.topk_ids = routing.topk_ids.masked_fill(padding, -1)
    routed_in = x.to(F64)
    if setting.latent:
        routed_in = routed_in @ linear(setting.hidden, setting.inner_hidden, 7, setting.dtype).weight.to(F64).T
    held = material.random_weights(6, setting.inner_hidden, 8, PLAIN, setting.dtype, weights)
    terms = Problem64(routed_in, routing, held, PLAIN, setting.on_input).terms()
    factor = setting.scale if scale is None else scale
    terms = terms if setting.inverse else terms * factor
    if setting.latent:
        terms = terms @ linear(setting.inner_hidden, setting.hidden, 8, setting.dtype).weight.to(F64).T
    if setting.shared is not None:
        module = linear(setting.hidden, setting.hidden, 2, setting.dtype)
        added = shared * (shared_in.to(F64) @ module.weight.to(F64).T)
        terms = torch.cat([terms, (added / factor if setting.inverse else added).unsqueeze(0)])
    return Truth.of(terms.sum(0), terms)
