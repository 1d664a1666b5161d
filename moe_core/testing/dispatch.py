"""The cases of a dispatch backend, derived from what it declares.

Shape letters: T tokens on one rank · H hidden · E experts · K top-k · W ranks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch

from moe_core.answers import probed
from moe_core.config import MODEL_DTYPES, ActivationSpec, Problem
from moe_core.group import TorchGroup
from moe_core.plugins import registry
from moe_core.quant import UNQUANTIZED, QuantScheme, QuantSpec
from moe_core.select import DispatchCandidate, Plan, select
from moe_core.testing import claims
from moe_core.testing import dispatch_checks as checks
from moe_core.testing.case import Case, Tier
from moe_core.testing.dispatch_bench import PLAIN, TOKENS, DispatchBench, Setting
from moe_core.testing.dispatch_checks import LAYOUTS
from moe_core.testing.dispatch_delivery import delivered, footprint, wire
from moe_core.testing.dispatch_unclaimed import device_of, unclaimed
from moe_core.testing.material import IDS, IDS_OF_SOMEBODY
from moe_core.testing.oracle import oracle_experts
from moe_core.testing.pairwise import Row, pairwise
from moe_core.testing.virtual import Faults
from moe_core.types import (
    MODEL_DTYPE_PAYLOAD,
    ROW_WISE_PAYLOAD,
    Device,
    DispatchCapabilities,
    ExpertPlacement,
)

ROW_WISE_SCHEME = QuantScheme(
    "kit_row_wise",
    QuantSpec("float8_e4m3fn", (1, -1)),
    QuantSpec("float8_e4m3fn", (1, 8), dynamic=True),
)
"""Rows in fp8, in groups of 8 columns: any scheme that is quantized row by row would do."""
EVERY = "every backend"


def dispatch_cases(
    candidate: DispatchCandidate,
    *,
    device: torch.device | str = "cpu",
    ranks: int = 4,
    launched: TorchGroup | None = None,
) -> list[Case]:
    """All cases for one dispatch backend.

    Args:
        candidate: as it was registered, or made by hand.
        device: where they run.
        ranks: the largest number of virtual ranks to try.
        launched: run on the processes of this group instead, each of which must ask the same cases.
    """
    bench = DispatchBench(probed(candidate), torch.device(device), ranks, launched)
    return list(_Cases(bench).all())


@attrs.frozen(eq=False)
class _Cases:
    bench: DispatchBench

    def all(self) -> Iterator[Case]:
        yield from self._declarations()
        first = self.fit(Setting(world=self.worlds[0], topology=self.topology(self.worlds[0])))
        yield attrs.evolve(self.case("one step runs", "a step runs", EVERY, checks.runs, first), opens=True)
        for world in self.worlds:
            base = self.fit(Setting(world=world, topology=self.topology(world)))
            yield from self._numbers(base)
            yield from self._contract(base)
            yield from self._form(base)
            if world > 1:
                yield from self._between_ranks(base)
        yield from self._combinations()

    @property
    def caps(self) -> DispatchCapabilities:
        return self.bench.candidate.capabilities

    @property
    def worlds(self) -> list[int]:
        """1 to 4 ranks, or the least that it serves; where ranks were launched, as many as there are."""
        if self.bench.launched is not None:
            return [self.bench.launched.size]
        most = min(self.bench.ranks, self.caps.max_ep_size or self.bench.ranks)
        return [w for w in (1, 2, 3, 4) if self.caps.min_ep_size <= w <= most] or [self.caps.min_ep_size]

    def topology(self, world: int) -> str:
        return "own" if self.caps.carries_tokens or world == 1 else "replicated"

    def fit(self, setting: Setting) -> Setting:
        """The nearest layer that it declares: its dtypes, sizes, placements, shares."""
        caps = self.caps
        changes: dict[str, Any] = {}
        if setting.dtype not in caps.dtypes:
            changes["dtype"] = next(dtype for dtype in MODEL_DTYPES if dtype in caps.dtypes)
        if setting.placement not in caps.placements:
            changes["placement"] = next(iter(sorted(caps.placements, key=lambda p: p.value)))
        tables = caps.needs_round_robin_routing_tables and setting.placement is ExpertPlacement.ROUND_ROBIN
        if (caps.needs_equal_shares or tables) and setting.experts % setting.world:
            changes["experts"] = 4 * setting.world
        if caps.hidden_sizes is not None and setting.hidden not in caps.hidden_sizes:
            changes["hidden"] = min(caps.hidden_sizes)
        most = min(caps.max_topk or setting.top_k, changes.get("experts", setting.experts))
        if setting.top_k > most:
            changes["top_k"] = most
        return attrs.evolve(setting, **changes)

    def case(self, name: str, duty: str, claim: str, check: Callable[..., None], *arguments: Any) -> Case:
        tier = Tier.REQUIRED if claim == EVERY else Tier.OPTIONAL
        return Case(name, duty, tier, claim, functools.partial(check, self.bench, *arguments))

    def claim_of(self, setting: Setting) -> str:
        return EVERY if setting.world == self.worlds[0] else f"serves {setting.world} ranks"

    def _numbers(self, base: Setting) -> Iterator[Case]:
        """Every kind of batch, every kind of ids, every K and E at its limits."""
        claim, ranks = self.claim_of(base), base.ranks
        duties = {"none": "empty steps", "one in all": "empty steps", "none on some": "empty steps"}
        for tokens in TOKENS:
            setting = attrs.evolve(base, tokens=tokens)
            yield self.case(
                f"numbers: tokens {tokens}, {ranks}",
                duties.get(tokens, "rows"),
                claim,
                checks.numbers,
                setting,
                duties.get(tokens, "rows"),
            )
        duties = {"dropped": "dropped ids", "all dropped": "dropped ids", "duplicates": "duplicate ids"}
        for ids in IDS:
            if ids in ("duplicates", "mixed") and not self.caps.accepts_duplicate_ids:
                continue
            own = "accepts_duplicate_ids" if ids == "duplicates" else claim
            duty = duties.get(ids, "expert map")
            yield self.case(
                f"numbers: ids {ids}, {ranks}", duty, own, checks.numbers, attrs.evolve(base, ids=ids), duty
            )
        for what, changes in self._limits(base).items():
            setting = self.fit(attrs.evolve(base, **changes))
            yield self.case(f"numbers: {what}, {ranks}", "rows", claim, checks.numbers, setting, "rows")
        for dtype in MODEL_DTYPES:
            if dtype in self.caps.dtypes:
                shown = str(dtype).removeprefix("torch.")
                setting = attrs.evolve(base, dtype=dtype)
                yield self.case(f"numbers: {shown}, {ranks}", "rows", claim, checks.numbers, setting, "rows")

    def _limits(self, base: Setting) -> dict[str, dict[str, Any]]:
        most = min(self.caps.max_topk or base.experts, base.experts)
        found: dict[str, dict[str, Any]] = {
            "K = 1": {"top_k": 1},
            "the largest K": {"top_k": most},
            "as many experts as ranks": {"experts": base.world, "top_k": min(base.top_k, base.world)},
            "many experts": {"experts": 16 * base.world},
            "int32 ids": {"id_dtype": torch.int32},
            "the weight on the input": {"top_k": 1, "on_input": True},
            "Inf in rows that hold nothing": {"poison": torch.inf, "ids": "one expert"},
        }
        if base.world > 1 and not self.caps.needs_equal_shares:
            found["uneven experts per rank"] = {"experts": base.world * 2 + 1}
        if self.caps.hidden_sizes is None:
            found |= {"odd H": {"hidden": 13}, "H = 1": {"hidden": 1}}
        else:
            found["the largest H"] = {"hidden": max(self.caps.hidden_sizes)}
        return found

    def _contract(self, base: Setting) -> Iterator[Case]:
        """State, handles, memory: what the interface promises beside the numbers."""
        claim, ranks = self.claim_of(base), base.ranks
        full = self.fit(attrs.evolve(base, tokens="full", ids="every expert"))
        for ids in ("distinct", "dropped"):
            yield self.case(
                f"inputs stay as they are: ids {ids}, {ranks}",
                "read-only inputs",
                claim,
                checks.reads_only,
                attrs.evolve(base, ids=ids),
            )
        for layout, what in itertools.product(LAYOUTS, ("hidden_states", "routing")):
            yield self.case(f"strides: {what} {layout}, {ranks}", "strides", claim, checks.strided, base, layout, what)
        yield self.case(f"steps of changing size, {ranks}", "no state between steps", claim, checks.many_steps, base)
        yield from self._in_flight(base)
        for how in ("twice", "nothing"):
            yield self.case(f"handle: {how}, {ranks}", "handles", claim, checks.handle_once, full, how)
        alike = attrs.evolve(base, tokens="full")  # so that nothing about the other layer's handle but its rows differs
        yield self.case(f"handle: of another layer, {ranks}", "handles", claim, checks.handle_of_another, alike)
        yield self.case(f"an exception gives slots back, {ranks}", "release", claim, checks.released, full)
        if self.caps.payloads != {MODEL_DTYPE_PAYLOAD}:
            unknown = checks.unknown_payload
            yield self.case(f"refused: an unknown payload, {ranks}", "refusals", "payloads", unknown, full)
        yield self.case(
            f"capacity: all ranks above it, {ranks}", "capacity", claim, checks.too_many_tokens, full, "all ranks"
        )
        yield self.case(f"empty steps between others, {ranks}", "empty steps", claim, checks.empty_steps, base)
        yield self.case(
            f"out is written whole, {ranks}",
            "out is written whole",
            claim,
            checks.writes_all,
            attrs.evolve(base, ids="dropped"),
        )
        for value in (torch.nan, torch.inf):
            yield self.case(
                f"{value} in one token stays there, {ranks}",
                "padding is not read",
                claim,
                checks.spreads_nothing,
                full,
                value,
            )

    def _in_flight(self, base: Setting) -> Iterator[Case]:
        """Several steps at once, of one layer and of two."""
        claim, ranks = self.claim_of(base), base.ranks
        yield self.case(f"two layers, {ranks}", "no state between layers", claim, checks.two_layers, base)
        if self.caps.shared_in_flight and self.caps.max_in_flight is not None:
            shared = "shared_in_flight"
            yield self.case(
                f"two layers, a step too many, {ranks}", "calls in flight", shared, checks.shared_slots, base
            )
        for order in ((0, 1), (1, 0), (1, 2, 0)):
            if self.caps.max_in_flight is None or self.caps.max_in_flight >= len(order):
                yield self.case(
                    f"in flight: {len(order)}, landing in order {order}, {ranks}",
                    "calls in flight",
                    "max_in_flight",
                    checks.flights,
                    base,
                    order,
                )
        if self.caps.max_in_flight is None or self.caps.max_in_flight > 1:
            yield self.case(
                f"in flight: a pipeline, {ranks}", "calls in flight", "max_in_flight", checks.interleaved, base
            )

    def _form(self, base: Setting) -> Iterator[Case]:
        """What `prepare` returns, the split form, and what it says of itself: determinism, memory, graphs."""
        claim, ranks = self.claim_of(base), base.ranks
        for tokens, ids in (("unequal", "distinct"), ("full", "one expert"), ("none on some", "every expert")):
            if ids == "one expert" and not self.caps.accepts_dropped_ids:
                continue
            yield self.case(
                f"delivered: tokens {tokens}, ids {ids}, {ranks}",
                "rows",
                claim,
                delivered,
                self.fit(attrs.evolve(base, tokens=tokens, ids=ids)),
            )
        split = "split" if self.caps.split else claim
        yield self.case(f"split form equals whole form, {ranks}", "split form", split, checks.split_is_whole, base)
        yield self.case(f"split form: work between the halves, {ranks}", "split form", split, checks.late_receive, base)
        if self.caps.max_in_flight is None or self.caps.max_in_flight > 1:
            yield self.case(
                f"split form: two steps in turns, {ranks}", "split form", split, checks.halves_interleaved, base
            )
        if self.caps.deterministic:
            for dtype in [dtype for dtype in MODEL_DTYPES if dtype in self.caps.dtypes]:
                setting = attrs.evolve(base, dtype=dtype, deterministic=True, tokens="full")
                shown = str(dtype).removeprefix("torch.")
                yield self.case(
                    f"deterministic: {shown}, {ranks}", "determinism", "deterministic", checks.same_each_time, setting
                )
        if self.caps.footprint is not None:
            batches = {"tokens equal": ("equal", "distinct"), "tokens full": ("full", "distinct")}
            if self.caps.accepts_dropped_ids:
                batches["all to one expert"] = ("full", "one expert")
            for what, (tokens, ids) in batches.items():
                setting = attrs.evolve(base, tokens=tokens, ids=ids)
                yield self.case(f"footprint: {what}, {ranks}", "footprint", "footprint", footprint, setting)
            if base.world > 1:
                setting = attrs.evolve(base, tokens="full", ids="distinct")
                yield self.case(f"footprint: bytes on the wire, {ranks}", "footprint", "footprint", wire, setting)
        if self.caps.graph_capturable and base.world == 1:
            yield self.case(f"a CUDA graph, {ranks}", "graph capture", "graph_capturable", checks.captured, base)

    def _between_ranks(self, base: Setting) -> Iterator[Case]:
        """Other spreads of tokens, other orders of arrival, ranks that are late or vanish."""
        claim, ranks = self.claim_of(base), base.ranks
        topologies = ["replicated"] if self.caps.carries_tokens else []
        if self.caps.gathers_tokens:
            topologies.append("split")
        for topology, tokens in itertools.product(topologies, ("unequal", "none")):
            own = "gathers_tokens" if topology == "split" else claim
            yield self.case(
                f"numbers: {topology} tokens, {tokens}, {ranks}",
                "cross-rank reduce",
                own,
                checks.numbers,
                attrs.evolve(base, topology=topology, tokens=tokens),
                "cross-rank reduce",
            )
        for placement in sorted(self.caps.placements, key=lambda p: p.value):
            for experts in (4 * base.world, 4 * base.world + 1):
                setting = self.fit(attrs.evolve(base, placement=placement, experts=experts))
                yield self.case(
                    f"numbers: {placement.value}, {experts} experts, {ranks}",
                    "expert map",
                    claim,
                    checks.numbers,
                    setting,
                    "expert map",
                )
        if self.caps.carries_tokens:
            yield self.case(
                f"numbers: no bound of T, {ranks}",
                "rows",
                claim,
                checks.numbers,
                attrs.evolve(base, bounded=False),
                "rows",
            )
            yield self.case(
                f"capacity: one rank above it, {ranks}",
                "capacity",
                claim,
                checks.too_many_tokens,
                self.fit(attrs.evolve(base, tokens="full", ids="every expert")),
                "rank 0",
            )
        late = dict.fromkeys(range(1, base.world), 0.004)
        for what, faults in {"in any order": Faults(jitter=0.001, seed=1), "late": Faults(delay=late)}.items():
            yield self.case(
                f"faults: ranks arrive {what}, {ranks}", "faults", claim, checks.numbers, base, "faults", faults
            )
        for collective in range(2 if self.caps.carries_tokens else 0):
            yield self.case(
                f"faults: a rank vanishes at collective {collective}, {ranks}",
                "faults",
                claim,
                checks.survives,
                base,
                collective,
            )

    def _combinations(self) -> Iterator[Case]:
        """Every two declared values meet in some layer."""
        caps = self.caps
        duplicates = () if caps.accepts_duplicate_ids else ("duplicates", "mixed")
        topologies = ["own" if caps.carries_tokens else "replicated"]
        if caps.carries_tokens:
            topologies.append("replicated")
        axes: dict[str, list[Any]] = {
            "scheme": self._schemes(),
            "world": self.worlds,
            "tokens": ["unequal", "full", "none on some", "one in all"],
            "ids": [ids for ids in IDS_OF_SOMEBODY if ids not in duplicates],
            "dtype": [dtype for dtype in MODEL_DTYPES if dtype in caps.dtypes],
            "placement": sorted(caps.placements, key=lambda p: p.value),
            "top_k": [1, 2, 5],
            "topology": topologies,
            "bounded": [True, False],
        }
        for row in pairwise(axes, _makes_sense):
            setting = self.fit(Setting(**row))
            quantized = setting.scheme is not UNQUANTIZED
            claim = f"payload {setting.scheme.name}" if quantized else "any two declared values"
            duty = "input quantization" if quantized else "rows"
            yield self.case(f"together: {_described(setting, row)}", duty, claim, checks.numbers, setting, duty)
        for scheme, world in itertools.product(self._schemes()[1:], self.worlds):
            base = self.fit(Setting(world=world, topology=self.topology(world), scheme=scheme))
            yield self.case(
                f"delivered: payload {scheme.name}, {base.ranks}",
                "input quantization",
                f"payload {scheme.name}",
                delivered,
                base,
            )

    def _schemes(self) -> list[QuantScheme]:
        """Unquantized first, then what it declares as payloads and can be found here."""
        found = [UNQUANTIZED] if MODEL_DTYPE_PAYLOAD in self.caps.payloads else []
        if ROW_WISE_PAYLOAD in self.caps.payloads:
            found.append(ROW_WISE_SCHEME)
        methods = registry().quant_methods
        for name in sorted(self.caps.payloads - {MODEL_DTYPE_PAYLOAD, ROW_WISE_PAYLOAD}):
            if name in methods:
                found.append(methods[name].factory().scheme)
        return found or [UNQUANTIZED]

    def _declarations(self) -> Iterator[Case]:
        caps = self.caps
        bench = attrs.evolve(self.bench, candidate=claims.available(self.bench.candidate))
        there = device_of(caps)
        world = self.worlds[-1]
        base = self.fit(Setting(world=world, topology=self.topology(world)))

        def planner(device: Device | None = None, **changes: Any) -> claims.Planner:
            return lambda: bench.plan(self.fit(attrs.evolve(base, **changes)), device=device or there)

        yield from claims.declaration_cases(self.bench.candidate, base.problem(0, there))
        for dtype in sorted(caps.dtypes, key=str):
            yield claims.claimed(str(dtype), f"dtype {dtype}", [planner(dtype=dtype)])
        for device_type in sorted(caps.device_types):
            yield claims.claimed(device_type, f"device {device_type}", [planner(device_of(caps, device_type))])
        for placement in sorted(caps.placements, key=lambda p: p.value):
            yield claims.claimed(placement.value, f"placement {placement.value}", [planner(placement=placement)])
        for count in self.worlds:
            name = attrs.evolve(base, world=count).ranks
            spread = planner(world=count, topology=self.topology(count))
            yield claims.claimed(name, "min_ep_size, max_ep_size", [spread])
        if caps.deterministic:
            yield claims.claimed("deterministic", "deterministic", [planner(deterministic=True)])
        if caps.graph_capturable and "cuda" in caps.device_types:
            problem = base.problem(0, device_of(caps, "cuda"))
            problem = attrs.evolve(problem, config=attrs.evolve(problem.config, cuda_graph=True))
            made = [functools.partial(_plan_of, bench, problem)]
            yield claims.claimed("a CUDA graph", "graph_capturable", made)
        for scheme in self._schemes():
            yield claims.claimed(f"payload {scheme.name}", f"payload {scheme.name}", [planner(scheme=scheme)])
        layers: dict[str, dict[str, Any]] = {
            "a routed scale": {"routed_scaling_factor": 2.0},
            "shared experts": {"has_shared_experts": True},
            "a clamp and biases": {"activation": ActivationSpec("silu", limit=7.0, bias=True)},
        }
        if caps.hidden_sizes is None:
            layers["padded H"] = {"padded_hidden_size": 2 * base.hidden}
        for name, changes in layers.items():
            problem = base.problem(0, there)
            problem = attrs.evolve(problem, config=attrs.evolve(problem.config, **changes))
            yield claims.one_owner(name, EVERY, functools.partial(_plan_of, bench, problem))
        for name, problem in unclaimed(caps, base, there, self.fit):
            yield claims.refused(
                name, "dispatch", bench.candidate, problem, functools.partial(_plan_of, bench, problem)
            )


def _plan_of(bench: DispatchBench, problem: Problem) -> Plan:
    return select(problem, [bench.candidate], [oracle_experts(PLAIN, problem.scheme)])


def _makes_sense(row: Row) -> bool:
    if row["world"] == 1 and row["topology"] == "replicated":
        return False
    return bool(row["bounded"] or row["scheme"] is UNQUANTIZED)


def _described(setting: Setting, row: Row) -> str:
    dtype = str(setting.dtype).removeprefix("torch.")
    bound = "" if row["bounded"] else ", no bound of T"
    return (
        f"{setting.ranks}, {setting.scheme.name}, {dtype}, tokens {setting.tokens} ({setting.topology}), ids "
        f"{setting.ids}, K = {setting.top_k}, E = {setting.experts}, {setting.placement.value}{bound}"
    )
