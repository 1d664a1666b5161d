"""The launch choice of the NVFP4 kernels: pure, so tested without a GPU and without Triton."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from moe_core.ops import ExpertsProblem
from moe_core.ops._launch import AlternatingConfig
from moe_core.ops._nvfp4_launch import (
    GemmTile,
    Nvfp4GemmConfig,
    Nvfp4RowsConfig,
    Nvfp4SlotsConfig,
    default_nvfp4_config,
    default_nvfp4_plan,
    nvfp4_batched_config,
    nvfp4_config_for,
)

QWEN3 = ExpertsProblem(128, 8, 2048, 768)
DEEPSEEK = ExpertsProblem(256, 8, 7168, 256)
GPT_OSS = ExpertsProblem(128, 4, 2880, 2880)
MIXTRAL = ExpertsProblem(8, 2, 4096, 14336)
SMALL = ExpertsProblem(4, 2, 64, 64)
PROBLEMS = (QWEN3, DEEPSEEK, GPT_OSS, MIXTRAL, SMALL)


def paths(problem):
    return [nvfp4_config_for(default_nvfp4_plan(problem), tokens).path for tokens in (1, 4, 16, 64, 1024, 16384)]


def test_slots_then_rows_then_gemms():
    for problem in (QWEN3, DEEPSEEK, GPT_OSS):
        assert paths(problem) == ["slots", "slots", "rows", "rows", "gemm", "gemm"]
    # two of eight experts: at T = 4 slots would read experts twice
    assert paths(MIXTRAL) == ["slots", "rows", "rows", "rows", "gemm", "gemm"]
    assert "gemm" not in paths(SMALL), "a dot product shorter than the buffers"


def test_kernels_suit_the_rows_that_come_not_those_that_could():
    """Of 4 ranks' rows a quarter of the ids is here."""
    alone = ExpertsProblem(64, 8, 7168, 2048)
    shared = dataclasses.replace(alone, all_experts=256)
    for tokens in (64, 1024):
        assert default_nvfp4_config(shared, 4 * tokens) == default_nvfp4_config(alone, tokens)
    assert default_nvfp4_config(alone, 256).path == "gemm"
    assert default_nvfp4_config(shared, 256).path == "rows"


def test_without_hopper_there_are_no_gemms_and_no_programmatic_launch():
    for problem in PROBLEMS:
        for _, config in default_nvfp4_plan(dataclasses.replace(problem, capability=(8, 0))):
            assert isinstance(config, (Nvfp4SlotsConfig, Nvfp4RowsConfig))
            assert not config.pdl


def test_ranges_rise_and_end_open():
    for problem in PROBLEMS:
        ends = [end for end, _ in default_nvfp4_plan(problem)]
        assert ends[-1] is None
        assert ends[:-1] == sorted(ends[:-1])
        configs = [config for _, config in default_nvfp4_plan(problem)]
        assert all(a != b for a, b in itertools.pairwise(configs))


@pytest.mark.parametrize("tokens", [1, 3, 16, 100, 600, 5000])
@pytest.mark.parametrize("top_k", [1, 4, 16])
@pytest.mark.parametrize(("hidden", "inner"), [(64, 64), (192, 2880), (16384, 53248)])
def test_programs_fit_everywhere(hidden, inner, top_k, tokens):
    config = default_nvfp4_config(ExpertsProblem(16, top_k, hidden, inner), tokens)
    for part in (config.up, config.down):
        if isinstance(part, GemmTile):
            programs = 2 if part.registers else 1
            assert part.stages * (part.block_n * 128 + 5120) <= 227 * 1024 / programs
            assert 256 * part.registers * programs <= 65536
        elif isinstance(part, AlternatingConfig):
            assert inner == 256
        else:
            threads = 32 * part.rows * part.along_k
            assert threads <= 1024
            assert threads * part.registers <= 65536


def test_down_tiles_divide_up_tiles():
    with pytest.raises(ValueError, match=r"up.block_n = 64, down.block_n = 128"):
        Nvfp4GemmConfig(GemmTile(64, 4), GemmTile(128, 4))


def test_a_plan_that_ends_too_early_says_so():
    plan = ((4, default_nvfp4_config(QWEN3, 4)),)
    with pytest.raises(ValueError, match="ends at T = 4, asked for T = 5"):
        nvfp4_config_for(plan, 5)


def test_short_dot_products_alternate_and_many_rows_take_wide_tiles():
    for tokens, problem, up, down in (
        (1024, DEEPSEEK, GemmTile(64), GemmTile(64)),
        (4096, DEEPSEEK, GemmTile(128), AlternatingConfig(128, 2, 2)),
        (16384, DEEPSEEK, GemmTile(128), AlternatingConfig(256, 1, 2)),
        (4096, QWEN3, GemmTile(128), GemmTile(128)),
        (16384, QWEN3, GemmTile(256, registers=0), GemmTile(128)),
    ):
        assert default_nvfp4_config(problem, tokens) == Nvfp4GemmConfig(up, down)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("capacity", [1, 8, 17, 64, 4096])
def test_batched(problem, capacity):
    config = nvfp4_batched_config(problem, capacity)
    assert config.rows.eights <= 3
    if problem is SMALL:
        assert config.tile is None, "a dot product shorter than the buffers"
    else:
        assert config.rows.eights == 1
        assert (config.tile is None) == (capacity <= 8)
    if config.tile is not None:
        assert config.few == 8 * config.rows.eights, "experts with one pass of rows stay with the kernels for few"
    old = nvfp4_batched_config(dataclasses.replace(problem, capability=(8, 0)), capacity)
    assert old.tile is None
    assert not old.rows.pdl


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_stages_take_turns(stages):
    with pytest.raises(ValueError, match=f"stages = {stages}"):
        GemmTile(128, stages)
