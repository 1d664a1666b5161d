"""The search of launch parameters: pure, so tested without a GPU; and what it finds, as JSON and as a plan."""

import dataclasses
import json
import math

import pytest

from moe_core.ops import (
    ExpertsProblem,
    GroupedConfig,
    ScanConfig,
    SlotsConfig,
    choose_plan,
    config_for,
    config_from_json,
    config_to_json,
    default_plan,
    measured_plan,
    search_launch,
    sourced_plan,
)
from moe_core.ops._launch import MAX_BY_SLOT

QWEN3 = ExpertsProblem(128, 8, 2048, 768)
DEEPSEEK = ExpertsProblem(256, 8, 7168, 256)
MIXTRAL = ExpertsProblem(8, 2, 4096, 14336)
GPT_OSS = ExpertsProblem(128, 4, 2880, 2880, interleaved=True, w13_unit="n", w2_unit="n")
AMPERE = dataclasses.replace(QWEN3, capability=(8, 0))
PROBLEMS = {"qwen3": QWEN3, "deepseek": DEEPSEEK, "mixtral": MIXTRAL, "gpt-oss": GPT_OSS, "ampere": AMPERE}


def run(problem, tokens, cost):
    """(every configuration that was asked for, the rounds)."""
    tried, rounds = [], 0
    search = search_launch(problem, tokens, "NVIDIA H200")
    batch = next(search)
    while True:
        tried += batch
        rounds += 1
        try:
            batch = search.send([cost(config) for config in batch])
        except StopIteration:
            return tried, rounds


def no_cost(config):
    return 1.0


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 256, 4096])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_candidate_is_whole_and_survives_json(name, tokens):
    problem = PROBLEMS[name]
    tried, rounds = run(problem, tokens, no_cost)
    assert tried[0] == config_for(choose_plan(problem, "NVIDIA H200")[0], tokens), "what holds now comes first"
    assert 10 < len(tried) < 300
    assert rounds >= 2
    for config in tried:
        assert config_from_json(json.loads(json.dumps(config_to_json(config, problem))), problem) == config
        if isinstance(config, ScanConfig) and config.by_slot:
            assert 2 * tokens <= MAX_BY_SLOT, "its counters must be large enough to the end of its range"
        if isinstance(config, GroupedConfig) and problem.capability < (9, 0):
            assert not config.up.tma


def test_a_later_gemm_is_searched_with_the_best_of_the_one_before():
    wanted = (2, 512, 2)
    tried, _ = run(QWEN3, 1, lambda c: 1.0 if (c.up_n, c.up_k, c.up_warps) == wanted else 2.0)
    later = [c for c in tried if isinstance(c, SlotsConfig)][12:]
    assert any((c.up_n, c.up_k, c.up_warps) == wanted for c in later)
    tried, _ = run(MIXTRAL, 4096, lambda c: 1.0 if c.up.block_n == 64 else 2.0)
    assert tried[-1].up.block_n == 64
    assert tried[-1].pdl != tried[-2].pdl or len(tried) < 3


def test_parameters_that_cannot_run_end_a_path_and_not_the_search():
    tried, _ = run(QWEN3, 16, lambda c: math.inf if isinstance(c, ScanConfig) else 1.0)
    assert any(isinstance(config, GroupedConfig) for config in tried)
    assert run(QWEN3, 1, lambda c: math.inf)[0]


def test_what_was_stored_for_other_strides_or_by_other_versions_is_left_out():
    stored = config_to_json(SlotsConfig(1, 1024, 2, 4, 256, 4), QWEN3)
    assert config_from_json(stored, QWEN3) == SlotsConfig(1, 1024, 2, 4, 256, 4)
    assert config_from_json(stored, GPT_OSS) is None
    for broken in (
        {},
        None,
        3,
        {**stored, "path": "grouped"},
        {**stored, "new": 1},
        {**stored, "up_n": ...} | {"path": 1},
    ):
        assert config_from_json(broken, QWEN3) is None


@pytest.mark.parametrize("points", [(1,), (4,), (1, 4, 16), (3, 4, 5), (1, 256), (64, 4096), (16384,)])
def test_measured_parameters_hold_around_their_t_and_the_plan_elsewhere(points):
    base = default_plan(QWEN3)
    configs = {tokens: SlotsConfig(1, 1024, 2, 4, 256, 4, preload=1000 + tokens) for tokens in points}
    plan = measured_plan(base, list(configs.items()))
    assert plan[-1][0] is None
    ends = [end for end, _ in plan[:-1]]
    assert ends == sorted(set(ends))
    for tokens in points:
        assert config_for(plan, tokens) == configs[tokens]
    for tokens in (*range(1, 300), 1000, 5000, 40000):
        found = config_for(plan, tokens)
        near = [t for t in points if t / 2 < tokens <= 2 * t]
        if found in configs.values():
            nearest = min(near, key=lambda t: abs(math.log(t / tokens)))
            assert abs(math.log(nearest / tokens)) == pytest.approx(
                abs(math.log(next(t for t, c in configs.items() if c == found) / tokens)), abs=0.5
            )
        else:
            assert not near
            assert found == config_for(base, tokens)
    sources = {source for *_, source in sourced_plan(QWEN3, "NVIDIA H200", list(configs.items()))}
    assert "measured here" in sources
