"""moe-nixl-ep and moe-mori through their emulations, on virtual ranks and on gloo processes, against one rank.

No vendor library runs here: what is tested is the adapters, and that everything of ours around them fits.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator

import pytest
import torch
from rank_cases import TOKENS
from vendor_cases import VERSIONS, VendorCase, build, close, expected, payload_of, register_emulations, run

import moe_core
from moe_core import ExpertPlacement, SharedExpertsOrder, UnsupportedError
from moe_core.testing import Faults, run_on_ranks

DISPATCHES = ("nixl_ep", "mori")
SCHEMES = ("unquantized", "fp8_block", "nvfp4")
ALL_SCHEMES = (*SCHEMES, "fp8_block_ue8m0", "fp8_channel")
TOGETHER = "fp8_tensor_dynamic"
"""One scale for all rows that an expert gets at once, so that no split over ranks gives what one rank gives."""
FROBENIUS = {"unquantized": 0.01, "nvfp4": 0.01}
"""Relative error against fp64 with the very weights; where activations are quantized, 0.06."""
REQUANTIZED = ("fp8_block", "fp8_block_ue8m0", "fp8_channel")
"""The experts quantize the input of their second GEMM. The last bit of the first depends on how many rows there are, so
that a value on the border of two codes may fall to either side."""


@pytest.fixture(autouse=True, scope="module")
def _emulations() -> Iterator[None]:
    records = register_emulations()
    yield
    for record in records:
        moe_core.unregister_plugin(record.name)


def nearly(out: torch.Tensor, wanted: torch.Tensor, bound: torch.Tensor) -> bool:
    """The bound holds but for one value in two hundred, and in the mean without exception."""
    difference = (out.float() - wanted.float()).abs()
    beyond = (difference > bound).float().mean() if out.numel() else torch.zeros(())
    return bool(beyond < 0.005) and bool(difference.norm() <= bound.norm())


def assert_right(results: list[list[torch.Tensor]], case: VendorCase) -> None:
    for rank, outs in enumerate(results):
        for step, out in enumerate(outs):
            wanted, bound, truth = expected(case, rank, step)
            assert out.shape == wanted.shape
            assert out.dtype == torch.bfloat16
            if case.scheme in REQUANTIZED:
                assert nearly(out, wanted, bound), f"rank {rank}, step {step}: {(out - wanted).abs().max()}"
            else:
                assert close(out, wanted, bound), f"rank {rank}, step {step}: {(out - wanted).abs().max()}"
            if out.numel():
                error = (out.double() - truth).norm() / truth.norm()
                assert error < FROBENIUS.get(case.scheme, 0.06), f"rank {rank}: {error}"


def check(case: VendorCase, faults: Faults | None = None) -> None:
    assert_right(run_on_ranks(case.world, run, case, faults=faults), case)


@pytest.mark.parametrize("tokens", ["equal", "unequal", "none on a rank"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_every_rank_gets_what_one_rank_gives(dispatch, scheme, tokens):
    for world, placement in ((2, ExpertPlacement.ROUND_ROBIN), (4, ExpertPlacement.LINEAR)):
        check(VendorCase(dispatch, world, tokens, scheme, placement))


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_one_rank_needs_no_dispatch_between_ranks(dispatch):
    refused = f"dispatch {dispatch}_emulated: needs 2 .*expert-parallel ranks; here ep = 1"
    with pytest.raises(UnsupportedError, match=refused):
        run_on_ranks(1, lambda group: build(VendorCase(dispatch, 1), group))


@pytest.mark.parametrize(("dispatch", "version"), [(d, v) for d in DISPATCHES for v in VERSIONS[d]])
def test_the_ways_of_every_version(dispatch, version):
    for tokens in ("unequal", "none on a rank"):
        check(VendorCase(dispatch, 2, tokens, "fp8_block", ExpertPlacement.ROUND_ROBIN, version))


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_random_delays_change_nothing(dispatch, monkeypatch):
    """One emulation speaks by collectives, which virtual ranks can delay, the other by a store, as its library does."""
    from moe_nixl_ep.emulation import _Prefixed

    receive = _Prefixed.get

    def late(self, key):
        time.sleep(random.uniform(0, 0.004))
        return receive(self, key)

    monkeypatch.setattr(_Prefixed, "get", late)
    case = VendorCase(dispatch, 4)
    for seed in range(3):
        check(case, Faults(jitter=0.004, seed=seed, delay={seed: 0.003}))


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_widths_that_need_no_padding(dispatch):
    check(VendorCase(dispatch, 2, hidden=2048))


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_shared_experts_run_where_the_dispatch_lets_them(dispatch):
    case = VendorCase(dispatch, 2, shared=True)
    orders = {"nixl_ep": SharedExpertsOrder.INTERNAL, "mori": SharedExpertsOrder.SEQUENTIAL}
    found = run_on_ranks(2, lambda group: build(case, group).plan.shared_experts_order)
    assert found == [orders[dispatch]] * 2
    check(case)


@pytest.mark.parametrize("scheme", [*ALL_SCHEMES, TOGETHER])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_what_travels_follows_from_the_scheme(dispatch, scheme):
    case = VendorCase(dispatch, 2, scheme=scheme)
    assert run_on_ranks(2, lambda group: build(case, group).plan.payload) == [payload_of(case)] * 2


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_several_processes(gloo, dispatch):
    """The same over `TorchGroup` and a store of torch's own."""
    for case in (VendorCase(dispatch, 2), VendorCase(dispatch, 2, "none on a rank", "fp8_block")):
        results = gloo(2)("run_vendor", case)
        assert not [result for result in results if isinstance(result, str)], results
        assert_right(results, case)


@pytest.mark.full
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("scheme", ALL_SCHEMES)
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_the_whole_product(dispatch, scheme, tokens):
    for world, placement in itertools.product((2, 4), ExpertPlacement):
        check(VendorCase(dispatch, world, tokens, scheme, placement))
