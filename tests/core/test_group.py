"""`TorchGroup` on two gloo ranks, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_core.watchdog import EXIT_CODE

PROGRAM = """
import os, sys, torch, torch.distributed as dist
from moe_core.errors import CollectiveError
from moe_core.group import TorchGroup
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
group = TorchGroup()
assert (group.rank, group.size) == (rank, 2)
mine = torch.full((3, 2), float(rank + 1))
total = group.all_reduce(mine)
assert total.eq(3).all() and mine.eq(rank + 1).all(), "out of place"
parts = group.all_gather(torch.full((rank + 1, 2), float(rank)), sizes=[1, 2])
assert parts[:, 0].tolist() == [0, 1, 1]
own = group.reduce_scatter(torch.arange(6.0).view(3, 2), sizes=[1, 2])
assert own.tolist() == ([[0, 2]] if rank == 0 else [[4, 6], [8, 10]])
send, receive = ([1, 2], [1, 3]) if rank == 0 else ([3, 0], [2, 0])
rows = torch.arange(float(sum(send))).view(-1, 1) + 10 * rank
got = group.all_to_all(rows, send, receive)
assert got.flatten().tolist() == ([0, 10, 11, 12] if rank == 0 else [1, 2])
ends = (
    group.all_gather_start(torch.full((rank + 1, 2), float(rank)), sizes=[1, 2]),
    group.reduce_scatter_start(torch.arange(6.0).view(3, 2), sizes=[1, 2]),
    group.all_to_all_start(rows, send, receive),
    group.all_gather_start(rows[:1]),
)
first, second, third, fourth = [end() for end in reversed(ends)][::-1]
assert first.equal(parts) and second.equal(own) and third.equal(got) and fourth.flatten().tolist() == [0, 10]
group.store.set(f"said by {rank}", b"x")
assert group.store.get(f"said by {1 - rank}") == b"x"
group.await_device("nothing was given to one")
group.barrier()


class NeverDone:
    def record(self): ...
    def query(self): return False


torch.cuda.is_initialized, torch.cuda.Event, group.timeout_s = lambda: True, NeverDone, 0.05
try:
    group.await_device("a step of acme")
except CollectiveError as error:
    assert str(error).startswith(f"a step of acme: rank {rank} of 2: the device is not done within 0.05 s; "), error
    assert "every rank reports a failure" in str(error), error
    print("told", end=" ")
group.barrier()
print("rank done", flush=True)
os._exit(0)  # gloo's threads and the interpreter's exit race now and then, and that is not what is tested
"""


def test_every_collective_gives_what_the_protocol_says(tmp_path: Path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        assert "told rank done" in out


DEAD = """
import os, sys, torch, torch.distributed as dist
from datetime import timedelta
from moe_core import MoEError
from moe_core.group import TorchGroup
rank, store = int(sys.argv[1]), sys.argv[2]
options = {"rank": rank, "world_size": 2, "timeout": timedelta(seconds=5)}
dist.init_process_group("gloo", init_method=f"file://{store}", **options)
group = TorchGroup()
group.barrier()
if rank == 0:
    try:
        group.all_to_all(torch.ones(2, 3), [1, 1], [1, 1])
    except MoEError as error:
        print(error, flush=True)
    try:
        group.all_gather_start(torch.ones(2, 3))()
    except MoEError as error:
        print(error, flush=True)
os._exit(0)
"""


def test_a_rank_whose_peer_died_says_who_it_is_and_what_it_was_in(tmp_path: Path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DEAD, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    survivor, _ = (process.communicate(timeout=60)[0] for process in started)
    whole, halves, _ = survivor.split("\n")
    assert whole.startswith("rank 0 of 2 in all_to_all: ")
    assert halves.startswith("rank 0 of 2 in all_gather: ")
    assert "another rank died, or did not come" in survivor


LATE = """
import sys, time, torch, torch.distributed as dist
import moe_core.group
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
group = moe_core.group.TorchGroup(timeout_s=0.5)
group._connects_late = {"cpu", "meta"}  # as NCCL does
group.all_gather(torch.ones(1))
time.sleep(0.7)
group.all_gather(torch.ones(1))
never = lambda *arguments, **options: time.sleep(60)
dist.all_reduce = dist.barrier = moe_core.group._all_gather = never
print("connected", flush=True)
{
    "all_reduce": lambda: group.all_reduce(torch.ones(1)),
    "all_gather": lambda: group.all_gather(torch.ones(1, device="meta")),
    "barrier": group.barrier,
}[sys.argv[2]]()
"""


@pytest.mark.parametrize("name", ["all_reduce", "all_gather", "barrier"])
def test_a_connection_that_never_comes_ends_the_process(tmp_path: Path, name: str):
    """In the first call of a collective on a type of device, and only while it lasts."""
    command = [sys.executable, "-c", LATE, str(tmp_path / "store"), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (EXIT_CODE, "connected\n"), done.stderr
    assert f"rank 0 of 1, connecting for its first {name}: not done within 0.5 s; another rank died" in done.stderr


ENDED = """
import importlib, weakref, torch.distributed as dist
from moe_core.cli.ranks import _connect
from moe_core.group import TorchGroup
from moe_core.testing.launched import _leave, join
{connect}
group = TorchGroup()
group.barrier()
importlib.import_module("torch.distributed.nn.functional")  # as transformers does
seen = weakref.ref(dist.group.WORLD)
{leave}
print(seen(), flush=True)
"""


@pytest.mark.parametrize(
    ("connect", "leave"), [("_connect('gloo')", "dist.destroy_process_group()"), ("join(5.0)", "_leave(); _leave()")]
)
def test_the_default_groups_threads_end_with_it(connect, leave):
    """Threads that are left abort the process now and then, while Python exits."""
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    environment |= {"MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""}
    code = ENDED.format(connect=connect, leave=leave)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr


def test_a_group_without_a_process_group_says_what_to_do():
    from moe_core.group import TorchGroup

    with pytest.raises(RuntimeError, match=r"init_process_group.*torchrun"):
        TorchGroup()
