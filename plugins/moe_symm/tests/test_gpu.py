"""The kernels between all GPUs of this host: the benchmark's checks, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_symm.availability import probe

ROOT = Path(__file__).resolve().parents[3]
RANKS = min(torch.cuda.device_count(), 4)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(RANKS < 2, reason="needs two CUDA devices"),
    pytest.mark.skipif(not probe().ok, reason=probe().reason),
]


def test_every_bit_and_a_rank_that_does_not_come(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["-m", "benchmarks.symm", "--routings", "20", "--replays", "20", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"] == 0
    assert [each["stage"] for each in found["late"]] == ["dispatch", "combine"]
    for each in found["late"]:
        assert each["wrong after the reset"] == 0
        for rank in each["ranks"]:
            assert f"waited for rank {RANKS - 1} in {each['stage']} in vain" in rank["said"]
            assert rank["all NaN"]
    assert found["pairs"]
    for cell in found["pairs"]:
        assert not any(cell["wrong"].values()), cell
