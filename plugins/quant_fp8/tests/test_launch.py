"""The FP8 launch choice, workspaces and checks: pure, so tested without a GPU and without Triton."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_core.ops import (
    AlternatingConfig,
    ExpertsProblem,
    Fp8BatchedLauncher,
    Fp8ExpertsLauncher,
    Fp8Format,
    Fp8GroupedConfig,
    Fp8SpecializedConfig,
    Fp8StreamConfig,
    ScanConfig,
    SlotsConfig,
    TileConfig,
    fp8_batched_workspace,
    fp8_workspace,
)
from moe_core.ops._fp8_launch import fp8_batched_config, fp8_config
from quant_fp8 import schemes
from quant_fp8.formats import format_of

QWEN3 = ExpertsProblem(128, 8, 2048, 768, itemsize=1)
MIXTRAL = ExpertsProblem(8, 2, 4096, 14336, itemsize=1)
DEEPSEEK = ExpertsProblem(256, 8, 7168, 256, itemsize=1)
GPT_OSS = ExpertsProblem(128, 4, 2880, 2880, itemsize=1)
BLOCK, STATIC, DYNAMIC = Fp8Format("block", "group"), Fp8Format("tensor", "static"), Fp8Format("tensor", "tensor")
ROW = Fp8Format("channel", "row")


def path(problem, tokens, spec=BLOCK):
    config = fp8_config(problem, spec, tokens)
    return "by slot" if isinstance(config, ScanConfig) and config.by_slot else config.path


def test_paths_by_the_number_of_tokens():
    assert [path(QWEN3, t) for t in (1, 2, 4, 16, 64)] == ["slots", "by slot", "stream", "scan", "grouped"]
    # One token of Mixtral reads 350 MB: there the matrix unit pays.
    assert [path(MIXTRAL, t) for t in (1, 4, 16, 64)] == ["stream", "stream", "scan", "grouped"]
    # Rows of 22.5 lines: through tensor maps as soon as experts are shared.
    assert [path(GPT_OSS, t, ROW) for t in (1, 8, 16, 64)] == ["stream", "stream", "grouped", "grouped"]
    # The scale of an expert's input needs all of its rows: beyond one token they are sorted first.
    assert [path(QWEN3, t, DYNAMIC) for t in (1, 2, 16)] == ["slots", "grouped", "grouped"]


def test_weights_stream_where_a_step_reads_many_on_hopper_and_the_activation_is_the_one_it_knows():
    assert [path(DEEPSEEK, t) for t in (1, 2, 8, 9)] == ["slots", "stream", "stream", "scan"]
    assert fp8_config(DEEPSEEK, BLOCK, 4, plain=False).path == "scan"
    assert path(dataclasses.replace(DEEPSEEK, capability=(12, 0)), 4) == "by slot"
    # The scale of an expert's input is known before its rows, or not; 256 ids are more than a program compares.
    assert [path(MIXTRAL, 1, spec) for spec in (STATIC, DYNAMIC)] == ["stream", "slots"]
    assert path(dataclasses.replace(MIXTRAL, top_k=32, num_experts=64), 8) != "stream"
    with pytest.raises(ValueError, match="buffers come in pairs"):
        Fp8StreamConfig(5, 6)


def test_loading_warps_where_experts_have_many_rows_and_the_activation_is_the_one_they_know():
    kinds = {
        (4096, True): (Fp8SpecializedConfig,) * 2,
        (1024, True): (Fp8SpecializedConfig,) * 2,
        (256, True): (TileConfig,) * 2,
        (4096, False): (TileConfig,) * 2,
    }
    for (tokens, plain), kind in kinds.items():
        config = fp8_config(QWEN3, BLOCK, tokens, plain)
        assert (type(config.up), type(config.down)) == kind
    assert isinstance(fp8_config(QWEN3, STATIC, 4096).up, TileConfig)
    assert isinstance(fp8_config(QWEN3, ROW, 1024).up, TileConfig)
    assert isinstance(fp8_config(MIXTRAL, BLOCK, 256).up, TileConfig)
    with pytest.raises(ValueError, match="or take a tile of 64 in turns"):
        Fp8SpecializedConfig(block_m=32)
    with pytest.raises(ValueError, match="halves are those of a tile of 64 rows"):
        Fp8SpecializedConfig(halves=True)


def test_rows_that_ranks_share_have_kernels_that_find_what_is_there():
    few, short = (dataclasses.replace(DEEPSEEK, num_experts=64, intermediate_size=i) for i in (2048, 256))
    for problem in (few, short):
        shared = dataclasses.replace(problem, all_experts=256)
        config = fp8_config(shared, BLOCK, 512)
        assert config.up == Fp8SpecializedConfig(4, 1, 64, halves=True)
        assert config.early
        # a mean of 64 rows, and not of 256
        assert fp8_config(shared, BLOCK, 2048).up.block_m == 64
        tall = fp8_config(shared, BLOCK, 4096)
        assert (tall.up.block_m, tall.up.halves, tall.early) == (128, False, False)
        assert fp8_config(shared, BLOCK, 512, plain=False) == fp8_config(problem, BLOCK, 512, plain=False)
        assert fp8_config(shared, ROW, 512) == fp8_config(problem, ROW, 512)
    assert isinstance(fp8_config(few, BLOCK, 512).up, TileConfig)
    large = dataclasses.replace(few, intermediate_size=14336)
    assert fp8_config(dataclasses.replace(large, all_experts=256), BLOCK, 512) == fp8_config(large, BLOCK, 512)
    assert isinstance(fp8_config(dataclasses.replace(short, all_experts=256), BLOCK, 512).down, AlternatingConfig)


def test_rows_of_short_experts_take_turns():
    kinds = {
        (64, BLOCK, True): TileConfig, (1024, BLOCK, True): AlternatingConfig, (16384, BLOCK, True): AlternatingConfig,
        (1024, BLOCK, False): TileConfig, (1024, ROW, True): TileConfig,
    }  # fmt: skip
    for (tokens, spec, plain), kind in kinds.items():
        assert type(fp8_config(DEEPSEEK, spec, tokens, plain).down) is kind
    with pytest.raises(ValueError, match=r"two warpgroups need an even number"):
        AlternatingConfig(128, 3, 3)


def test_tiles_follow_the_rows_of_an_expert():
    heights = [fp8_config(QWEN3, BLOCK, t).up.block_m for t in (64, 128, 256, 1024, 4096)]
    assert heights == [16, 16, 32, 64, 128]
    # Waiting programs hold shared memory: the next kernel comes early only where few tiles want it.
    assert [fp8_config(QWEN3, BLOCK, t).early for t in (64, 256, 1024, 4096)] == [True, True, False, False]
    # A group of tiles that divides the number of programs would give some of them all the short ones.
    assert [fp8_config(MIXTRAL, BLOCK, t).up.group for t in (1024, 4096)] == [7, 4]
    assert [fp8_config(QWEN3, BLOCK, t).up.group for t in (1024, 4096)] == [1, 2]


@pytest.mark.parametrize("scheme", schemes.SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("tokens", [1, 8, 100, 5000])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (7, 5), (512, 16)])
@pytest.mark.parametrize(("hidden", "intermediate"), [(2880, 1408), (64, 32), (16384, 53248)])
@pytest.mark.parametrize(("capability", "memory"), [((9, 0), 227), ((8, 9), 99), ((12, 0), 99)])
def test_tiles_fit_everywhere(scheme, tokens, experts, top_k, hidden, intermediate, capability, memory):
    problem = ExpertsProblem(experts, top_k, hidden, intermediate, itemsize=1, capability=capability)
    spec = format_of(scheme)
    configs = [fp8_config(problem, spec, tokens), fp8_batched_config(problem, spec, tokens)]
    width = 2 if spec.activations is None else 1  # bytes of an activation
    for config in configs:
        if isinstance(config, SlotsConfig):
            assert 2 * config.up_n * config.up_k <= 128 * 32 * config.up_warps
            assert config.up_k % 128 == config.down_k % 128 == 0
            assert (1 << (top_k - 1).bit_length()) * config.down_n * config.down_k <= 128 * 32 * config.down_warps
            continue
        if isinstance(config, Fp8StreamConfig):
            assert tokens <= 8
            assert max(config.up_buffers, config.down_buffers) * (2 * 64 + 8 + 1) * 128 <= memory * 1024
            continue
        for tile, columns in ((config.up, 2), (config.down, 1)):
            if isinstance(tile, TileConfig):
                assert tile.block_k == 128
                assert tile.stages * (tile.block_m * width + tile.block_n * columns) * 128 <= memory * 1024


def test_workspaces_are_host_arithmetic():
    shapes = fp8_workspace(QWEN3, BLOCK, torch.bfloat16, 64)
    assert shapes["act_scale"] == ((512, 6), torch.float32)
    assert shapes["x_q"] == ((64, 2048), torch.float8_e4m3fn)
    assert "x_q" not in fp8_workspace(QWEN3, STATIC, torch.bfloat16, 64)
    assert fp8_batched_workspace(QWEN3, STATIC, torch.bfloat16, 64)["x_q"][0] == (2 * 128 * 64, 2048)
    assert set(shapes) >= {"act", "y", "row_end"}


def test_what_the_kernels_cannot_read_has_a_reason():
    with pytest.raises(ValueError, match="weights 'block' go with them"):
        Fp8Format("channel", "group")
    tile = TileConfig(64, 128, 128, 4, 3)
    with pytest.raises(ValueError, match=r"down.block_m = 128 must divide up.block_m = 64"):
        Fp8GroupedConfig(tile, dataclasses.replace(tile, block_m=128))
    answer = format_of(schemes.block_scheme((64, 32), schemes.ScaleFormat.FP32))
    assert isinstance(answer, str)
    assert "blocks of 128 × 128" in answer


def test_inputs_of_the_wrong_kind_are_named():
    from fp8_case import OAI, Case, poisoned

    case = Case("fp8_block", dtype=torch.bfloat16)
    record = case.record()
    launcher = Fp8ExpertsLauncher(case.weights(record), top_k=2, dtype=torch.bfloat16)
    x, ids, router = case.inputs()
    space = poisoned(launcher.workspace(case.tokens), "cpu")
    with pytest.raises(ValueError, match=r"x is \(6, 144\) torch.float32"):
        launcher(x.float(), ids, router, space, torch.empty_like(x))
    with pytest.raises(ValueError, match=r"x_scale is \(6, 1\).*takes \[6, 2\]"):
        launcher(x.to(torch.float8_e4m3fn), ids, router, space, torch.empty_like(x), None, torch.ones(6, 1))
    wide = Fp8SpecializedConfig()
    config = Fp8GroupedConfig(wide, wide)
    other = Case("fp8_block", activation=OAI, dtype=torch.bfloat16)
    launcher = Fp8ExpertsLauncher(other.weights(other.record()), top_k=2, dtype=torch.bfloat16, plan=((None, config),))
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="need a TileConfig"):
        launcher(x, ids, router, space, torch.empty_like(x))
    with pytest.raises(ValueError, match="the batched format needs TileConfigs"):
        Fp8BatchedLauncher(case.weights(record), dtype=torch.bfloat16, config=config)(
            x.expand(5, 6, 144), torch.zeros(5, dtype=torch.int32), {}, torch.empty(5, 6, 144)
        )
    turns = Fp8GroupedConfig(wide, AlternatingConfig(128, 3, 4))
    large = Case("fp8_block", intermediate=272, dtype=torch.bfloat16)
    launcher = Fp8ExpertsLauncher(large.weights(large.record()), top_k=2, dtype=torch.bfloat16, plan=((None, turns),))
    with pytest.raises(ValueError, match="is for I up to 256"):
        launcher(x, ids, router, space, torch.empty_like(x))
