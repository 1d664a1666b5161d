"""What goes wrong between two GPUs ends in an error that names rank and stage, in the configured time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch
from rank_faults import PACKAGES, TIMEOUT_S, register

from moe_core.plugins import registry
from moe_core.watchdog import EXIT_CODE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.full,  # most of its time it waits for timeouts
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SLACK_S = 4.0
"""For polling, and for the other ranks' reports."""
DISPATCHES = ("all_gather", "batched", "nixl_ep")


@attrs.frozen
class Ended:
    """What came of two ranks.

    Attributes:
        status: rank 0's exit status.
        told: its lines: seconds and error.
        err: its stderr.
        other: rank 1's exit status, or None: it had to be killed.
    """

    status: int
    told: list[tuple[float, str]]
    err: str
    other: int | None


def run(tmp_path: Path, fault: str, dispatch: str, *, limit_s: float = 45) -> Ended:
    """Rank 0 is killed after `limit_s`."""
    if dispatch in PACKAGES:
        register(dispatch, PACKAGES[dispatch])
    if not (there := registry().dispatch[dispatch].probe()).ok:
        pytest.skip(there.reason)
    worker = Path(__file__).with_name("rank_faults.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(tmp_path / "store"), fault, dispatch],
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
    lines = [line.split(" ", 3) for line in out.splitlines() if line.startswith(f"{dispatch} {fault} ")]
    print(out[-3000:], err[-3000:])  # pytest shows it where a test fails
    return Ended(ranks[0].returncode, [(float(seconds), text) for _, _, seconds, text in lines], err, other)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_another_config_is_named_by_its_field(tmp_path: Path, dispatch: str) -> None:
    ended = run(tmp_path, "config", dispatch)
    ((seconds, text),) = ended.told
    assert seconds < 10
    assert "top_k: rank 0 has 2, rank 1 has 3" in text
    assert ended.status == 0


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_rank_that_never_builds_the_layer_is_named(tmp_path: Path, dispatch: str) -> None:
    ended = run(tmp_path, "absent", dispatch)
    ((seconds, text),) = ended.told
    assert TIMEOUT_S - 1 < seconds < TIMEOUT_S + SLACK_S
    assert "rank 0, building layer number 1 of this group: rank 1 has not built it" in text
    assert ended.status == 0


@pytest.mark.parametrize("how", ["late", "dead"])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_rank_that_is_missing_from_a_step_in_a_graph_is_named(tmp_path: Path, dispatch: str, how: str) -> None:
    ended = run(tmp_path, how, dispatch)
    ((seconds, text),) = ended.told
    assert TIMEOUT_S - 1 < seconds < TIMEOUT_S + SLACK_S
    assert dispatch in text
    assert "rank 1" in text
    assert ended.status == 0
    assert ended.other == 3 or how == "late"


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_connection_that_never_comes(tmp_path: Path, dispatch: str) -> None:
    ended = run(tmp_path, "unconnected", dispatch)
    assert ended.status == EXIT_CODE
    assert re.search(rf"rank 0 of 2.*connect.* not done within {TIMEOUT_S} s", ended.err)


def test_torchs_own_watchdog_tells_of_a_missing_rank_in_eager_mode(tmp_path: Path) -> None:
    """In the process group's time, with this rank and the collective. When it ends the process is its own affair."""
    err = run(tmp_path, "unanswered", "all_gather", limit_s=40).err
    found = re.search(r"Rank 0\].*caught collective operation timeout.*OpType=\w*ALLGATHER.* ran for (\d+) milli", err)
    assert found, err[-3000:]
    assert int(found[1]) < 1000 * (TIMEOUT_S + SLACK_S)
