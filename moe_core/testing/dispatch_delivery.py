"""Does `prepare` bring each row to each of its experts, in the form that the contract gives it?

Shape letters: H hidden · E_l local experts · K top-k · R received rows · C row capacity per local expert.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from moe_core import formats
from moe_core.expert_map import ExpertMapManager
from moe_core.footprint import payload_row_bytes, share_of_tokens
from moe_core.testing.case import Skip, Violation
from moe_core.testing.compare import as_bytes
from moe_core.testing.dispatch_bench import DispatchBench, Rank, Setting, check_form
from moe_core.testing.virtual import VirtualGroup
from moe_core.types import ROW_WISE_PAYLOAD, ActivationFormat, Dispatched, DispatchFootprint

CODE_STEP = {"float8_e4m3fn": 0.07, "float4_e2m1": 0.26}
"""Half the distance of the largest codes, of a group's largest magnitude, and a little: what quantizing may change."""


def delivered(bench: DispatchBench, setting: Setting) -> None:
    """Each row reaches each rank and expert that it is for, once, bit by bit, and is counted.

    A backend that names a scheme among its payloads, rather than `ROW_WISE_PAYLOAD`, quantizes by itself, and may do
    so in other bits: its rows are recognised by their values.
    """
    for rank, found in enumerate(bench.on_ranks(setting, functools.partial(_look_at_dispatch, bench))):
        wanted = _wanted_rows(bench, setting, rank)
        counted, expected = (Counter(expert for expert, *_ in rows.elements()) for rows in (found, wanted))
        if bench.possible(setting).activation_format is ActivationFormat.BATCHED and counted != expected:
            raise Violation(
                "tokens_per_expert",
                f"rank {rank}: {dict(counted)} rows of each local expert are counted, and {dict(expected)} were sent",
            )
        if found != wanted:
            missing, surplus = wanted - found, found - wanted
            raise Violation(
                "rows",
                f"rank {rank}: of {sum(wanted.values())} rows that its experts should get, {sum(missing.values())} are "
                f"missing or altered, and {sum(surplus.values())} are there that should not be",
            )


def _look_at_dispatch(bench: DispatchBench, rank: Rank) -> Counter[Any]:
    flight = rank.dispatch()
    batched = rank.kernel.plan.activation_format is ActivationFormat.BATCHED
    local = rank.kernel.expert_map.num_local_experts
    check_form(rank.kernel.plan, flight.dispatched, local)
    (_check_counts if batched else _check_choices)(flight.dispatched, local)
    found = _received(flight.dispatched, _by_values(rank.setting) if _own_bits(bench, rank.setting) else _by_bytes)
    rank.land(flight)
    return found


Recognise = Callable[..., Any]
"""Tensors that make up a row (values, scales) → what it is."""


def _by_bytes(*parts: torch.Tensor) -> bytes:
    return b"".join(as_bytes(part).cpu().numpy().tobytes() for part in parts)


def _own_bits(bench: DispatchBench, setting: Setting) -> bool:
    quantized = bench.possible(setting).payload == setting.scheme.name
    return quantized and ROW_WISE_PAYLOAD not in bench.candidate.capabilities.payloads


def _by_values(setting: Setting) -> Recognise:
    """The token, as (rank, number), whose row these quantized values are; "altered" where they are nobody's."""
    spec = setting.scheme.activation
    assert spec is not None, "a payload of a scheme is its activations' format"
    tokens = [(source, row) for source in range(setting.world) for row in range(setting.sizes()[source])]
    rows = torch.cat([setting.batch(source)[0] for source in range(setting.world)]).float()
    bound = CODE_STEP[spec.dtype] * rows.abs().amax(dim=1)

    def recognise(q: torch.Tensor, scale: torch.Tensor) -> Any:
        values = formats.dequantize(q.unsqueeze(0).cpu(), scale.unsqueeze(0).cpu(), spec)
        error = (rows - values[:, : rows.shape[1]]).abs().amax(dim=1)
        nearest = int(error.argmin())
        return tokens[nearest] if bool(error[nearest] <= bound[nearest]) else "altered"

    return recognise


def _received(dispatched: Dispatched, recognise: Recognise) -> Counter[Any]:
    """(local expert, the row, in STANDARD format its weight) → how often: what this rank's experts got."""
    x, scale = dispatched.x, dispatched.x_scale

    def content(*index: int) -> Any:
        return recognise(x[index], *([] if scale is None else [scale[index]]))

    found: Counter[Any] = Counter()
    if dispatched.tokens_per_expert is not None:
        for expert, count in enumerate(dispatched.tokens_per_expert.tolist()):
            found.update((expert, content(expert, slot)) for slot in range(count))
        return found
    assert dispatched.topk_ids is not None and dispatched.topk_weights is not None
    valid = x.shape[0] if dispatched.num_rows is None else int(dispatched.num_rows)
    for row in range(valid):
        for expert, weight in zip(
            dispatched.topk_ids[row].tolist(), dispatched.topk_weights[row].tolist(), strict=True
        ):
            if expert >= 0:
                found[expert, content(row), weight] += 1
    return found


def _check_counts(dispatched: Dispatched, local: int) -> None:
    counts, capacity = dispatched.tokens_per_expert, dispatched.x.shape[1]
    assert counts is not None, "its form was looked at"
    if local and (int(counts.max()) > capacity or int(counts.min()) < 0):
        raise Violation("tokens_per_expert", f"counts {counts.tolist()} with C = {capacity} rows per expert")


def _check_choices(dispatched: Dispatched, local: int) -> None:
    ids = dispatched.topk_ids
    assert ids is not None, "its form was looked at"
    if ids.numel() and (int(ids.max()) >= local or int(ids.min()) < -1):
        raise Violation(
            "expert map",
            f"topk_ids range from {int(ids.min())} to {int(ids.max())}; local ids are -1 to {local - 1}",
        )


def _wanted_rows(bench: DispatchBench, setting: Setting, rank: int) -> Counter[Any]:
    plan = bench.possible(setting)
    held = list(ExpertMapManager(setting.experts, setting.world, rank, setting.placement).local_experts)
    if setting.topology == "split":
        held = list(range(setting.experts))
    batched = plan.activation_format is ActivationFormat.BATCHED
    sources = [rank] if setting.topology == "replicated" and not _moves_replicas(bench) else range(setting.world)
    own_bits = _own_bits(bench, setting)
    wanted: Counter[Any] = Counter()
    for source in sources:
        x, routing = setting.batch(source)
        q: tuple[torch.Tensor, ...] = (x,)
        if setting.scheme.activation is not None and plan.payload == setting.scheme.name:
            q = formats.quantize(x, setting.scheme.activation)
        for token, (ids, weights) in enumerate(
            zip(routing.topk_ids.tolist(), routing.topk_weights.tolist(), strict=True)
        ):
            content: Any = (source, token) if own_bits else _by_bytes(*(part[token] for part in q))
            for expert, weight in zip(ids, weights, strict=True):
                if expert in held:
                    local = held.index(expert)
                    wanted[(local, content) if batched else (local, content, weight)] += 1
    return wanted


def _moves_replicas(bench: DispatchBench) -> bool:
    caps = bench.candidate.capabilities
    return caps.carries_tokens and not caps.local_if_replicated


def footprint(bench: DispatchBench, setting: Setting) -> None:
    """What it declares of its memory is host arithmetic, and no rank's experts get more rows than it says."""
    declared = bench.candidate.capabilities.footprint
    assert declared is not None, "asked of backends that declare one"
    size = setting.sizes()[0]

    def work(rank: Rank) -> None:
        plan = rank.kernel.plan
        first, second = (declared(plan.problem, plan.payload, size) for _ in range(2))
        if first != second or not isinstance(first, DispatchFootprint):
            raise Violation(
                "footprint", f"it answers {first!r}, then {second!r}; the contract is one DispatchFootprint"
            )
        rows = rank.dispatch().dispatched.x.shape[0 if plan.activation_format is ActivationFormat.STANDARD else 1]
        if rows > first.rows:
            raise Violation(
                "footprint",
                f"rank {rank.group.rank}, T = {size}, ids {setting.ids}: it declares rows = {first.rows}, and the "
                f"experts get {rows}; rows is a bound for every routing (DispatchFootprint, docs/plan.md)",
            )

    bench.on_ranks(setting, work)


def wire(bench: DispatchBench, setting: Setting) -> None:
    """Per rank, a step moves no more bytes by the group's collectives than it declares; less is an upper bound.

    Traffic that follows the routing is declared in the mean, so what is declared is first scaled to this batch, by
    rows for each rank or by choices, whichever is more; it may be rounded by less than a row. What moves otherwise, by
    the group's `torch_group` or by memory of peers, is not seen; where nothing is, the case is skipped.
    """
    declared = bench.candidate.capabilities.footprint
    assert declared is not None, "asked of backends that declare one"
    if bench.launched is not None:
        raise Skip("bytes are counted on virtual ranks")
    size = setting.sizes()[0]

    def work(rank: Rank) -> tuple[DispatchFootprint, int, int]:
        group, plan = rank.group, rank.kernel.plan
        assert isinstance(group, VirtualGroup), "real ranks were skipped"
        rank.run(1)  # what is exchanged once is no part of a step
        before = group.received_bytes
        flight = rank.dispatch()
        between = group.received_bytes
        rank.land(flight)
        return declared(plan.problem, plan.payload, size), between - before, group.received_bytes - between

    found = bench.on_ranks(setting, work)
    if not any(there + back for _, there, back in found):
        raise Skip("moves nothing by the group's collectives, so its bytes on the wire can't be counted here")
    more = _more_than_the_mean(bench, setting)
    plan = bench.possible(setting)
    row = sum(payload_row_bytes(plan.problem, plan.payload))
    for rank, (told, *moved) in enumerate(found):
        fields = ("dispatch_wire_bytes", "combine_wire_bytes")
        for field, got, factor in zip(fields, moved, more[rank], strict=True):
            most = round(getattr(told, field) * factor)
            if got >= most + row:
                raise Violation(
                    "footprint",
                    f"rank {rank} of {setting.world}, T = {size}: it declares {field} = {getattr(told, field)}, {most} "
                    f"for this routing, and received {got} from other ranks (DispatchFootprint, docs/plan.md)",
                )


def _more_than_the_mean(bench: DispatchBench, setting: Setting) -> list[tuple[float, float]]:
    """Of each rank, at least 1: how far what it gets, and gets back, is above the mean over uniform routings."""
    world, size = setting.world, setting.sizes()[0]
    problems = [setting.problem(rank, bench.described) for rank in range(world)]
    shares = [share_of_tokens(problem) for problem in problems]
    choices = [setting.top_k * problem.num_local_experts / setting.experts for problem in problems]
    rows, chosen = ([[0] * world for _ in range(world)] for _ in range(2))
    for source in range(world):
        ids = setting.batch(source)[1].topk_ids
        for rank in range(world):
            held = ExpertMapManager(setting.experts, world, rank, setting.placement).local_experts
            here = torch.isin(ids, torch.tensor(held, dtype=ids.dtype))
            rows[source][rank], chosen[source][rank] = int(here.any(dim=1).sum()), int(here.sum())
    found = []
    for rank in range(world):
        others = [other for other in range(world) if other != rank]
        there = max(
            sum(counts[other][rank] for other in others) / (len(others) * size * mean[rank])
            for counts, mean in ((rows, shares), (chosen, choices))
        )
        back = max(
            sum(counts[rank][other] for other in others) / (size * sum(mean[other] for other in others))
            for counts, mean in ((rows, shares), (chosen, choices))
        )
        found.append((max(1.0, there), max(1.0, back)))
    return found
