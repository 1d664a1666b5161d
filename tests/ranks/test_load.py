"""Expert load: each rank's choices counted, padded tokens and -1 not, read on demand."""

from __future__ import annotations

import torch
from rank_cases import Case, E, build, choose, inputs

from moe_core.expert_load import imbalance
from moe_core.testing import run_on_ranks


def count(ids: torch.Tensor) -> list[int]:
    return [int((ids == expert).sum()) for expert in range(E)]


def test_the_sum_over_ranks_is_the_layers_load_whatever_dispatches():
    _, logits = inputs(Case("batched", 4))
    wanted = torch.tensor(count(choose(torch.cat(logits), 3)[0]))

    def work(group, case):
        runner = build(case, group)
        x, mine = (parts[group.rank] for parts in inputs(case))
        assert runner.load is None
        before = runner(x, mine)
        load = runner.count_load()
        assert torch.equal(runner(x, mine), before), "counting changes no result"
        runner(x, mine)
        assert runner.count_load() is load is runner.load
        return group.all_reduce(load.read())

    for case in (Case("all_gather", 4), Case("batched", 4), Case("batched", 4, fixed=True)):
        for total in run_on_ranks(4, work, case):
            assert torch.equal(total, 2 * wanted)


def test_padding_is_not_counted_and_reading_resets_where_asked():
    def work(group):
        runner = build(Case("local", 1), group)
        load = runner.count_load()
        x, logits = torch.randn(6, 24), torch.randn(6, E)
        runner(x, logits, num_valid_tokens=torch.tensor([4]))
        assert load.read().tolist() == count(choose(logits[:4], 3)[0])
        assert load.read(reset=True).sum() == load.read().sum() + (choose(logits[:4], 3)[0] >= 0).sum()
        runner(x[:0], logits[:0])
        assert load.read().sum() == 0

    run_on_ranks(1, work)


def test_imbalance_is_the_busiest_over_the_mean():
    assert imbalance(torch.tensor([2, 2, 2])) == 1.0
    assert imbalance(torch.tensor([6, 0, 0])) == 3.0
    assert imbalance(torch.zeros(3, dtype=torch.int64)) == 1.0
