"""Ranks of a launcher that wait for one another in vain: the run ends and says in which case, and who."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import attrs
import pytest
import torch
import torch.distributed as dist

from moe_core.testing.case import Case, OutOfStep, Tier, Violation, run_case
from moe_core.testing.launched import run_as_rank


@attrs.frozen
class Ranks:
    """What `run_as_rank` asks of a `TorchGroup`, without processes."""

    rank: int
    store: dist.Store
    size: int = 2
    timeout_s: float = 0.2


def both(*work):
    """What two ranks say that do `work[rank]`."""
    store, said = dist.HashStore(), [None, None]

    def body(rank: int) -> None:
        try:
            said[rank] = run_as_rank(Ranks(rank, store), work[rank], return_errors=True)
        except OutOfStep as error:
            said[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return said


def fail_late(group):
    time.sleep(1.5 * group.timeout_s)
    raise RuntimeError("nobody sent")


def test_ranks_hear_what_came_of_it_on_the_others():
    first, second = both(lambda group: torch.tensor([group.rank]), lambda group: torch.tensor([group.rank]))
    assert [int(value) for value in first] == [int(value) for value in second] == [0, 1]


def violate(group):
    raise Violation("rows", "one is missing")


def test_a_failure_in_time_is_an_answer():
    for said in both(violate, lambda group: group.rank):
        assert said[0].duty == "rows"
        assert said[1] == 1


@pytest.mark.parametrize("other", [lambda group: None, violate])
def test_a_rank_that_waited_in_vain_ends_the_run_on_all(other):
    for said in both(other, fail_late):
        assert isinstance(said, OutOfStep)
        assert "rank 1 raised RuntimeError after 0.3 s: nobody sent" in str(said)
        assert ("rank 0 raised Violation" in str(said)) is (other is violate)


def test_a_rank_that_does_not_answer_is_named_with_the_case():
    def alone() -> None:
        run_as_rank(Ranks(0, dist.HashStore()), lambda group: None, return_errors=False)

    with pytest.raises(OutOfStep, match=r"in the case 'lost', rank 0 waited 0\.4 s for word from rank 1"):
        run_case(Case("lost", "rows", Tier.REQUIRED, "every backend", alone))


LOST = """
import torch
import torch.distributed as dist
import moe_core
from moe_core.builtin import ALL_GATHER
from moe_core.builtin.all_gather import AllGatherPrepareAndFinalize
from moe_core.cli.app import app


class Lost(AllGatherPrepareAndFinalize):
    def prepare(self, *arguments, **named):
        if self.group.rank == 0:
            dist.recv(torch.empty(1), 1)
        return super().prepare(*arguments, **named)


class plugin:
    moe_core_api = (1, 0)

    @staticmethod
    @moe_core.hookimpl
    def moe_core_register_prepare_finalize(register):
        register("lost", lambda config, parallel, scheme, group, placement: Lost(group), ALL_GATHER)


moe_core.register_plugin(plugin)
app()
"""


@pytest.mark.full
def test_a_send_that_is_never_posted(tmp_path):
    script = tmp_path / "lost.py"
    script.write_text(LOST)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    command = ["conformance", "lost", "--launched", "--timeout", "6"]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "has been running for 5 s" in done.stderr
    assert "2 processes: in the case '" in done.stderr
    assert "rank 0 raised RuntimeError after 6." in done.stderr
