"""Ranks that never come. MoRI's kernels wait for ever: the watchdog names rank and stage, and ends the process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.errors import MoEError
from moe_core.quant import UNQUANTIZED
from moe_core.testing import Faults, RankDropped, RankFault, run_on_ranks
from moe_core.types import MODEL_DTYPE_PAYLOAD, ExpertPlacement, Routing
from moe_core.watchdog import EXIT_CODE
from moe_mori.emulation import make_emulated


def step(group: Any) -> None:
    config = MoEConfig(
        num_experts=4, top_k=2, hidden_size=16, intermediate_size=8, max_tokens_per_rank=4, dtype=torch.bfloat16
    )
    parallel = MoEParallelConfig.fold(dp_size=group.size, dp_rank=group.rank, expert_parallel=True)
    backend = make_emulated(config, parallel, UNQUANTIZED, group, ExpertPlacement.LINEAR)
    x, routing = torch.ones(3, 16).bfloat16(), Routing(torch.tensor([[0, 2]]).repeat(3, 1), torch.ones(3, 2))
    d = backend.prepare(x, routing, num_experts=4, expert_map=None, payload=MODEL_DTYPE_PAYLOAD)
    backend.finalize(d.x, d.handle, routing, torch.empty_like(x))


@pytest.mark.parametrize(("collective", "stage"), [(6, "prepare"), (8, "finalize")])
def test_on_virtual_ranks_a_rank_that_is_gone_is_named_with_the_stage(collective, stage):
    """Collectives 0 to 5 are the building of the operator and the step that warms it up."""
    began = time.monotonic()
    survivor, gone = run_on_ranks(2, step, faults=Faults(drop={1: collective}), timeout_s=0.5, return_errors=True)
    assert isinstance(gone, RankDropped)
    assert isinstance(survivor, RankFault)
    assert str(survivor).startswith(f"rank 0 waits in {stage}: rank 1 did not come")
    assert time.monotonic() - began < 10


def test_a_rank_that_never_builds_the_layer_is_named():
    error, _ = run_on_ranks(2, lambda group: group.rank or step(group), timeout_s=0.3, return_errors=True)
    assert isinstance(error, MoEError)
    assert "rank 0, building layer number 1 of this group: rank 1 has not built it within 0.3 s" in str(error)


HANGS = """
import attrs, sys, threading, torch
from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.quant import UNQUANTIZED
from moe_core.testing import run_on_ranks
from moe_core.types import MODEL_DTYPE_PAYLOAD, ExpertPlacement, Routing
from moe_mori.emulation import emulated_library
from moe_mori.prepare_finalize import make

missing = sys.argv[1]
config = MoEConfig(
    num_experts=4, top_k=2, hidden_size=16, intermediate_size=8, max_tokens_per_rank=4, dtype=torch.bfloat16
)

def work(group):
    group.timeout_s = 1.5  # the watchdog's; collectives wait for a minute, as kernels that spin would
    parallel = MoEParallelConfig.fold(dp_size=2, dp_rank=group.rank, expert_parallel=True)
    library = attrs.evolve(emulated_library(group), unbounded=True)
    if missing == "building" and group.rank == 1:
        library.ops.EpDispatchCombineOp = lambda config: threading.Event().wait(60)
    backend = make(config, parallel, UNQUANTIZED, group, ExpertPlacement.LINEAR, library=library)
    x, routing = torch.ones(3, 16).bfloat16(), Routing(torch.tensor([[0, 2]]).repeat(3, 1), torch.ones(3, 2))
    for stage in ("nothing", missing):
        if stage == "dispatch" and group.rank == 1:
            threading.Event().wait(60)
        d = backend.prepare(x, routing, num_experts=4, expert_map=None, payload=MODEL_DTYPE_PAYLOAD)
        if stage == "combine" and group.rank == 1:
            threading.Event().wait(60)
        backend.finalize(d.x, d.handle, routing, torch.empty_like(x))

run_on_ranks(2, work, timeout_s=60)
"""


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("building", "making an operator of emulation of mori 1.2.2: not done within 1.5 s"),
        ("dispatch", "moe-mori, rank 0 of 2: dispatch not done within 1.5 s"),
        ("combine", "moe-mori, rank 0 of 2: combine not done within 1.5 s"),
    ],
)
def test_a_wait_without_a_timeout_ends_the_process(missing, said):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", HANGS, missing]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, env=environment)
    assert done.returncode == EXIT_CODE, done.stderr
    assert said in done.stderr.splitlines()[0]
    assert "another rank died or never came" in done.stderr.splitlines()[0]
    assert time.monotonic() - began < 40
