"""NIXL EP itself, on all GPUs of this host: the benchmark's checks, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_nixl_ep.availability import probe

ROOT = Path(__file__).resolve().parents[3]
RANKS = min(torch.cuda.device_count(), 4)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(RANKS < 2, reason="needs two CUDA devices"),
    pytest.mark.skipif(not probe().ok, reason=probe().reason),
]


def test_every_bit_and_a_late_rank(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["-m", "benchmarks.nixl_ep", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["wrong"], found["late"]) == (0, [RANKS - 1])
    for pair in found["pairs"]:
        assert pair["moe_nixl_ep_us"] < 1.05 * pair["library_us"], pair
