"""Two micro-batches in flight inside one layer: the default runner's numbers, and refusals where it can't be done."""

from __future__ import annotations

import copy
import functools
import itertools

import attrs
import pytest
import torch
import vendor_cases
from rank_cases import ODD_TOKENS, TOKENS, Case, E, H, assert_right, build, inputs

import moe_core
from moe_core import MoEError, MoEParallelConfig, UnsupportedError
from moe_core.interfaces import Experts
from moe_core.plugins import registry
from moe_core.testing import Faults, run_on_ranks
from moe_core.two_batch import TwoBatchRunner


def run(group, case, runner="two_batch", **options):
    x, logits = (parts[group.rank] for parts in inputs(case))
    before = x.clone()
    layer = build(case, group, runner=runner, **options)
    out = layer(x, logits)
    assert torch.equal(out, layer(x, logits)), "the same bits each time"
    assert torch.equal(x, before), "inputs are read only"
    assert layer.kernel._in_flight == 0
    layer.check()
    return out


@pytest.mark.parametrize("tokens", TOKENS | ODD_TOKENS)
@pytest.mark.parametrize("dispatch", ["local", "all_gather", "batched"])
def test_the_result_is_that_of_one_rank_whoever_comes_first(dispatch, tokens):
    for world, shared in itertools.product((1, 2, 4), (None, "whole")):
        case = Case(dispatch, world, tokens, shared=shared, scale=1.7)
        results = run_on_ranks(world, run, case)
        assert_right(results, case)
        again = run_on_ranks(world, run, case, faults=Faults(jitter=0.001, seed=world, delay={0: 0.001}))
        assert all(map(torch.equal, results, again))


@pytest.mark.parametrize("case", [
    Case("all_gather", 3, bounded=False), Case("batched", 3, fixed=True), Case("batched", 3, top_k=5),
], ids=str)  # fmt: skip
def test_the_other_forms_of_the_exchange(case):
    assert_right(run_on_ranks(3, run, case), case)


class Elementwise(Experts):
    """Experts whose result for a row has the same bits in any company: rows times (expert + 2), in the order of K."""

    def workspace_shapes(self, rows, activation_format):
        return {}

    def apply(self, dispatched, weights, workspaces, out):
        if dispatched.tokens_per_expert is not None:
            for local, count in enumerate(dispatched.tokens_per_expert.tolist()):
                out[local, :count] = dispatched.x[local, :count] * (local + 2)
            return
        out.zero_()
        for k in range(dispatched.topk_ids.shape[1]):
            ids, scores = dispatched.topk_ids[:, k : k + 1], dispatched.topk_weights[:, k : k + 1]
            out.add_(torch.where(ids < 0, 0.0, dispatched.x * ((ids + 2) * scores)))


@pytest.mark.parametrize("tokens", TOKENS | ODD_TOKENS)
@pytest.mark.parametrize("dispatch", ["all_gather", "batched"])
def test_the_bits_are_the_default_runners_where_rows_are_independent(dispatch, tokens, monkeypatch):
    found = registry()
    elementwise = attrs.evolve(found.experts["torch"], factory=lambda *_: Elementwise())
    monkeypatch.setattr(found, "experts", {**found.experts, "torch": elementwise})
    for fixed in (False, dispatch == "batched"):
        case = Case(dispatch, 4, tokens, shared="whole", fixed=fixed)
        default = run_on_ranks(4, run, case, "default")
        assert any(out.abs().sum() > 0 for out in default) or not sum(case.sizes)
        assert all(map(torch.equal, default, run_on_ranks(4, run, case)))


def test_one_batch_travels_while_the_others_experts_run():
    """By the order in which things happen on one rank; and buffers are for half of the tokens."""
    happened = []

    def work(group):
        layer = build(Case("all_gather", 2, shared="whole"), group, runner="two_batch")
        assert layer.plan.config.max_tokens_per_rank == 9
        assert layer.kernel.prepare_finalize.max_tokens == 5
        if group.rank == 0:
            backend, experts = layer.kernel.prepare_finalize, layer.kernel.experts[0]
            for owner, name in ((backend, "prepare_start"), (backend, "finalize_start"), (experts, "apply")):
                setattr(owner, name, noting(name, getattr(owner, name)))
        x, logits = (parts[group.rank] for parts in inputs(Case("all_gather", 2)))
        layer(x, logits)

    def noting(name, function):
        def noted(*arguments, **options):
            happened.append(name)
            if name.startswith("end of"):
                return function()
            result = function(*arguments, **options)
            return noting(f"end of {name}", result) if name.endswith("_start") and callable(result) else result

        return noted

    run_on_ranks(2, work)
    assert happened == [
        "prepare_start", "end of prepare_start", "prepare_start", "apply", "finalize_start",
        "end of prepare_start", "apply", "finalize_start", "end of finalize_start", "end of finalize_start",
    ]  # fmt: skip


def test_a_dispatch_with_one_slot_is_refused_with_the_reason(monkeypatch):
    found = registry()
    local = found.dispatch["local"]
    single = attrs.evolve(local, name="single", capabilities=attrs.evolve(local.capabilities, max_in_flight=1))
    monkeypatch.setattr(found, "dispatch", {**found.dispatch, "single": single})
    with pytest.raises(
        UnsupportedError, match=r"2 micro-batches in flight, and dispatch single declares max_in_flight = 1"
    ):
        run_on_ranks(1, run, Case("single", 1))


@pytest.fixture
def _vendors_in_two_batches(monkeypatch):
    pytest.importorskip("moe_nixl_ep")
    pytest.importorskip("moe_mori")
    records = vendor_cases.register_emulations()
    monkeypatch.setattr(moe_core, "build_runner", functools.partial(moe_core.build_runner, runner="two_batch"))
    yield
    monkeypatch.undo()
    for record in records:
        moe_core.unregister_plugin(record.name)


@pytest.mark.usefixtures("_vendors_in_two_batches")
def test_a_vendors_dispatch_with_two_slots_and_one_with_one():
    for scheme in ("unquantized", "fp8_block"):
        case = vendor_cases.VendorCase("nixl_ep", 2, scheme=scheme, shared=True)
        for rank, outs in enumerate(run_on_ranks(2, vendor_cases.run, case)):
            wanted, bound, _ = vendor_cases.expected(case, rank)
            assert vendor_cases.close(outs[0], wanted, bound)
    with pytest.raises(UnsupportedError, match=r"dispatch mori_emulated declares max_in_flight = 1"):
        run_on_ranks(2, vendor_cases.run, vendor_cases.VendorCase("mori", 2))


def test_ranks_with_different_runners_are_told_before_they_hang():
    def work(group):
        return build(Case("all_gather", 2, bounded=False), group, runner=("default", "two_batch")[group.rank])

    for error in run_on_ranks(2, work, return_errors=True):
        assert isinstance(error, MoEError)
        assert "micro-batches: rank 0 has None, rank 1 has 2" in str(error)


@pytest.mark.parametrize("where", ["experts", "shared experts"])
def test_after_an_error_no_slot_is_taken(where):
    class Failing(torch.nn.Module):
        def forward(self, x):
            if fails[0] and where == "shared experts":
                raise KeyError("shared")
            return x

    fails = [True]

    def work(group):
        layer = build(Case("all_gather", 2, shared="whole"), group, runner="two_batch",
                      shared_experts=moe_core.SharedExperts(Failing()))  # fmt: skip
        experts = layer.kernel.experts[0]
        run_whole, calls = experts.apply, []

        def apply(*arguments):
            calls.append(1)
            if fails[0] and where == "experts" and len(calls) == 1:
                raise KeyError("experts")
            run_whole(*arguments)

        experts.apply = apply
        x, logits = (parts[group.rank] for parts in inputs(Case("all_gather", 2)))
        with pytest.raises(KeyError, match=where.split()[0]):
            layer(x, logits)
        assert layer.kernel._in_flight == 0
        group.barrier()
        fails[0] = False
        return layer(x, logits)

    run_on_ranks(2, work)


def test_padding_and_load_are_the_default_runners():
    def work(group):
        case = Case("local", 1)
        x, logits = torch.randn(7, H), torch.randn(7, E)
        layers = [build(case, group, runner=name) for name in ("default", "two_batch")]
        for layer in layers:
            layer.count_load()
        outs = [layer(x, logits, num_valid_tokens=torch.tensor([5])) for layer in layers]
        torch.testing.assert_close(*outs)
        assert torch.equal(*(layer.load.read() for layer in layers))

    run_on_ranks(1, work)


def test_it_is_chosen_by_name():
    layer = moe_core.build_runner(
        moe_core.MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=8, dtype=torch.float32),
        parallel=MoEParallelConfig(), device="cpu", runner="two_batch",
    )  # fmt: skip
    for parameter in layer.routed_experts.parameters():
        torch.nn.init.normal_(parameter)
    x, logits = torch.randn(3, 8), torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x, logits), layer(x, logits))
    copied = copy.deepcopy(layer)
    assert isinstance(copied, TwoBatchRunner)
    assert copied.plan == layer.plan
    assert copied.kernel is not layer.kernel
    assert torch.equal(copied(x, logits), layer(x, logits))
