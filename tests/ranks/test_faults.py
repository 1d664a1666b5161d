"""What goes wrong between real processes ends on gloo with an error that names rank and stage, in the configured time.

A rank with another config is in `test_gloo.py`; one that never builds the layer, and all the same on virtual ranks, in
`test_agreement.py`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

TIMEOUT_S = 2

STEPS = f"""
import os, sys, time
sys.path.insert(0, sys.argv[3])
from datetime import timedelta
import torch, torch.distributed as dist
from rank_cases import Case, build, register_batched
from moe_core.errors import CollectiveError
from moe_core.group import TorchGroup

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
limit = timedelta(seconds={TIMEOUT_S})
dist.init_process_group("gloo", init_method=f"file://{{store}}", rank=rank, world_size=2, timeout=limit)
register_batched()

def step(dispatch, before_experts=lambda: None):
    group = TorchGroup(dist.new_group(timeout=limit), timeout_s=20)  # what has failed once is of no use any more
    layer = build(Case(dispatch, 2), group)
    run = layer.kernel.experts[0].apply
    def apply(*arguments):
        before_experts()
        run(*arguments)
    layer.kernel.experts[0].apply = apply
    started = time.monotonic()
    try:
        layer(torch.ones(2, 24), torch.ones(2, 6))
        print("it went through", flush=True)
    except CollectiveError as error:
        slots = layer.kernel._in_flight
        print(f"{{time.monotonic() - started:.2f}} {{slots}} {{error}}", flush=True)

step("all_gather")
if rank == 1:  # late, then dead
    step("all_gather", lambda: time.sleep({TIMEOUT_S} * 3))
    step("batched", lambda: os._exit(3))
step("all_gather")
step("batched")
dist.destroy_process_group()
print("shut down", flush=True)
os._exit(0)  # gloo's threads and the interpreter's exit race now and then, and that is not what is tested
"""


@pytest.mark.full  # most of its time it waits for timeouts
def test_a_late_rank_and_a_dead_one_are_named_with_the_stage(tmp_path: Path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", STEPS, str(rank), str(tmp_path / "store"), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (out, err), (other, _) = (process.communicate(timeout=100) for process in ranks)
    assert [process.returncode for process in ranks] == [0, 3], err
    fine, late, dead, end = out.splitlines()
    assert (fine, end) == ("it went through", "shut down")
    for line, dispatch, collective in ((late, "all_gather", "reduce_scatter"), (dead, "batched", "all_to_all")):
        seconds, slots, text = line.split(" ", 2)
        assert float(seconds) < TIMEOUT_S + 4
        assert slots == "0", "no slot stays taken"
        assert text.startswith(f"finalize of {dispatch}: rank 0 of 2 in {collective}: "), text
        assert "no failure is reported by rank 1" in text
    assert other.splitlines()[0] == "it went through"


ALONE = f"""
from moe_core.cli import ranks
ranks.TIMEOUT_S = {TIMEOUT_S}
from moe_core.errors import MoEError
try:
    with ranks.ranks("cpu"):
        pass
except MoEError as error:
    print(error)
"""


def test_a_rank_that_never_connects_ends_the_others_in_the_configured_time():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", ALONE], env=os.environ | launched, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.startswith("rank 0 of 2, connecting by gloo: "), result.stderr
    assert "are all ranks started" in result.stdout
    assert time.monotonic() - started < 30
