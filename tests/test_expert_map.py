"""Placements and id tables: every expert stands on exactly one rank, and the numberings translate back and forth.

Shape letters: T tokens · E experts · E_l local experts · K top-k · W ranks.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moe_core.config import MoEConfig, MoEParallelConfig, Problem
from moe_core.expert_map import ExpertMapManager
from moe_core.types import ExpertPlacement

LINEAR, ROUND_ROBIN = ExpertPlacement.LINEAR, ExpertPlacement.ROUND_ROBIN
both_placements = pytest.mark.parametrize("placement", [LINEAR, ROUND_ROBIN])

placements = st.sampled_from(list(ExpertPlacement))
ranks = st.integers(1, 20)
shares = st.integers(1, 9)
experts_and_ranks = ranks.flatmap(lambda ep_size: st.tuples(st.integers(ep_size, 70), st.just(ep_size)))


def all_ranks(num_experts: int, ep_size: int, placement: ExpertPlacement) -> list[ExpertMapManager]:
    return [ExpertMapManager(num_experts, ep_size, rank, placement) for rank in range(ep_size)]


class IndicesAreNotNegative(TorchDispatchMode):
    """Python's -1 is the last element, so a gather by it goes wrong in silence: this makes it loud."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.gather, torch.ops.aten.index_select):
            indices = args[1] if func.overloadpacket is torch.ops.aten.index else args[2:3]
            assert all(int(index.min()) >= 0 for index in indices), f"{func} was given a negative index"
            self.seen += 1
        return func(*args, **(kwargs or {}))


class TestPlacement:
    @pytest.mark.parametrize(
        ("placement", "expected"),
        [(LINEAR, [[0, 1, 2], [3, 4, 5], [6, 7]]), (ROUND_ROBIN, [[0, 3, 6], [1, 4, 7], [2, 5]])],
    )
    def test_example(self, placement: ExpertPlacement, expected: list[list[int]]) -> None:
        assert [list(m.local_experts) for m in all_ranks(8, 3, placement)] == expected

    @given(experts_and_ranks, placements)
    def test_every_expert_on_exactly_one_rank(self, sizes: tuple[int, int], placement: ExpertPlacement) -> None:
        num_experts, ep_size = sizes
        managers = all_ranks(num_experts, ep_size, placement)
        held = sorted(expert for manager in managers for expert in manager.local_experts)
        assert held == list(range(num_experts))

    @given(experts_and_ranks, placements)
    def test_the_first_ranks_hold_one_more(self, sizes: tuple[int, int], placement: ExpertPlacement) -> None:
        num_experts, ep_size = sizes
        counts = [manager.num_local_experts for manager in all_ranks(num_experts, ep_size, placement)]
        share, remainder = divmod(num_experts, ep_size)
        assert counts == [share + 1] * remainder + [share] * (ep_size - remainder)

    @given(experts_and_ranks, placements)
    def test_agrees_with_the_problem(self, sizes: tuple[int, int], placement: ExpertPlacement) -> None:
        num_experts, ep_size = sizes
        config = MoEConfig(num_experts=num_experts, top_k=1, hidden_size=1, intermediate_size=1, placement=placement)
        for manager in all_ranks(num_experts, ep_size, placement):
            parallel = MoEParallelConfig(ep_size=ep_size, ep_rank=manager.ep_rank)
            assert manager.num_local_experts == Problem(config=config, parallel=parallel).num_local_experts


class TestExpertMap:
    @given(experts_and_ranks.filter(lambda sizes: sizes[1] > 1), placements)
    def test_inverts_local_experts(self, sizes: tuple[int, int], placement: ExpertPlacement) -> None:
        num_experts, ep_size = sizes
        for manager in all_ranks(num_experts, ep_size, placement):
            table = manager.expert_map("cpu")
            assert table is not None
            assert table.dtype == torch.int32
            expected = {expert: local for local, expert in enumerate(manager.local_experts)}
            assert table.tolist() == [expected.get(expert, -1) for expert in range(num_experts)]

    @both_placements
    def test_one_rank_needs_none(self, placement: ExpertPlacement) -> None:
        manager = ExpertMapManager(8, 1, 0, placement)
        assert manager.expert_map("cpu") is None
        assert list(manager.local_experts) == list(range(8))


class TestRoutingTables:
    @given(shares, ranks, placements)
    def test_rank_and_local_index_can_be_read_off(self, share: int, ep_size: int, placement: ExpertPlacement) -> None:
        managers = all_ranks(share * ep_size, ep_size, placement)
        physical = managers[0].global_to_physical("cpu").tolist()
        for manager in managers:
            for local, expert in enumerate(manager.local_experts):
                assert divmod(physical[expert], share) == (manager.ep_rank, local)

    @given(shares, ranks, placements)
    def test_tables_invert_each_other(self, share: int, ep_size: int, placement: ExpertPlacement) -> None:
        manager = ExpertMapManager(share * ep_size, ep_size, 0, placement)
        there, back = manager.global_to_physical("cpu"), manager.physical_to_global("cpu")
        assert there.dtype == back.dtype == torch.int64
        assert there[back].tolist() == back[there].tolist() == list(range(share * ep_size))

    def test_example(self) -> None:
        manager = ExpertMapManager(6, 3, 0, ROUND_ROBIN)
        assert manager.global_to_physical("cpu").tolist() == [0, 2, 4, 1, 3, 5]
        assert manager.physical_to_global("cpu").tolist() == [0, 3, 1, 4, 2, 5]

    @both_placements
    def test_unequal_shares_are_refused(self, placement: ExpertPlacement) -> None:
        manager = ExpertMapManager(7, 2, 0, placement)
        assert not manager.has_equal_shares
        for ask in (
            lambda: manager.global_to_physical("cpu"),
            lambda: manager.physical_to_global("cpu"),
            lambda: manager.remap_to_physical(torch.zeros(1, 1, dtype=torch.int64)),
        ):
            with pytest.raises(ValueError, match=r"7 experts on 2 ranks make unequal shares \(3 or one more\)"):
                ask()


class TestRemap:
    @given(shares, ranks, placements, st.data())
    def test_translates_ids_and_keeps_minus_one(
        self, share: int, ep_size: int, placement: ExpertPlacement, data: st.DataObject
    ) -> None:
        num_experts = share * ep_size
        manager = ExpertMapManager(num_experts, ep_size, 0, placement)
        row = data.draw(st.lists(st.integers(-1, num_experts - 1), min_size=3, max_size=3))
        table = manager.global_to_physical("cpu").tolist()
        got = manager.remap_to_physical(torch.tensor([row]))
        assert got.tolist() == [[-1 if expert == -1 else table[expert] for expert in row]]

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    @pytest.mark.parametrize("shape", [(0, 2), (1, 2), (5, 3)])
    def test_dtype_shape_and_input_are_kept(self, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        manager = ExpertMapManager(8, 4, 1, ROUND_ROBIN)
        ids = torch.randint(-1, 8, shape).to(dtype)
        before = ids.clone()
        got = manager.remap_to_physical(ids)
        assert (got.dtype, got.shape) == (dtype, ids.shape)
        assert torch.equal(ids, before)
        assert not shape[0] or got.data_ptr() != ids.data_ptr()

    @both_placements
    def test_minus_one_is_not_read_as_the_last_expert(self, placement: ExpertPlacement) -> None:
        manager = ExpertMapManager(8, 4, 0, placement)
        # A gather with -1 gives the physical id of expert 7, which is on the last rank: a real, wrong destination.
        assert manager.global_to_physical("cpu")[-1] == 7
        assert manager.remap_to_physical(torch.tensor([[-1, 7], [-1, -1]])).tolist() == [[-1, 7], [-1, -1]]

    def test_minus_one_is_masked_before_a_table_is_indexed(self) -> None:
        manager = ExpertMapManager(8, 4, 0, ROUND_ROBIN)
        with IndicesAreNotNegative() as watch:
            manager.remap_to_physical(torch.tensor([[-1, 7], [-1, -1]]))
        assert watch.seen == 1

    def test_traces_as_one_graph_so_nothing_is_read_on_the_host(self) -> None:
        manager = ExpertMapManager(8, 4, 0, ROUND_ROBIN)
        ids = torch.randint(-1, 8, (6, 2))
        expected = manager.remap_to_physical(ids)
        compiled = torch.compile(manager.remap_to_physical, fullgraph=True, backend="eager")
        assert torch.equal(compiled(ids), expected)


class TestTables:
    def test_construction_makes_no_tensor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("full", "arange", "tensor", "empty", "zeros"):
            monkeypatch.setattr(torch, name, lambda *args, **kwargs: pytest.fail("a tensor was made"))
        manager = ExpertMapManager(8, 4, 0, ROUND_ROBIN)
        assert manager.num_local_experts == 2

    def test_tables_are_made_once_per_device(self) -> None:
        manager = ExpertMapManager(8, 4, 0, ROUND_ROBIN)
        assert manager.expert_map("cpu") is manager.expert_map(torch.device("cpu"))
        assert manager.global_to_physical("cpu") is manager.global_to_physical("cpu")
        elsewhere = manager.expert_map("meta")
        assert elsewhere is not None
        assert elsewhere.device.type == "meta"

    def test_a_first_use_in_inference_mode_leaves_no_inference_tensor(self) -> None:
        manager = ExpertMapManager(8, 4, 0, ROUND_ROBIN)
        with torch.inference_mode():
            manager.remap_to_physical(torch.tensor([[3, -1]]))
        assert not manager.global_to_physical("cpu").is_inference()

    def test_copies_and_pickles(self) -> None:
        manager = ExpertMapManager(8, 4, 2, ROUND_ROBIN)
        expected = manager.remap_to_physical(torch.arange(8)).tolist()
        for copied in (copy.deepcopy(manager), pickle.loads(pickle.dumps(manager))):
            assert copied == manager
            assert copied.remap_to_physical(torch.arange(8)).tolist() == expected

    def test_equal_placements_are_equal_whatever_was_asked(self) -> None:
        one, other = ExpertMapManager(8, 4, 0), ExpertMapManager(8, 4, 0)
        one.expert_map("cpu")
        assert one == other
        assert hash(one) == hash(other)
        assert repr(one) == repr(other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "ExpertMapManager.num_experts = 0; legal values: int >= 1"),
        ({"num_experts": 8.0}, "ExpertMapManager.num_experts = 8.0"),
        ({"num_experts": 8, "ep_size": 0}, "ExpertMapManager.ep_size = 0; legal values: int >= 1"),
        ({"num_experts": 8, "ep_size": True}, "ExpertMapManager.ep_size = True"),
        ({"num_experts": 3, "ep_size": 4}, "ExpertMapManager.ep_size = 4; legal values: 1 to num_experts = 3"),
        ({"num_experts": 8, "ep_rank": -1}, "ExpertMapManager.ep_rank = -1; legal values: int >= 0"),
        ({"num_experts": 8, "ep_size": 2, "ep_rank": 2}, "ep_rank = 2; legal values: 0 to ep_size - 1 = 1"),
        ({"num_experts": 8, "placement": "linear"}, "placement = 'linear'; legal values: ExpertPlacement.LINEAR"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as e:
        ExpertMapManager(**arguments)
    assert message in str(e.value)
