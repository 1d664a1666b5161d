"""Watchdogs bark in time, say who and where, and are silent else."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

from moe_core.watchdog import EXIT_CODE, StepWatch, limited

CPU = torch.device("cpu")


def wait_for(said, seconds=5.0):
    end = time.monotonic() + seconds
    while not said and time.monotonic() < end:
        time.sleep(0.01)
    return list(said)


def test_a_call_that_ends_in_time_is_left_alone():
    said = []
    with limited("rank 1 of 4 in connect", 0.2, said.append):
        pass
    with pytest.raises(OSError, match="its own"), limited("rank 1 of 4 in connect", 0.2, said.append):
        raise OSError("its own")
    time.sleep(0.4)
    assert not said


def test_a_call_that_does_not_end_is_named():
    said = []
    with limited("rank 1 of 4 in connect", 0.05, said.append):
        (message,) = wait_for(said)
    assert message.startswith("rank 1 of 4 in connect: not done within 0.05 s; another rank died or never came")


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_does_not_end_is_named(stage):
    said = []
    watch = StepWatch("acme, rank 1 of 4", ("dispatch", "combine"), 0.1, CPU, said.append)
    for index in (0, 1):
        with watch.stage(index):
            pass
    with watch.stage(stage):
        (message,) = wait_for(said)
    assert message.startswith(f"acme, rank 1 of 4: {('dispatch', 'combine')[stage]} not done within 0.1 s; another")


def test_stages_that_end_and_pauses_between_them_are_left_alone():
    said = []
    watch = StepWatch("acme", ("dispatch", "combine"), 0.2, CPU, said.append)
    with pytest.raises(OSError, match="its own"), watch.stage(0):
        raise OSError("its own")
    for _ in range(6):
        with watch.stage(0):
            time.sleep(0.06)
        with watch.stage(1):
            time.sleep(0.06)
    time.sleep(0.5)
    assert not said


def test_a_closed_watch_leaves_no_thread():
    before = threading.active_count()
    watch = StepWatch("acme", ("dispatch",), 10, CPU)
    assert threading.active_count() == before + 1
    watch.close()
    end = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_the_process_ends_with_the_message_and_where_it_stands():
    code = "import time; from moe_core.watchdog import limited\nwith limited('rank 0 in x', 0.1): time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_CODE
    assert done.stderr.startswith("rank 0 in x: not done within 0.1 s;")
    assert "Current thread" in done.stderr or "Thread 0x" in done.stderr
