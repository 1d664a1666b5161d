"""Every dispatch × scheme × experts backend that runs on a CPU, on virtual ranks, against one rank and against float64.

Vendors' dispatches run through their emulations.

Shape letters: T tokens of one rank · H hidden · I intermediate · E experts · K top-k · W ranks · M the largest T.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch
from rank_cases import TOKENS
from vendor_cases import choose, register_emulations

import moe_core
import moe_symm.emulation
from moe_batched import prepare_finalize
from moe_core import MoEConfig, MoEParallelConfig, RouterSpec, formats
from moe_core.emulated import dequantize_weights
from moe_core.plugins import registry
from moe_core.reference import moe_reference
from moe_core.select import Plan
from moe_core.testing import run_on_ranks
from moe_core.testing.pairwise import Row, pairwise
from moe_core.types import ActivationFormat
from moe_nixl_ep.emulation import quantize
from moe_nixl_ep.limits import FP8_PAYLOADS

E, K, H, I, M = 8, 3, 128, 128, 9
DISPATCHES = (
    "all_gather", "batched", "nixl_ep_emulated", "mori_emulated",
    "symm_emulated", "symm_batched_emulated", "symm_exact_emulated",
)  # fmt: skip
BETWEEN_RANKS = 0.006
"""Relative Frobenius against one rank with the same rows in the same format: partial sums are rounded to bf16."""
TO_FLOAT64 = 0.01
"""The same against float64 with the very weights, where activations are not quantized."""


@attrs.frozen
class Pair:
    scheme: str
    experts: str

    def __str__(self) -> str:
        return f"{self.scheme}-{self.experts}"


def layer_config(world: int) -> MoEConfig:
    return MoEConfig(
        num_experts=E, top_k=K, hidden_size=H, intermediate_size=I, dtype=torch.bfloat16,
        router=RouterSpec.of("custom", function=choose), max_tokens_per_rank=M * world, debug=True,
    )  # fmt: skip


def parallel_of(world: int, rank: int = 0) -> MoEParallelConfig:
    return MoEParallelConfig.fold(dp_size=world, dp_rank=rank, expert_parallel=True)


def build(pair: Pair, dispatch: str, group: Any = None, *, rows: int = 1) -> Any:
    """The layer on one rank of the group; or whole, with room for the tokens of `rows` ranks."""
    spread = {} if group is None else {"parallel": parallel_of(group.size, group.rank), "group": group}
    runner = moe_core.build_runner(
        layer_config(rows), scheme=pair.scheme, experts=pair.experts, dispatch=dispatch, device="cpu", **spread
    )
    generator = torch.Generator().manual_seed(3)
    own, scale = runner.routed_experts.expert_map.local_experts, input_scale(runner)
    for expert in range(E):
        for name, shape in {"gate": (I, H), "up": (I, H), "down": (H, I)}.items():
            values = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            if expert in own:
                runner.routed_experts.load_expert(expert, name, values)
                if scale is not None:
                    runner.routed_experts.load_expert(expert, f"{name}_input_scale", scale)
    runner.routed_experts.pack_weights()
    return runner


def input_scale(runner: Any) -> torch.Tensor | None:
    """Of static scales, for values up to 5; None: the scheme reads none."""
    spec = runner.plan.scheme.activation
    if spec is None or "_input_scale" not in runner.routed_experts.quant_method.required_kinds(packed=False):
        return None
    of = formats.global_scale_of if spec.second_level else formats.scale_of
    return of(torch.tensor(5.0), spec)


@functools.cache
def alone(pair: Pair, form: ActivationFormat) -> Any:
    """One rank with all experts, the same for every test: it has room for the tokens of 4 ranks."""
    return build(pair, "batched" if form is ActivationFormat.BATCHED else "local", rows=4)


def batches(sizes: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(tokens, H, generator=generator).bfloat16(), torch.randn(tokens, E, generator=generator))
        for tokens in sizes
    ]


def error(out: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((out.double() - wanted.double()).norm() / wanted.double().norm())


def check(dispatch: str, pair: Pair, world: int, tokens: str) -> None:
    """One rank gets the tokens of all: a scale that all rows share is then the same one."""
    data = batches(TOKENS[tokens][:world])

    def work(group: Any) -> tuple[torch.Tensor, Plan]:
        runner = build(pair, dispatch, group)
        out = runner(*data[group.rank])
        runner.check()
        return out, runner.plan

    outs, plans = zip(*run_on_ranks(world, work), strict=True)
    assert [len(out) for out in outs] == [len(x) for x, _ in data]
    single, out = alone(pair, plans[0].activation_format), torch.cat(outs)
    x, logits = (torch.cat(parts) for parts in zip(*data, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        if dispatch == "nixl_ep_emulated" and plans[0].payload in FP8_PAYLOADS:  # it has a formula of its own
            round_scale = FP8_PAYLOADS[plans[0].payload]
            patch.setattr(prepare_finalize, "quantize_rows", lambda rows, spec: quantize(rows, round_scale))
        wanted = single(x, logits)
    assert error(out, wanted) <= BETWEEN_RANKS, (dispatch, pair, world, tokens)
    scheme, weights = single.plan.scheme, single.routed_experts.weights
    if scheme.activation is None:
        plain = weights if scheme.weight is None else dequantize_weights(weights, scheme.weight)
        ids, scores = choose(logits, K)
        truth = moe_reference(x, ids, scores, plain, single.plan.config.activation, compute_dtype=torch.float64)
        assert error(out, truth) <= TO_FLOAT64, (dispatch, pair, world, tokens)


def runs(row: Row) -> bool:
    pair, parallel = row["pair"], parallel_of(row["world"])
    asked = {"scheme": pair.scheme, "experts": pair.experts, "dispatch": row["dispatch"], "device": "cpu"}
    try:
        moe_core.plan(layer_config(1), parallel=parallel, **asked)
    except moe_core.UnsupportedError:
        return False
    return True


@pytest.fixture(scope="module")
def axes() -> Iterator[dict[str, list[Any]]]:
    """What there is to combine."""
    records = [*register_emulations(), moe_core.register_plugin(moe_symm.emulation, name="symm_emulation")]
    found = registry()
    pairs = itertools.starmap(Pair, itertools.product(found.quant_methods, found.experts))
    yield {
        "dispatch": DISPATCHES,
        "pair": [pair for pair in pairs if runs({"dispatch": "local", "pair": pair, "world": 1})],
        "world": [1, 2, 4],
        "tokens": ["equal", "unequal", "none on a rank"],
    }
    for record in records:
        moe_core.unregister_plugin(record.name)


def test_nothing_is_left_out(axes):
    """Each dispatch between ranks stands in `DISPATCHES`, by itself or by its emulation."""
    entries = registry().dispatch.values()
    between = {each.name.removesuffix("_emulated") for each in entries if each.capabilities.carries_tokens}
    versions = {name for name in between if "_1." in name}
    assert between - versions == {name.removesuffix("_emulated") for name in DISPATCHES}
    assert {str(pair) for pair in axes["pair"]} >= {"unquantized-torch", "fp8_block-fp8_torch", "nvfp4-nvfp4_torch"}


@pytest.fixture(scope="module")
def rows(axes: dict[str, list[Any]]) -> list[Row]:
    return pairwise(axes, runs)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_every_two_values_meet(dispatch, rows):
    mine = [row for row in rows if row["dispatch"] == dispatch]
    assert len({row["pair"] for row in mine}) == len({row["pair"] for row in rows}), "every pair of experts and scheme"
    for row in mine:
        check(**row)


@pytest.mark.full
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_the_whole_product(dispatch, axes):
    for values in itertools.product([dispatch], axes["pair"], axes["world"], axes["tokens"]):
        row = dict(zip(axes, values, strict=True))
        if runs(row):
            check(**row)
