"""The arithmetic that kernels and emulation share."""

from __future__ import annotations

import itertools

import pytest

from moe_core.expert_map import ExpertMapManager
from moe_core.types import ExpertPlacement
from moe_symm import layout as arithmetic
from moe_symm.layout import COMBINE, DISPATCH, LANES, UNITS, Form, Layout, Shares


@pytest.mark.parametrize("placement", ExpertPlacement)
@pytest.mark.parametrize(("experts", "ranks"), [(256, 4), (8, 8), (10, 3), (9, 8), (17, 2)])
def test_shares_are_the_placement(placement, experts, ranks):
    shares = Shares.of(experts, ranks, placement)
    found = [shares.place(expert) for expert in range(experts)]
    for rank in range(ranks):
        held = ExpertMapManager(experts, ranks, rank, placement).local_experts
        assert shares.held(rank) == len(held)
        assert [found[expert] for expert in held] == [(rank, local) for local in range(len(held))]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("programs", [1, 3, 16, 64, 128])
def test_each_token_meets_each_rank_once(ranks, programs):
    for rank in range(ranks):
        found = [arithmetic.work_item(item, rank, ranks, programs) for item in range(40 * ranks)]
        assert sorted(found) == list(itertools.product(range(40), range(ranks)))


@pytest.mark.parametrize("items", [0, 1, 7, 64, 1000])
@pytest.mark.parametrize("programs", [1, 16, 64, 128, UNITS])
def test_all_programs_together_count_the_same(items, programs):
    active = arithmetic.signalling(items, programs)
    amounts = [arithmetic.units(program, active) for program in range(active)]
    assert sum(amounts) == UNITS
    assert min(amounts) >= 1


def test_grids_can_count_and_run_at_once():
    pytest.importorskip("triton")
    from moe_symm import launches

    for tokens in (0, 1, 2, 3, 16, 17, 128, 256, 257, 8192):
        assert all(1 <= launches.dispatch_programs(tokens, quantize) <= UNITS for quantize in (False, True))
        programs, _, warps = launches.combine_grid(Layout(4, max(tokens, 1), 7168, 8, 2))
        assert 1 <= programs <= UNITS
        assert programs * warps <= 128 * 16  # all of them are resident on 132 multiprocessors


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("sizes", [(4, 128, 7168, 8, 2), (3, 5, 13, 5, 4), (8, 1, 1, 1, 2)])
def test_areas_lie_apart_on_borders(sizes, form):
    layout = Layout(*sizes, form)
    choices = 4 * layout.rows * layout.top_k
    back = layout.max_tokens * layout.top_k if form is Form.EXACT else layout.rows
    sizes = {
        "dispatched": 4 * layout.ranks,
        "combined": 4 * layout.ranks,
        "counts": 8 * layout.ranks,
        "epochs": 8,
        "fault": 4,
        "num_rows": 4,
        "ids": choices,
        "weights": choices,
        "rows": layout.rows * layout.pitch * layout.item,
        "scales": 4 * layout.rows * layout.scale_pitch,
        "sums": back * layout.pitch * layout.item,
        "places": 0 if form is Form.STANDARD else choices,
    }
    order = sorted(sizes, key=lambda name: layout.offsets[name])
    for name, following in itertools.pairwise([*order, "end"]):
        assert layout.offsets[name] % 256 == 0
        assert layout.offsets[name] + sizes[name] <= layout.offsets[following]
    assert layout.pitch * layout.item % 16 == 0
    assert layout.pitch >= layout.hidden
    assert layout.quantized_pitch % 16 == layout.scale_pitch * 4 % 16 == 0
    assert layout.hidden <= layout.quantized_pitch <= layout.pitch * layout.item
    assert layout.scale_pitch * 128 >= layout.hidden
    assert layout.total_bytes == LANES * layout.lane_bytes


@pytest.mark.parametrize("form", [Form.STANDARD, Form.BATCHED])
def test_the_promised_size(form):
    assert Layout(4, 128, 7168, 8, 2, form).total_bytes < 40e6


@pytest.mark.parametrize("stage", [DISPATCH, COMBINE])
def test_a_fault_names_ranks_and_stage(stage):
    code = arithmetic.fault_code(stage, waiting=0, missing=7)
    assert code > 0
    assert arithmetic.describe_fault(code) == f"rank 0 waited for rank 7 in {arithmetic.STAGES[stage]}"
