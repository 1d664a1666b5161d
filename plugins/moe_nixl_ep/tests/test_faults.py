"""Ranks that are late, gone or different: named, with their experts, within the configured time."""

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
from moe_core.testing import run_on_ranks
from moe_core.types import MODEL_DTYPE_PAYLOAD, ExpertPlacement, Routing
from moe_core.watchdog import EXIT_CODE
from moe_nixl_ep.emulation import make_emulated
from moe_nixl_ep.prepare_finalize import NixlEPPrepareAndFinalize, RanksMaskedError

E, H, T = 4, 2048, 3
PLACEMENTS = {
    ExpertPlacement.LINEAR: ((2, 3), "experts 2 to 3."),
    ExpertPlacement.ROUND_ROBIN: ((1, 3), "experts 1 to 3, one in 2."),
}
"""The experts of rank 1 of 2, and how they are named."""


def make(group: Any, placement: ExpertPlacement = ExpertPlacement.LINEAR) -> NixlEPPrepareAndFinalize:
    config = MoEConfig(
        num_experts=E, top_k=2, hidden_size=H, intermediate_size=8, max_tokens_per_rank=4, dtype=torch.bfloat16
    )
    parallel = MoEParallelConfig.fold(dp_size=group.size, dp_rank=group.rank, expert_parallel=True)
    return make_emulated(config, parallel, UNQUANTIZED, group, placement)


def step(backend: NixlEPPrepareAndFinalize) -> torch.Tensor:
    """With experts that do nothing: every token's own expert 0, and expert 2 of physical rank 1."""
    x, routing = torch.ones(T, H).bfloat16(), Routing(torch.tensor([[0, 2]]).repeat(T, 1), torch.ones(T, 2))
    d = backend.prepare(x, routing, num_experts=E, expert_map=None, payload=MODEL_DTYPE_PAYLOAD)
    out = torch.full_like(x, torch.nan)
    backend.finalize(d.x.contiguous(), d.handle, routing, out)
    return out


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_rank_that_does_not_come_is_masked_and_named_with_its_experts(placement):
    def work(group: Any) -> torch.Tensor | None:
        backend = make(group, placement)
        assert bool((step(backend) == 2).all())
        backend.check()
        if group.rank == 1:  # it dies without a word
            return None
        group.timeout_s = 0.3
        out = step(backend)
        with pytest.raises(RanksMaskedError) as caught:
            backend.check()
        experts, named = PLACEMENTS[placement]
        assert (caught.value.ranks, caught.value.experts) == ((1,), experts)
        assert f"rank 0 of 2: masked after a timeout: rank 1 with {named}" in str(caught.value)
        began = time.monotonic()
        assert torch.equal(step(backend), out), "nobody waits for it any longer"
        assert time.monotonic() - began < 0.3
        return out

    began = time.monotonic()
    survivor, _ = run_on_ranks(2, work, timeout_s=0.5)
    assert time.monotonic() - began < 10
    assert survivor is not None
    assert bool((survivor == 1).all()), "the other rank's expert has counted as nothing"


def test_a_rank_that_is_late_learns_that_it_was_masked():
    """It comes back to ranks that send it nothing any more: it masks them, and both sides say so."""

    def work(group: Any) -> tuple[int, ...]:
        backend = make(group)
        step(backend)
        if group.rank == 1:
            time.sleep(1.0)
        step(backend)
        step(backend)
        with pytest.raises(RanksMaskedError) as caught:
            backend.check()
        return caught.value.ranks

    assert run_on_ranks(2, work, timeout_s=0.4) == [(1,), (0,)]


def test_a_rank_that_never_builds_the_layer_is_named():
    def work(group: Any) -> None:
        if group.rank == 0:
            make(group)

    error, _ = run_on_ranks(2, work, timeout_s=0.3, return_errors=True)
    assert isinstance(error, MoEError)
    assert "rank 0, building layer number 1 of this group: rank 1 has not built it within 0.3 s" in str(error)


HANGS = """
import attrs, sys, time
from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.quant import UNQUANTIZED
from moe_core.testing import run_on_ranks
from moe_core.types import ExpertPlacement
from moe_nixl_ep.emulation import emulated_library
from moe_nixl_ep.prepare_finalize import make

library = attrs.evolve(emulated_library(), unbounded=True)
library.module.Buffer.connect_ranks = lambda self, ranks, activate=True: time.sleep(60)
config = MoEConfig(num_experts=4, top_k=2, hidden_size=2048, intermediate_size=8, max_tokens_per_rank=4)

def work(group):
    parallel = MoEParallelConfig.fold(dp_size=2, dp_rank=group.rank, expert_parallel=True)
    make(config, parallel, UNQUANTIZED, group, ExpertPlacement.LINEAR, library=library)

run_on_ranks(2, work, timeout_s=0.5)
"""


def test_a_connection_that_never_comes_ends_the_process():
    """`connect_ranks` has no timeout, and can't be interrupted."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == EXIT_CODE, done.stderr
    said = done.stderr.splitlines()[0]
    assert said.startswith("moe-nixl-ep, rank ")
    assert "of 2, connect_ranks of emulation of nixl_ep_cu13 1.5.1: not done within 0.5 s; another rank died" in said
    assert "start all ranks again" in said
