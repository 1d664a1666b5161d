"""One MoE layer spread over ranks, and what a single rank makes of the same tokens. Virtual and gloo ranks run these.

Shape letters: T tokens on one rank · H hidden · E experts · K top-k · W ranks.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch

import moe_core
from moe_core import ExpertPlacement, MoEConfig, MoEParallelConfig, RouterSpec, SharedExperts
from moe_core.plugins import registry
from moe_core.reference import moe_reference

E, H, I = 6, 24, 16
MOST = 9
"""The largest T of any case: what `max_tokens_per_rank` says."""
TOKENS = {
    "equal": (5, 5, 5, 5),
    "unequal": (3, 9, 1, 6),
    "none on a rank": (4, 0, 7, 0),
    "none at all": (0, 0, 0, 0),
}
ODD_TOKENS = {"odd": (1, 2, 9, 3), "one": (1, 0, 0, 0)}
"""More, for who cuts them in two."""


@attrs.frozen
class Case:
    """
    Attributes:
        dispatch: the backend.
        world: W.
        tokens: a key of `TOKENS` or `ODD_TOKENS`.
        placement: which rank holds which expert.
        top_k: K; 5 is more than the experts of any one of 2 ranks.
        shared: None, "whole" or "partial" shared experts.
        scale: the routed scaling factor.
        bounded: `max_tokens_per_rank` is set.
        fixed: batched exchanges as it does on a GPU, without counts.
        dtype: of the layer.
    """

    dispatch: str
    world: int
    tokens: str = "unequal"
    placement: ExpertPlacement = ExpertPlacement.LINEAR
    top_k: int = 3
    shared: str | None = None
    scale: float = 1.0
    bounded: bool = True
    fixed: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def sizes(self) -> tuple[int, ...]:
        return (TOKENS | ODD_TOKENS)[self.tokens][: self.world]

    @property
    def replicated(self) -> bool:
        return self.dispatch == "local"


def register_batched() -> Any | None:
    """Discovered where it is installed; registered in process where the tests run from a checkout alone."""
    if "batched" in registry().dispatch:
        return None
    from moe_batched import plugin

    return moe_core.register_plugin(plugin)


def choose(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A router that leaves nothing out: duplicate ids, choices of nobody, and whole rows of nobody."""
    weights, ids = logits.float().topk(top_k, dim=1)
    doubled = logits[:, :1] > 0.4
    ids = torch.where(doubled, ids.roll(1, dims=1).where(torch.arange(top_k) == 0, ids), ids)
    dropped = (logits[:, 1:2] < -0.9) & (torch.arange(top_k) == top_k - 1)
    nobody = logits[:, 2:3] > 1.2
    ids = ids.masked_fill(dropped | nobody, -1)
    return ids, weights.sigmoid().masked_fill(ids < 0, torch.nan)


def layer_config(case: Case) -> MoEConfig:
    return MoEConfig(
        num_experts=E,
        top_k=case.top_k,
        hidden_size=H,
        intermediate_size=I,
        dtype=case.dtype,
        router=RouterSpec.of("custom", function=choose),
        routed_scaling_factor=case.scale,
        has_shared_experts=case.shared is not None,
        placement=case.placement,
        max_tokens_per_rank=(MOST * case.world if case.replicated else MOST) if case.bounded else None,
        debug=True,
    )


def fill(runner: Any, seed: int = 0) -> Any:
    """Random weights, the same for every split over ranks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (I, H), "up": (I, H), "down": (H, I)}
    for expert in range(E):
        for name, shape in shapes.items():
            runner.routed_experts.load_expert(expert, name, torch.randn(shape, generator=generator) * 0.3)
    runner.routed_experts.pack_weights()
    return runner


def shared_module(parts: int = 1) -> torch.nn.Module:
    """A shared expert, or 1 / parts of it: `parts` of them add up to the whole."""
    module = torch.nn.Linear(H, H, bias=False).requires_grad_(False)
    module.weight.data = torch.randn(H, H, generator=torch.Generator().manual_seed(5)) / parts
    return module


def inputs(case: Case) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Hidden states and logits of each rank, with the rows of whole batches in rank order."""
    generator = torch.Generator().manual_seed(11)
    total = sum(case.sizes)
    x = torch.randn(total, H, generator=generator).to(case.dtype)
    logits = torch.randn(total, E, generator=generator)
    if case.replicated:
        return [x] * case.world, [logits] * case.world
    return list(x.split(list(case.sizes))), list(logits.split(list(case.sizes)))


def build(case: Case, group: Any, parallel: MoEParallelConfig | None = None, **arguments: Any) -> Any:
    """The layer as one rank has it, with its weights."""
    if parallel is None:
        axis = "tp" if case.replicated else "dp"
        sizes = {f"{axis}_size": case.world, f"{axis}_rank": group.rank}
        parallel = MoEParallelConfig.fold(**sizes, expert_parallel=True)
    shared = None
    if case.shared:
        partial = case.shared == "partial"
        shared = SharedExperts(shared_module(case.world if partial else 1).to(case.dtype), output_is_partial=partial)
    runner = moe_core.build_runner(
        layer_config(case),
        parallel=parallel,
        dispatch=case.dispatch,
        experts="torch",
        group=group,
        device="cpu",
        **({"shared_experts": shared} | arguments),
    )
    if case.fixed:
        runner.kernel.prepare_finalize.exact = False
    return fill(runner)


def run(group: Any, case: Case) -> torch.Tensor:
    """What one rank makes of its tokens."""
    x, logits = (parts[group.rank] for parts in inputs(case))
    before = x.clone()
    runner = build(case, group)
    out: torch.Tensor = runner(x, logits)
    again = runner(x, logits)
    assert torch.equal(out, again), "the same bits each time"
    assert torch.equal(x, before), "inputs are read only"
    runner.check()
    return out


def truth(case: Case) -> list[torch.Tensor]:
    """What each rank must get, in fp64, from one rank's reference."""
    single = fill(moe_core.build_runner(attrs.evolve(layer_config(case), has_shared_experts=False), device="cpu"))
    answers = []
    for x, logits in zip(*inputs(case), strict=True):
        ids, scores = choose(logits, case.top_k)
        out = moe_reference(
            x, ids, scores, single.routed_experts.weights, single.plan.config.activation, compute_dtype=torch.float64
        )
        out = out * case.scale
        if case.shared:
            out = out + x.double() @ shared_module().weight.double().T
        answers.append(out)
    return answers


def assert_right(results: list[torch.Tensor], case: Case) -> None:
    """Numbers, within fp32's rounding or, in bf16, Σ 2⁻⁸ · |partial| (partials here are a few times the result)."""
    expected = truth(case)
    assert len(results) == case.world
    for rank, (out, wanted) in enumerate(zip(results, expected, strict=True)):
        assert out.shape == wanted.shape, f"rank {rank}"
        assert out.dtype == case.dtype
        if wanted.numel():
            tolerance = 2e-5 if case.dtype is torch.float32 else 2e-2
            error = (out.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)
            assert error < tolerance, f"rank {rank}: {error}"
