"""What a gloo rank can be asked to do; see `gloo_worker.py`."""

from __future__ import annotations

import time
from typing import Any

import attrs
import torch
import vendor_cases
from rank_cases import Case, build, layer_config, run
from vendor_cases import VendorCase, register_emulations

import moe_core
from moe_core import MoEParallelConfig


def run_cases(group: Any, cases: list[Case]) -> list[torch.Tensor]:
    """Each case twice; the first results, if the second have the same bits."""
    results = [run(group, case) for case in cases]
    again = [run(group, case) for case in cases]
    assert all(map(torch.equal, results, again)), "the same bits each time"
    return results


def build_with(group: Any, case: Case, changes: list[dict[str, Any]]) -> tuple[str, float]:
    """Build a layer whose config differs by rank; the error's text and the seconds that it took."""
    started = time.monotonic()
    parallel = MoEParallelConfig.fold(dp_size=group.size, dp_rank=group.rank, expert_parallel=True)
    config = attrs.evolve(layer_config(case), **changes[group.rank])
    try:
        moe_core.build_runner(config, parallel=parallel, dispatch=case.dispatch, group=group, device="cpu")
    except moe_core.MoEError as error:
        return str(error), time.monotonic() - started
    return "", time.monotonic() - started


def in_order(group: Any, case: Case) -> int:
    """The number of steps that went through after whatever happened before in this pool."""
    runner = build(case, group)
    return int(runner(torch.ones(2, 24), torch.ones(2, 6)).shape[0])


def run_vendor(group: Any, case: VendorCase) -> list[torch.Tensor]:
    """A layer over a vendor's dispatch, through its emulation."""
    register_emulations()
    return vendor_cases.run(group, case)
