"""What goes wrong between two GPUs ends in an error that names rank and stage, in the configured time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_faults import TIMEOUT_S

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.full,  # most of its time it waits for timeouts
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SLACK_S = 4.0
"""For polling, and for the other ranks' reports."""


def run(tmp_path: Path, *faults: str, limit_s: float = 100) -> tuple[int, str, str, int | None]:
    """Exit status, output and errors of rank 0, which is killed after `limit_s`; and rank 1's exit status, or None."""
    worker = Path(__file__).with_name("rank_faults.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(tmp_path / "store"), *faults],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        out, err = ranks[0].communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        ranks[0].kill()
        out, err = ranks[0].communicate()
    other = ranks[1].poll()
    ranks[1].kill()
    ranks[1].communicate()
    return ranks[0].returncode, out, err, other


def test_another_config_a_late_rank_and_a_dead_one(tmp_path: Path) -> None:
    status, out, err, other = run(tmp_path, "config", "late", "dead")
    assert (status, other) == (0, 3), out[-3000:] + err[-3000:]
    found = {}
    for line in out.splitlines():
        dispatch, fault, seconds, text = line.split(" ", 3)
        found[dispatch, fault] = (float(seconds), text)
    assert {("all_gather", "config"), ("all_gather", "late"), ("batched", "late"), ("batched", "dead")} <= set(found)
    for (dispatch, fault), (seconds, text) in found.items():
        if fault == "config":
            assert seconds < 10
            assert "top_k" in text
        else:
            assert TIMEOUT_S - 1 < seconds < TIMEOUT_S + SLACK_S, (dispatch, fault, seconds)
            assert dispatch in text
            assert "rank 1" in text


def test_torchs_own_watchdog_tells_of_a_late_rank_in_eager_mode(tmp_path: Path) -> None:
    """In the process group's time, with this rank and the collective. When it ends the process is its own affair."""
    _, _, err, _ = run(tmp_path, "eager", limit_s=40)
    found = re.search(r"Rank 0\].*caught collective operation timeout.*OpType=\w*ALLGATHER.* ran for (\d+) milli", err)
    assert found, err[-3000:]
    assert int(found[1]) < 1000 * (TIMEOUT_S + SLACK_S)
