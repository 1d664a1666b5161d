"""Virtual ranks: what the collectives give, and what becomes of faults."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch

from moe_core import MoEError
from moe_core.testing import Faults, RankDropped, RankFault, run_on_ranks


def everything(group):
    """Every collective once; the results as lists."""
    rank, size = group.rank, group.size
    total = group.all_reduce(torch.full((2,), float(rank + 1)))
    gathered = group.all_gather(torch.full((rank, 2), float(rank)), sizes=list(range(size)))
    mine = group.reduce_scatter(torch.arange(float(sum(range(size)))) + rank, sizes=list(range(size)))
    sent = [(rank + to) % 3 for to in range(size)]
    received = [(rank + source) % 3 for source in range(size)]
    rows = torch.cat([torch.full((n, 1), float(10 * rank + to)) for to, n in enumerate(sent)])
    exchanged = group.all_to_all(rows, sent, received)
    group.barrier()
    return total.tolist(), gathered[:, 0].tolist(), mine.tolist(), exchanged.flatten().tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("faults", [Faults(), Faults(jitter=0.003, seed=7), Faults(delay={0: 0.01})], ids=str)
def test_every_collective_gives_what_the_protocol_says(size, faults):
    first = 0
    for rank, (total, gathered, mine, exchanged) in enumerate(run_on_ranks(size, everything, faults=faults)):
        assert total == [size * (size + 1) / 2] * 2
        assert gathered == [float(r) for r in range(size) for _ in range(r)]
        assert mine == [size * (first + i) + sum(range(size)) for i in range(rank)]
        assert exchanged == [float(10 * source + rank) for source in range(size) for _ in range((rank + source) % 3)]
        first += rank


def test_sums_are_taken_in_rank_order_whoever_comes_first():
    values = torch.tensor([1e8, 1.0, -1e8, 1.0])  # another order gives another float32

    def work(group):
        return group.all_reduce(values[group.rank].clone().view(1)).item()

    expected = (values[0] + values[1] + values[2] + values[3]).item()
    for seed in range(3):
        assert run_on_ranks(4, work, faults=Faults(jitter=0.005, seed=seed)) == [expected] * 4


def test_inputs_are_not_written_and_results_are_each_ranks_own():
    def work(group):
        mine = torch.ones(3)
        total = group.all_reduce(mine)
        total += 1
        group.barrier()
        return mine.tolist(), total.tolist()

    assert run_on_ranks(2, work) == [([1.0] * 3, [3.0] * 3)] * 2


def test_a_dropped_rank_is_named_with_the_stage_within_the_timeout():
    def finalize(group):
        return group.all_reduce(torch.ones(1))

    def work(group):
        group.barrier()
        return finalize(group)

    started = time.monotonic()
    first, dropped, third = run_on_ranks(3, work, faults=Faults(drop={1: 1}), timeout_s=0.3, return_errors=True)
    assert time.monotonic() - started < 5
    assert isinstance(dropped, RankDropped)
    for rank, error in ((0, first), (2, third)):
        assert isinstance(error, RankFault)
        text = str(error)
        assert text.startswith(f"rank {rank} waits in finalize: rank 1 did not come to all_reduce"), text
        assert "(collective 1) within 0.3 s" in text


def test_an_error_of_one_rank_ends_the_others_at_once_and_is_what_is_raised():
    def work(group):
        if group.rank == 1:
            raise KeyError("mine")
        group.barrier()

    started = time.monotonic()
    with pytest.raises(KeyError, match="mine"):
        run_on_ranks(3, work)
    first, *_ = run_on_ranks(3, work, return_errors=True)
    assert str(first).startswith("rank 0 waits in work: rank")
    assert str(first).endswith("did not come to barrier (collective 0): rank 1 ended with KeyError: 'mine'")
    assert time.monotonic() - started < 5


def test_collectives_out_of_order_are_named():
    def work(group):
        if group.rank == 0:
            return group.all_reduce(torch.ones(2))
        return group.barrier()

    errors = run_on_ranks(2, work, return_errors=True)
    assert any("out of order: as collective 0" in str(error) for error in errors)
    assert all(isinstance(error, RankFault) for error in errors)


def test_halves_give_what_the_whole_gives_also_crossed():
    def work(group):
        rows, sizes = torch.arange(4.0).view(4, 1) + 10 * group.rank, [1, 3]
        mine = rows[: sizes[group.rank]]
        whole = (
            group.all_gather(mine, sizes),
            group.reduce_scatter(rows, sizes),
            group.all_to_all(rows, [2, 2], [2, 2]),
        )
        ends = (
            group.all_gather_start(mine, sizes),
            group.reduce_scatter_start(rows, sizes),
            group.all_to_all_start(rows, [2, 2], [2, 2]),
        )
        halves = [end() for end in reversed(ends)][::-1]
        assert all(map(torch.equal, whole, halves))
        return whole[0].flatten().tolist(), whole[1].flatten().tolist(), whole[2].flatten().tolist()

    first, second = run_on_ranks(2, work, faults=Faults(jitter=0.002))
    assert first == ([0, 10, 11, 12], [10], [0, 1, 10, 11])
    assert second == ([0, 10, 11, 12], [12, 14, 16], [2, 3, 12, 13])


def test_what_is_sent_may_not_be_written_before_it_has_arrived():
    def work(group):
        rows = torch.full((2, 1), float("nan"))
        rows.add_(0)
        group.all_to_all_start(rows, [1, 1], [1, 1])()
        end = group.all_to_all_start(rows, [1, 1], [1, 1])
        rows.fill_(group.rank)
        end()

    with pytest.raises(MoEError, match=r"the tensor of all_to_all .* was written before the collective had ended"):
        run_on_ranks(2, work)


def test_rows_that_do_not_add_up_are_refused():
    def work(group):
        return group.all_to_all(torch.ones(3, 1), [1, 1], [1, 1])

    with pytest.raises(ValueError, match=r"all_to_all on rank 0: 3 rows, but send = \[1, 1\] says 2"):
        run_on_ranks(2, work)


def test_a_subgroup_is_a_group_of_its_own():
    def work(group):
        pair = group.subgroup([0, 1] if group.rank < 2 else [2, 3])
        return pair.rank, pair.size, pair.all_reduce(torch.tensor([float(group.rank)])).item()

    assert run_on_ranks(4, work) == [(0, 2, 1.0), (1, 2, 1.0), (0, 2, 5.0), (1, 2, 5.0)]


def test_the_store_is_shared_counts_and_waits():
    def work(group):
        number = group.store.add("arrivals", 1)
        if group.rank == 0:
            time.sleep(0.02)
            group.store.set("word", b"x")
        return number, group.store.get("word")

    results = run_on_ranks(3, work)
    assert sorted(number for number, _ in results) == [1, 2, 3]
    assert {word for _, word in results} == {b"x"}
    with pytest.raises(TimeoutError, match=r"\['never'\] were not set within 0.05 s"):
        run_on_ranks(1, lambda group: group.store.get("never"), timeout_s=0.05)


def test_no_thread_is_left():
    before = threading.active_count()
    run_on_ranks(4, everything)
    assert threading.active_count() == before


def test_bytes_from_other_ranks_are_counted():
    """Of float32 rows of 4: what came from the others, in subgroups too, and nothing that an emulation moves."""

    def work(group):
        rows = torch.ones(4, 4)
        counts = [group.received_bytes]
        for collective in (
            lambda: group.all_gather(rows),
            lambda: group.reduce_scatter(rows),
            lambda: group.all_to_all(rows, [1] * 4, [1] * 4),
            lambda: group.all_reduce(rows),
            lambda: group.subgroup([0, 1] if group.rank < 2 else [2, 3]).all_gather(rows),
        ):
            collective()
            counts.append(group.received_bytes)
        with group.emulating():
            group.all_gather(rows)
        assert group.received_bytes == counts[-1]
        return [after - before for before, after in itertools.pairwise(counts)]

    whole = 4 * 4 * 4
    assert run_on_ranks(4, work) == [[3 * whole, 3 * whole // 4, 3 * whole // 4, 2 * whole * 3 // 4, whole]] * 4
