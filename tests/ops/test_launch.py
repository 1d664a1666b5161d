"""The launch choice: pure, so tested without a GPU and without Triton."""

import dataclasses
import itertools

import pytest
import torch

import moe_core
from moe_core.builtin.triton_experts import TritonExperts
from moe_core.ops import (
    AlternatingConfig,
    ExpertsProblem,
    GroupedConfig,
    ScanConfig,
    SlotsConfig,
    TileConfig,
    choose_plan,
    config_for,
    default_plan,
)
from moe_core.ops._launch import align_tiles, batched_config, default_config, distinct_experts, grouped_config
from moe_core.ops._tuned import TABLES
from moe_core.ops.experts import experts_workspace
from moe_core.types import ActivationFormat, Device

QWEN3 = ExpertsProblem(128, 8, 2048, 768)
MIXTRAL = ExpertsProblem(8, 2, 4096, 14336)
GPT_OSS = ExpertsProblem(128, 4, 2880, 2880, interleaved=True, w13_unit="n", w2_unit="n")


def paths(problem):
    return [config_for(default_plan(problem), tokens).path for tokens in (1, 4, 16, 32, 256, 4096)]


def test_few_tokens_read_their_experts_without_a_sort_and_many_are_grouped():
    assert paths(QWEN3) == ["slots", "slots", "scan", "scan", "grouped", "grouped"]
    # Two of eight experts: at T = 4 slots would read experts twice.
    assert paths(MIXTRAL)[:2] == ["slots", "scan"]


def test_ranges_rise_and_end_open():
    for problem in (QWEN3, MIXTRAL, GPT_OSS, dataclasses.replace(QWEN3, itemsize=4)):
        ends = [end for end, _ in default_plan(problem)]
        assert ends[-1] is None
        assert ends[:-1] == sorted(ends[:-1])
        configs = [config for _, config in default_plan(problem)]
        assert all(a != b for a, b in itertools.pairwise(configs))


def test_a_plan_that_ends_too_early_says_so():
    plan = ((4, SlotsConfig(2, 512, 4, 4, 256, 4)),)
    with pytest.raises(ValueError, match="ends at T = 4, asked for T = 5"):
        config_for(plan, 5)


def test_tiles_are_as_high_as_the_rows_that_come_not_as_those_that_could():
    """Of 4 ranks' rows a quarter of the ids is here: 512 rows fill tiles as 128 rows of a layer on one rank do."""
    alone = ExpertsProblem(64, 8, 7168, 2048)
    shared = dataclasses.replace(alone, all_experts=256)
    for tokens in (128, 512, 2048):
        assert default_config(shared, 4 * tokens) == default_config(alone, tokens) != default_config(alone, 4 * tokens)
    # How many ids there are to look at stays what it is.
    assert default_config(alone, 32).path == "scan"
    assert default_config(shared, 128).path == "grouped"


def test_a_layer_over_ranks_knows_that_most_ids_are_not_here():
    config = moe_core.MoEConfig(
        num_experts=256,
        top_k=8,
        hidden_size=7168,
        intermediate_size=2048,
        dtype=torch.bfloat16,
        max_tokens_per_rank=128,
    )
    parallel = moe_core.MoEParallelConfig.fold(dp_size=4, dp_rank=0, expert_parallel=True)
    ranges = TritonExperts(config, parallel).launch_ranges(ActivationFormat.STANDARD, Device("cuda", (9, 0)))
    told = next(item.what for item in reversed(ranges) if item.first_row <= 512)
    assert told.startswith("grouped, up 32x64x128"), told


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("tokens", [1, 8, 100, 5000])
@pytest.mark.parametrize("experts", [1, 7, 512])
@pytest.mark.parametrize("top_k", [1, 5, 16])
@pytest.mark.parametrize(("hidden", "intermediate"), [(2880, 1408), (776, 776), (64, 32), (16384, 53248)])
def test_shared_memory_and_registers_fit_everywhere(itemsize, tokens, experts, top_k, hidden, intermediate):
    if top_k > experts:
        pytest.skip("K > E")
    for unit in ("k", "n"):
        problem = ExpertsProblem(experts, top_k, hidden, intermediate, itemsize, w13_unit=unit, w2_unit=unit)
        config = default_config(problem, tokens)
        if isinstance(config, SlotsConfig):
            # Registers of a program's accumulator: 128 a thread at most.
            assert 2 * config.up_n * config.up_k <= 128 * 32 * config.up_warps
            choices = 1 << (top_k - 1).bit_length()
            assert choices * config.down_n * config.down_k <= 128 * 32 * config.down_warps
            continue
        for tile in (config.up, config.down):
            if isinstance(tile, TileConfig):
                width = tile.block_n * (2 if tile is config.up else 1)
                rows = tile.block_m + (tile.small_m if tile.tall else 0)
                assert tile.stages * (rows + width) * tile.block_k * itemsize <= 227 * 1024


def test_down_tiles_divide_up_tiles():
    tile = TileConfig(64, 128, 64, 4, 3)
    with pytest.raises(ValueError, match=r"up.block_m = 64, down.block_m = 128"):
        GroupedConfig(tile, dataclasses.replace(tile, block_m=128))


def test_warpgroups_in_turns_have_their_own_buffers():
    with pytest.raises(ValueError, match="row_stages = 3"):
        AlternatingConfig(128, 1, 3)


def test_short_products_get_warpgroups_in_turns():
    short = ExpertsProblem(256, 8, 7168, 256)
    assert [type(grouped_config(short, rows).down) for rows in (48, 128, 512)] == [
        TileConfig, AlternatingConfig, AlternatingConfig,
    ]  # fmt: skip
    # Few blocks of weights, other strides, an older device: tiles.
    for change in ({"num_experts": 8, "hidden_size": 1024}, {"w2_unit": "n"}, {"w2_tma": False}, {"itemsize": 4},
                   {"capability": (8, 0)}):  # fmt: skip
        assert isinstance(grouped_config(dataclasses.replace(short, **change), 128).down, TileConfig), change
    assert isinstance(batched_config(short, 4096).down, TileConfig)


def test_distinct_experts():
    assert distinct_experts(QWEN3, 1) == pytest.approx(8)
    assert distinct_experts(MIXTRAL, 4) == pytest.approx(8 * (1 - 0.75**4))
    assert distinct_experts(ExpertsProblem(1, 1, 8, 8), 100) == 1


@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 0, 64), (63, 65, 64), (0, 1000, 1), (1, 1, 1)])
@pytest.mark.parametrize("block_m", [16, 64, 128])
def test_tile_numbers_never_overlap_and_stay_in_bounds(counts, block_m):
    """The rule of the align kernel: expert e's tiles start at offset[e] // BM + e."""
    offset, last = 0, 0
    for expert, count in enumerate(counts):
        first = offset // block_m + expert
        assert first >= last
        last = first + -(-count // block_m)
        offset += count
    assert last <= align_tiles(sum(counts), len(counts), block_m)


@pytest.mark.parametrize("tokens", [1, 16, 64, 300, 4096])
@pytest.mark.parametrize("problem", [QWEN3, MIXTRAL, GPT_OSS])
def test_workspace_is_at_most_t_k_times_i_plus_h_and_small_index_arrays(problem, tokens):
    import torch

    shapes = experts_workspace(problem, torch.bfloat16, tokens)
    slots = tokens * problem.top_k
    model = sum(torch.Size(shape).numel() for shape, dtype in shapes.values() if dtype == torch.bfloat16)
    small = sum(torch.Size(shape).numel() for shape, dtype in shapes.values() if dtype == torch.int32)
    assert model <= slots * (problem.hidden_size + problem.intermediate_size)
    assert small <= 3 * slots + 4 * problem.num_experts + 8 * problem.hidden_size


def test_batched_programs_walk_the_tiles():
    config = batched_config(QWEN3, 4096)
    assert config.up.persistent
    assert config.down.persistent
    assert isinstance(default_config(QWEN3, 16), ScanConfig)


def test_a_table_comes_before_the_heuristics_and_says_so():
    plan, source = choose_plan(QWEN3, "NVIDIA H200")
    assert source == "table of NVIDIA H200 up to T = 64, heuristics above"
    assert config_for(plan, 1) == SlotsConfig(1, 1024, 2, 8, 256, 8, preload=1)
    assert config_for(plan, 5000) == config_for(default_plan(QWEN3), 5000)
    for problem, device in ((QWEN3, "NVIDIA H100"), (dataclasses.replace(QWEN3, top_k=7), "NVIDIA H200")):
        assert choose_plan(problem, device) == (default_plan(problem), "heuristics")


def test_tables_rise():
    for table in TABLES.values():
        for plan in table.values():
            ends = [end for end, _ in plan]
            assert None not in ends
            assert ends == sorted(set(ends))


def test_devices_before_hopper_get_no_tensor_maps_and_no_programmatic_launch():
    old = dataclasses.replace(QWEN3, capability=(8, 0))
    for _, config in default_plan(old):
        assert not config.pdl
        if isinstance(config, GroupedConfig):
            assert not config.up.tma
            assert not config.down.tma
    assert not batched_config(old, 512).pdl
