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
from moe_core.testing.case import Violation
from moe_core.testing.compare import as_bytes
from moe_core.testing.dispatch_bench import DispatchBench, Rank, Setting
from moe_core.types import ROW_WISE_PAYLOAD, ActivationFormat, Dispatched, DispatchFootprint

CODE_STEP = {"float8_e4m3fn": 0.07, "float4_e2m1": 0.26}
"""Half the distance of the largest codes, of a group's largest magnitude, and a little: what quantizing may change."""
Breach = tuple[str, str]
"""(duty, what is wrong)."""


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
    check_form = _batched_form if batched else _standard_form
    if breach := check_form(rank, flight.dispatched, local):
        raise Violation(*breach)
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


def _batched_form(rank: Rank, dispatched: Dispatched, local: int) -> Breach | None:
    counts, x = dispatched.tokens_per_expert, dispatched.x
    if counts is None or counts.dtype != torch.int32 or tuple(counts.shape) != (local,):
        shown = None if counts is None else f"{counts.dtype} {tuple(counts.shape)}"
        return "tokens_per_expert", f"it is {shown}; the contract is int32 (E_l,) = ({local},)"
    if x.dim() != 3 or x.shape[0] != local:
        return "shapes and dtypes", f"x is {tuple(x.shape)}; BATCHED is (E_l = {local}, C, H)"
    if int(counts.max()) > x.shape[1] or int(counts.min()) < 0:
        return "tokens_per_expert", f"counts {counts.tolist()} with C = {x.shape[1]} rows per expert"
    return _payload_form(rank, dispatched)


def _standard_form(rank: Rank, dispatched: Dispatched, local: int) -> Breach | None:
    x, ids, weights, rows = dispatched.x, dispatched.topk_ids, dispatched.topk_weights, dispatched.num_rows
    if ids is None or weights is None or ids.shape[0] != x.shape[0] or weights.shape != ids.shape:
        return "shapes and dtypes", "STANDARD comes with topk_ids and topk_weights of one row per row of x"
    if weights.dtype != torch.float32:
        return "shapes and dtypes", f"topk_weights are {weights.dtype}; the contract is float32"
    if rows is not None and (rows.dtype != torch.int32 or tuple(rows.shape) != (1,)):
        return "shapes and dtypes", f"num_rows is {rows.dtype} {tuple(rows.shape)}; the contract is int32 (1,)"
    if ids.numel() and (int(ids.max()) >= local or int(ids.min()) < -1):
        return (
            "expert map",
            f"topk_ids range from {int(ids.min())} to {int(ids.max())}; local ids are -1 to {local - 1}",
        )
    return _payload_form(rank, dispatched)


def _payload_form(rank: Rank, dispatched: Dispatched) -> Breach | None:
    x, scheme = dispatched.x, rank.setting.scheme
    if x.numel() and x.stride(-1) != 1:
        return "shapes and dtypes", f"x has strides {x.stride()}; the contract is unit stride in H"
    if rank.kernel.plan.payload == scheme.name:
        assert scheme.activation is not None, "a payload of a scheme is its activations' format"
        wanted = formats.storage_dtype(scheme.activation)
        if dispatched.x_scale is None:
            return "input quantization", f"the payload is {scheme.name!r}, and x_scale is None"
    else:
        wanted = rank.setting.dtype
        if dispatched.x_scale is not None:
            return "input quantization", "the payload is the model dtype, and there is an x_scale"
    if x.dtype != wanted:
        return "shapes and dtypes", f"x is {x.dtype}; this payload is {wanted}"
    return None


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
    """What it declares of its memory is host arithmetic, and its row bound is the one that its experts get."""
    declared, plan = bench.candidate.capabilities.footprint, bench.possible(setting)
    assert declared is not None, "asked of backends that declare one"
    size = setting.sizes()[0]
    first, second = (declared(plan.problem, plan.payload, size) for _ in range(2))
    if first != second or not isinstance(first, DispatchFootprint):
        raise Violation("footprint", f"it answers {first!r}, then {second!r}; the contract is one DispatchFootprint")
    standard = plan.activation_format is ActivationFormat.STANDARD
    rows = bench.on_ranks(setting, lambda rank: rank.dispatch().dispatched.x.shape[0 if standard else 1])
    if rows[0] != first.rows:
        raise Violation(
            "footprint", f"at T = {size} it says that the experts get {first.rows} rows; they get {rows[0]}"
        )
