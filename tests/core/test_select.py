"""Selection: pure, by priority, the dispatch decides the format, every pair keeps all of its reasons."""

from __future__ import annotations

import json

import attrs
import pytest
import torch

import moe_core
from moe_core import (
    ActivationFormat,
    Availability,
    Device,
    Duty,
    ExpertPlacement,
    MoEParallelConfig,
    Problem,
    QuantScheme,
    QuantSpec,
    SharedExpertsOrder,
    UnsupportedError,
)
from moe_core.interfaces import Candidate
from moe_core.plugins import registry
from moe_core.select import select
from moe_core.types import MODEL_DTYPE_PAYLOAD

CPU = Device("cpu")


def candidate(kind, base, name, priority=0, availability=Availability(True), **changes):
    made = registry().find(kind, base)
    return attrs.evolve(
        made,
        name=name,
        priority=priority,
        availability=availability,
        capabilities=attrs.evolve(made.capabilities, **changes),
    )


@pytest.fixture
def problem(config):
    def make(parallel=MoEParallelConfig(), scheme=moe_core.UNQUANTIZED, device=CPU, **changes):
        return Problem(config=config(**changes), parallel=parallel, scheme=scheme, device=device)

    return make


def reasons(error_or_plan):
    reports = getattr(error_or_plan, "rejections", None) or error_or_plan.reports
    return [(r.dispatch, r.experts, item.candidate, item.reason) for r in reports for item in r.rejections]


def test_the_highest_priority_pair_without_a_rejection_wins_and_the_table_keeps_all(problem):
    dispatches = [candidate("dispatch", "local", "a", 1), candidate("dispatch", "local", "b", 5, device_types={"cuda"})]
    experts = [candidate("experts", "torch", "x", 1), candidate("experts", "torch", "y", 3, dtypes={torch.bfloat16})]
    plan = select(problem(), dispatches, experts)
    assert (plan.dispatch.name, plan.ranges[0].candidate.name) == ("a", "x")
    assert [(r.dispatch, r.experts, r.verdict) for r in plan.reports] == [
        ("b", "y", "refused"),
        ("b", "x", "refused"),
        ("a", "y", "refused"),
        ("a", "x", "chosen"),
    ]
    both = [item.reason for item in plan.reports[0].rejections]
    assert len(both) == 2, "a pair keeps all of its reasons, not the first"
    assert "runs on cuda, not on cpu" in both[0]
    assert "float32" in both[1]


def test_equal_priorities_fall_back_to_the_name_and_never_to_the_order_of_registration(problem):
    dispatches = [candidate("dispatch", "local", name) for name in "cab"]
    experts = [candidate("experts", "torch", name) for name in "zyx"]
    for _ in range(2):
        plan = select(problem(), dispatches, experts)
        assert (plan.dispatch.name, plan.ranges[0].candidate.name) == ("a", "x")
        dispatches.reverse()
        experts.reverse()


@pytest.mark.parametrize(("most", "wins"), [(None, "few"), (255, "few"), (256, "many"), (9999, "many")])
def test_a_dispatch_may_have_another_priority_from_so_many_tokens_a_rank_on(problem, most, wins):
    dispatches = [candidate("dispatch", "local", "few", ((0, 20), (256, -7))), candidate("dispatch", "local", "many")]
    plan = select(problem(max_tokens_per_rank=most), dispatches, [registry().find("experts", "torch")])
    assert plan.dispatch.name == wins
    assert plan.reports[0].priority[0] == (20 if wins == "few" else 0)


def test_a_loser_by_priority_is_in_the_table(problem):
    plan = select(
        problem(),
        [candidate("dispatch", "local", "a")],
        [candidate("experts", "torch", n, p) for n, p in (("x", 2), ("y", 1))],
    )
    assert [(r.experts, r.verdict) for r in plan.reports] == [("x", "chosen"), ("y", "outranked")]


def test_the_format_comes_from_the_dispatch(problem):
    duties = registry().find("experts", "torch").capabilities.owns
    only = {f: {f: duties[f]} for f in ActivationFormat}
    experts = [
        candidate("experts", "torch", "standard_only", 9, owns=only[ActivationFormat.STANDARD]),
        candidate("experts", "torch", "batched_only", 1, owns=only[ActivationFormat.BATCHED]),
    ]
    plan = select(problem(), [registry().find("dispatch", "batched")], experts)
    assert plan.activation_format is ActivationFormat.BATCHED
    assert plan.ranges[0].candidate.name == "batched_only", "priority does not buy another format than the dispatch's"
    assert (
        "batched",
        "standard_only",
        "experts standard_only",
        "takes standard format, batched delivers batched",
    ) in reasons(plan)


@pytest.mark.parametrize(
    ("kind", "changes", "layer", "expected"),
    [
        (
            "dispatch",
            {"placements": frozenset({ExpertPlacement.LINEAR})},
            {"placement": ExpertPlacement.ROUND_ROBIN},
            "placement round_robin: serves linear",
        ),
        ("dispatch", {"hidden_sizes": frozenset({2048})}, {}, "hidden size 24: supports [2048]"),
        ("dispatch", {"max_tokens_per_rank": 128}, {}, "max_tokens_per_rank = None: must be set, to at most 128"),
        ("dispatch", {"max_topk": 1}, {}, "top_k = 2: at most 1"),
        ("dispatch", {"graph_capturable": False}, {"cuda_graph": True}, "cannot be captured in a CUDA graph"),
        ("dispatch", {"min_ep_size": 2}, {}, "needs 2 or more expert-parallel ranks; here ep = 1"),
        ("experts", {"deterministic": False}, {"deterministic": True}, "is not deterministic"),
        ("experts", {"activations": frozenset({"gelu"})}, {}, "activation silu: supports gelu"),
        (
            "experts",
            {"gate_up_layouts": frozenset({moe_core.GateUpLayout.INTERLEAVED})},
            {},
            "gate/up layout gate_up: supports interleaved",
        ),
        (
            "experts",
            {"ungated": False},
            {"activation": moe_core.ActivationSpec("relu2", None)},
            "without a gate is not supported",
        ),
        (
            "experts",
            {"clamp": False},
            {"activation": moe_core.ActivationSpec(limit=7.0)},
            "activation clamp (limit = 7.0) is not supported",
        ),
        (
            "experts",
            {"bias": False},
            {"activation": moe_core.ActivationSpec(bias=True)},
            "expert biases are not supported",
        ),
        (
            "experts",
            {"router_weight_on_input": False},
            {"router_weight_on_input": True},
            "router weight on the input with top_k = 2 is not supported",
        ),
        ("experts", {"hidden_alignment": 16}, {}, "hidden size 24: must be a multiple of 16"),
        ("experts", {"intermediate_alignment": 32}, {}, "intermediate size per rank 16: must be a multiple of 32"),
        ("experts", {"refuse": lambda p: f"dislikes E = {p.config.num_experts}"}, {}, "dislikes E = 6"),
        (
            "experts",
            {"payloads": frozenset({"fp8"})},
            {},
            "no common payload: d carries ['model dtype'], e accepts ['fp8']",
        ),
    ],
)
def test_each_declared_limit_refuses_with_its_reason(problem, kind, changes, layer, expected):
    d = candidate("dispatch", "local", "d", **(changes if kind == "dispatch" else {}))
    e = candidate("experts", "torch", "e", **(changes if kind == "experts" else {}))
    with pytest.raises(UnsupportedError) as caught:
        select(problem(**layer), [d], [e])
    assert expected in "\n".join(reason for *_, reason in reasons(caught.value))
    assert expected in str(caught.value), "the message prints the table"


def test_devices_and_availability_refuse(problem):
    hopper = Device("cuda", (9, 0), "H200")
    e = candidate("experts", "torch", "e", min_compute_capability=(10, 0))
    d = candidate("dispatch", "local", "d", availability=Availability(False, "libfoo.so is missing: pip install foo"))
    with pytest.raises(UnsupportedError) as caught:
        select(problem(device=hopper), [d], [e])
    assert "needs compute capability 10.0, H200 has (9, 0)" in str(caught.value)
    assert "libfoo.so is missing: pip install foo" in str(caught.value)


def test_tokens_of_other_ranks_need_a_dispatch_that_carries_them(problem):
    spread = MoEParallelConfig.fold(dp_size=2, expert_parallel=True)
    with pytest.raises(UnsupportedError, match="carries no tokens between ranks, and with dp_size = 2"):
        select(problem(parallel=spread), [registry().find("dispatch", "local")], [registry().find("experts", "torch")])


def test_equal_shares_are_asked_for_with_the_legal_numbers(problem):
    d = candidate("dispatch", "local", "d", needs_equal_shares=True)
    with pytest.raises(UnsupportedError, match=r"needs equal shares: 6 experts on 4 ranks; .* \[1, 2, 3, 6\]"):
        select(problem(parallel=MoEParallelConfig(ep_size=4)), [d], [registry().find("experts", "torch")])
    assert select(problem(parallel=MoEParallelConfig(ep_size=3)), [d], [registry().find("experts", "torch")])


def test_routing_tables_need_equal_shares(problem):
    tables = candidate("dispatch", "local", "d", needs_round_robin_routing_tables=True)
    uneven = {"parallel": MoEParallelConfig(ep_size=4), "placement": ExpertPlacement.ROUND_ROBIN}
    with pytest.raises(UnsupportedError, match=r"needs equal shares: 6 experts on 4 ranks"):
        select(problem(**uneven), [tables], [registry().find("experts", "torch")])
    linear = {**uneven, "placement": ExpertPlacement.LINEAR}
    assert select(problem(**linear), [tables], [registry().find("experts", "torch")])


def test_shared_experts_orders(problem):
    split = candidate("dispatch", "local", "split", split=True)
    unsafe = candidate("dispatch", "local", "unsafe", overlap_safe=False)
    experts = [registry().find("experts", "torch")]
    assert select(problem(), [split], experts).shared_experts_order is SharedExpertsOrder.NONE
    assert (
        select(problem(has_shared_experts=True), [split], experts).shared_experts_order is SharedExpertsOrder.INTERNAL
    )
    assert (
        select(problem(has_shared_experts=True), [unsafe], experts).shared_experts_order
        is SharedExpertsOrder.SEQUENTIAL
    )
    asked = {"has_shared_experts": True, "shared_experts_order": SharedExpertsOrder.INTERNAL}
    with pytest.raises(UnsupportedError, match="not declared safe for shared experts in order internal"):
        select(problem(**asked), [unsafe], experts)
    asked["shared_experts_order"] = SharedExpertsOrder.MULTI_STREAM
    with pytest.raises(UnsupportedError, match="multi_stream need a CUDA device, not cpu"):
        select(problem(**asked), [split], experts)


FP8 = QuantScheme("fp8", QuantSpec("float8_e4m3fn", (128, 128)), QuantSpec("float8_e4m3fn", (1, 128), dynamic=True))


def test_the_payload_is_the_scheme_where_both_can_and_its_owner_follows(problem):
    payloads = frozenset({"fp8", MODEL_DTYPE_PAYLOAD})
    d = candidate("dispatch", "local", "d", payloads=payloads)
    plain = candidate("dispatch", "local", "plain")
    e = candidate("experts", "torch", "e", payloads=payloads, schemes=frozenset({"fp8"}))
    plan = select(problem(scheme=FP8), [d], [e])
    assert (plan.payload, plan.owners[Duty.INPUT_QUANTIZATION]) == ("fp8", "prepare of d")
    plan = select(problem(scheme=FP8), [plain], [e])
    assert (plan.payload, plan.owners[Duty.INPUT_QUANTIZATION]) == (MODEL_DTYPE_PAYLOAD, "experts e")


def test_ranges_hold_the_best_experts_at_each_row_bound_and_only_mixable_ones(problem):
    experts = [
        candidate("experts", "torch", "decode", ((0, 30), (64, 5))),
        candidate("experts", "torch", "prefill", ((0, 10), (64, 20))),
        candidate("experts", "torch", "other_layout", ((0, 1), (1024, 99)), weight_layout={"unquantized": "packed"}),
    ]
    d = [candidate("dispatch", "local", "d")]
    plan = select(problem(), d, [experts[0], experts[1]])
    assert [(r.first_row, r.candidate.name) for r in plan.ranges] == [(0, "decode"), (64, "prefill")]
    fixed = select(problem(), d, [experts[0], experts[1]], experts="prefill")
    assert [(r.first_row, r.candidate.name) for r in fixed.ranges] == [(0, "prefill")], "an explicit request fixes one"
    mixed = select(problem(), d, experts)
    assert len({r.candidate.capabilities.weight_layout.get("unquantized") for r in mixed.ranges}) == 1


def test_explain_and_json_hold_the_same_table(problem):
    plan = select(
        problem(), [registry().find("dispatch", n) for n in ("batched", "local")], [registry().find("experts", "torch")]
    )
    text, data = plan.explain(), json.loads(json.dumps(plan.to_dict()))
    assert data["dispatch"]["name"] == "local"
    label = f"moe-core {moe_core.__version__}"
    assert data["experts"] == [{"first_row": 0, "name": "torch", "plugin": label, "why": "priority 0"}]
    assert [row["verdict"] for row in data["candidates"]] == ["chosen", "outranked"]
    for row in data["candidates"]:
        assert f"{row['dispatch']} + {row['experts']}" in text


def test_unknown_names_list_the_known_ones_and_the_package(config):
    with pytest.raises(UnsupportedError) as caught:
        moe_core.plan(config(), dispatch="acme_ep", device="cpu")
    for part in ("unknown dispatch 'acme_ep'", "batched, local", "pip install moe-acme-ep", "moe-core plugins"):
        assert part in str(caught.value)
    with pytest.raises(UnsupportedError, match=r"unknown experts 'cutlass'; .*torch.* pip install moe-experts-cutlass"):
        moe_core.plan(config(), experts="cutlass", device="cpu")
    with pytest.raises(UnsupportedError, match=r"unknown quantization scheme 'fp9'; .*pip install moe-quant-fp9"):
        moe_core.plan(config(), scheme="fp9", device="cpu")
    with pytest.raises(UnsupportedError, match=r"unknown dispatch 'bached'; .* Did you mean 'batched'\?$"):
        moe_core.plan(config(), dispatch="bached", device="cpu")


def test_an_explicit_request_is_honoured_or_refused_never_replaced(config):
    assert moe_core.plan(config(), dispatch="batched", device="cpu").dispatch.name == "batched"
    with pytest.raises(UnsupportedError, match=r"as asked \(dispatch 'local', experts 'torch'\)"):
        moe_core.plan(config(), dispatch="local", experts="torch", device=Device("xpu"))


def test_a_probe_that_raises_is_that_backends_reason(config, plugin, backend):
    def probe():
        raise OSError("driver gone")

    plugin(dispatch=("broken", *backend("dispatch", "local"), probe, 99))
    plan = moe_core.plan(config(), device="cpu")
    assert plan.dispatch.name == "local"
    assert ("broken", "torch", "dispatch broken", "its probe raised OSError: driver gone") in reasons(plan)


def test_candidates_are_frozen():
    assert isinstance(registry().find("dispatch", "local"), Candidate)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        registry().find("dispatch", "local").priority = 3
