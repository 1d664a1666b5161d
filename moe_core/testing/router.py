"""The cases of a router: logits in, ids and weights out.

Shape letters: T tokens on this rank · E experts, global · K top-k.

A router declares nothing but the duties that it `owns`, so most of this follows from the interface alone. Numbers are
compared where the author gives a `reference`: float64 logits `[T, E]` → the dense weights `[T, E]`, zero where an
expert is not chosen.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch

from moe_core.config import MoEConfig, RouterSpec
from moe_core.forms import made_router
from moe_core.interfaces import Router, RouterFactory
from moe_core.testing import material
from moe_core.testing.case import Case, Skip, Tier, Violation
from moe_core.testing.compare import Untouched, same_bits
from moe_core.types import Duty, Routing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((0, 8, 2), (1, 8, 2), (9, 8, 2), (257, 8, 2), (9, 8, 1), (9, 8, 8), (9, 64, 4))
"""(T, E, K)."""
EVERY = "every router"
_NAME = "router_under_test"
Reference = Callable[[torch.Tensor, int], torch.Tensor]
"""`reference(logits [T, E] float64, K)` → dense weights `[T, E]` float64."""


@attrs.frozen(eq=False)
class RouterBench:
    """The router under test.

    Attributes:
        factory: makes it from a config.
        params: its parameters, where it needs any.
        reference: what it computes, or None.
        device: where logits may be, beside the CPU.
    """

    factory: RouterFactory
    device: torch.device
    params: Mapping[str, Any] = attrs.field(factory=dict)
    reference: Reference | None = None

    def make(self, experts: int, top_k: int, **params: Any) -> Router:
        config = MoEConfig(
            num_experts=experts,
            top_k=top_k,
            hidden_size=4,
            intermediate_size=4,
            router=RouterSpec.of(_NAME, **{**self.params, **params}),
        )
        return made_router(self.factory, config, "the router")

    def possible(self, experts: int, top_k: int) -> Router:
        try:
            return self.make(experts, top_k)
        except ValueError as error:
            raise Skip(str(error)) from None


def logits(tokens: int, experts: int, seed: int = 0) -> torch.Tensor:
    """Well apart, so that no rounding decides a choice: each value once a row, in steps of 1/16, 1/8 or 3/16."""
    draw = material.generator(5, seed)
    steps = torch.rand(tokens, experts, generator=draw).argsort(dim=1) if tokens else torch.empty(0, experts)
    return (steps.float() - experts / 2) * (((torch.arange(tokens) + seed) % 3 + 1) / 16).unsqueeze(1)


def router_cases(
    factory: RouterFactory,
    *,
    params: Mapping[str, Any] | None = None,
    reference: Reference | None = None,
    device: torch.device | str = "cpu",
) -> list[Case]:
    """All cases for one router.

    Args:
        factory: as it is registered.
        params: its parameters, where it does not run without.
        reference: see `Reference`.
        device: of what `for_device` is asked for.
    """
    bench = RouterBench(factory, torch.device(device), params or {}, reference)

    def case(title: str, duty: str, check: Callable[..., None], *arguments: Any, claim: str = EVERY) -> Case:
        tier = Tier.REQUIRED if claim == EVERY else Tier.OPTIONAL
        return Case(title, duty, tier, claim, functools.partial(check, bench, *arguments))

    def all_cases() -> Iterator[Case]:
        yield attrs.evolve(case("one is made", "a step runs", _is_made), opens=True)
        for (tokens, experts, top_k), dtype in itertools.product(SHAPES, DTYPES):
            shown = f"T = {tokens}, E = {experts}, K = {top_k}, {str(dtype).removeprefix('torch.')}"
            duty = "empty steps" if tokens == 0 else "routing"
            yield case(f"form: {shown}", duty, _form, tokens, experts, top_k, dtype)
            if reference is not None and tokens:
                yield case(f"numbers: {shown}", "routing", _numbers, tokens, experts, top_k, dtype, claim="a reference")
        for dtype in (torch.float16, torch.bfloat16):
            yield case(f"mathematics in float32: {dtype}", "routing", _upcasts, dtype)
        for layout in _LAYOUTS:
            yield case(f"strides: logits {layout}", "strides", _strided, layout)
        yield case("inputs stay as they are", "read-only inputs", _reads_only)
        yield case("results are new tensors", "read-only inputs", _new_tensors)
        yield case("same bits each time", "determinism", _same_each_time)
        yield case("no state between steps", "no state between steps", _no_state)
        yield case("two routers", "no state between layers", _two_routers)
        yield case("rows do not see one another", "rows", _row_by_row)
        yield case("its form for a device", "routing", _for_device)
        yield case("large logits", "routing", _large)
        yield case("equal logits", "routing", _equal)
        yield case("duties that it owns", "honest claims", _owns)
        yield case("refused: an unknown parameter", "refusals", _refuses_params)
        for what in ("zeros", "one value", "one expert"):
            yield case(f"a correction bias: {what}", "correction bias", _bias, what)
        yield case("a correction bias stays as it is", "read-only inputs", _bias_untouched)

    return list(all_cases())


def _check_form(routing: Routing, tokens: int, experts: int, top_k: int) -> None:
    ids, weights = routing.topk_ids, routing.topk_weights
    if tuple(ids.shape) != (tokens, top_k) or tuple(weights.shape) != (tokens, top_k):
        raise Violation(
            "shapes and dtypes",
            f"ids {tuple(ids.shape)}, weights {tuple(weights.shape)}; the contract is (T, K) = {(tokens, top_k)}",
        )
    if ids.dtype not in (torch.int32, torch.int64) or weights.dtype != torch.float32:
        raise Violation(
            "shapes and dtypes",
            f"ids are {ids.dtype}, weights {weights.dtype}; the contract is int32 or int64, and float32",
        )
    if not tokens:
        return
    if int(ids.min()) < -1 or int(ids.max()) >= experts:
        raise Violation(
            "routing", f"ids range from {int(ids.min())} to {int(ids.max())}; legal are -1 to {experts - 1}"
        )
    in_order = ids.sort(dim=1).values
    if bool(((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any()):
        raise Violation("duplicate ids", "a row has the same expert twice")
    if not bool(weights[ids >= 0].isfinite().all()):
        raise Violation("routing", "a weight is not finite")


def _is_made(bench: RouterBench) -> None:
    bench.possible(8, 2)


def _form(bench: RouterBench, tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    routing = bench.possible(experts, top_k).select_experts(logits(tokens, experts).to(dtype))
    _check_form(routing, tokens, experts, top_k)


def dense(routing: Routing, experts: int) -> torch.Tensor:
    """`[T, E]` float64: each row's weights at their experts."""
    kept = routing.topk_ids >= 0
    weights = routing.topk_weights.double().masked_fill(~kept, 0.0)
    out = torch.zeros(routing.topk_ids.shape[0], experts, dtype=torch.float64)
    return out.scatter_add_(1, routing.topk_ids.clamp(min=0).long(), weights)


def _numbers(bench: RouterBench, tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    given = logits(tokens, experts).to(dtype)
    got = dense(bench.possible(experts, top_k).select_experts(given), experts)
    assert bench.reference is not None, "asked where there is a reference only"
    wanted = bench.reference(given.double(), top_k)
    if bool(((got != 0) != (wanted != 0)).any()):
        raise Violation("routing", "other experts are chosen than by the reference")
    if not torch.allclose(got, wanted, rtol=1e-5, atol=1e-7):
        raise Violation("router weight", f"weights are off by up to {float((got - wanted).abs().max()):.3g}")


def _upcasts(bench: RouterBench, dtype: torch.dtype) -> None:
    router, given = bench.possible(8, 2), logits(33, 8).to(dtype)
    low, high = router.select_experts(given), router.select_experts(given.float())
    if not torch.allclose(dense(low, 8), dense(high, 8), rtol=1e-5, atol=1e-6):
        raise Violation("routing", f"{dtype} logits and the same values in float32 give other weights")


_LAYOUTS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows apart": lambda t: torch.cat([t, torch.full_like(t, 99)], dim=1)[:, : t.shape[1]],
    "transposed": lambda t: t.T.contiguous().T,
}


def _strided(bench: RouterBench, layout: str) -> None:
    router, given = bench.possible(8, 2), logits(9, 8)
    _same(router.select_experts(_LAYOUTS[layout](given)), router.select_experts(given), "strides", f"logits {layout}")


def _same(a: Routing, b: Routing, duty: str, text: str) -> None:
    if not same_bits(a.topk_ids, b.topk_ids) or not same_bits(a.topk_weights, b.topk_weights):
        raise Violation(duty, f"{text}: another answer")


def _reads_only(bench: RouterBench) -> None:
    given = logits(9, 8)
    seen = Untouched(router_logits=given)
    bench.possible(8, 2).select_experts(given)
    seen.check("select_experts")


def _new_tensors(bench: RouterBench) -> None:
    router, given = bench.possible(8, 8), logits(9, 8)
    first = router.select_experts(given)
    kept = Routing(first.topk_ids.clone(), first.topk_weights.clone())
    if first.topk_weights.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
        raise Violation("read-only inputs", "the weights are the memory of the logits")
    router.select_experts(logits(9, 8, 1))
    _same(first, kept, "read-only inputs", "the next call changed the last result")


def _same_each_time(bench: RouterBench) -> None:
    router, given = bench.possible(8, 2), logits(33, 8)
    first = router.select_experts(given)
    for _ in range(3):
        _same(router.select_experts(given), first, "determinism", "the same logits")


def _no_state(bench: RouterBench) -> None:
    router = bench.possible(8, 2)
    wanted = [bench.possible(8, 2).select_experts(logits(size, 8, seed)) for seed, size in enumerate((9, 1, 33))]
    for seed, size in enumerate((9, 1, 33)):
        _same(router.select_experts(logits(size, 8, seed)), wanted[seed], "no state between steps", f"step {seed}")


def _two_routers(bench: RouterBench) -> None:
    small, wide = bench.possible(8, 2), bench.possible(64, 4)
    first, second = small.select_experts(logits(5, 8)), wide.select_experts(logits(5, 64))
    _same(small.select_experts(logits(5, 8)), first, "no state between layers", "beside another router")
    _check_form(second, 5, 64, 4)


def _row_by_row(bench: RouterBench) -> None:
    router, given = bench.possible(8, 2), logits(33, 8)
    whole, part = router.select_experts(given), router.select_experts(given[:5])
    _same(Routing(whole.topk_ids[:5].clone(), whole.topk_weights[:5].clone()), part, "rows", "fewer rows")


def _for_device(bench: RouterBench) -> None:
    router, given = bench.possible(64, 4), logits(33, 64)
    there = router.for_device(bench.device, 64).select_experts(given.to(bench.device))
    got = Routing(there.topk_ids.cpu(), there.topk_weights.cpu())
    _check_form(got, 33, 64, 4)
    if not torch.allclose(dense(got, 64), dense(router.select_experts(given), 64), rtol=1e-4, atol=1e-6):
        raise Violation("routing", f"what for_device({bench.device}) returns routes otherwise")


def _large(bench: RouterBench) -> None:
    _check_form(bench.possible(8, 2).select_experts(logits(9, 8) * 1e5), 9, 8, 2)


def _equal(bench: RouterBench) -> None:
    _check_form(bench.possible(8, 2).select_experts(torch.zeros(9, 8)), 9, 8, 2)


def _owns(bench: RouterBench) -> None:
    owns = bench.possible(8, 2).owns
    if not owns <= {Duty.ROUTED_SCALING}:
        raise Violation("honest claims", f"owns = {set(owns)}; a router can own {{Duty.ROUTED_SCALING}} or nothing")


def _refuses_params(bench: RouterBench) -> None:
    bench.possible(8, 2)
    try:
        bench.make(8, 2, kit_has_no_such_parameter=1)
    except ValueError as error:
        if "kit_has_no_such_parameter" not in str(error):
            raise Violation("refusals", f"an unknown parameter is refused without naming it: {error}") from None
        return
    raise Violation("refusals", "a parameter that does not exist was taken: a misspelt one would be ignored")


def _with_bias(bench: RouterBench, given: torch.Tensor, bias: torch.Tensor) -> Routing:
    try:
        return bench.possible(8, 2).select_experts(given, bias)
    except ValueError as error:
        raise Skip(f"takes no correction bias: {error}") from None


def _bias(bench: RouterBench, what: str) -> None:
    """It takes part in the choice alone."""
    given = logits(9, 8)
    plain = dense(bench.possible(8, 2).select_experts(given), 8)
    if what == "one expert":
        bias = torch.zeros(8)
        bias[5] = 1e4
        routing = _with_bias(bench, given, bias)
        _check_form(routing, 9, 8, 2)
        if not bool((routing.topk_ids == 5).any(dim=1).all()):
            raise Violation("correction bias", "an expert with a bias of 10⁴ is not chosen by every token")
        if bool((routing.topk_weights.abs() > 100).any()):
            raise Violation("correction bias", "the bias is in the weights; it is for choosing only")
        return
    got = dense(_with_bias(bench, given, torch.full((8,), 0.0 if what == "zeros" else 0.25)), 8)
    if not torch.allclose(got, plain, rtol=1e-5, atol=1e-6):
        raise Violation("correction bias", "the same bias for all experts changes the weights")


def _bias_untouched(bench: RouterBench) -> None:
    bias = torch.linspace(-0.1, 0.1, 8)
    seen = Untouched(correction_bias=bias)
    _with_bias(bench, logits(9, 8), bias)
    seen.check("select_experts")
