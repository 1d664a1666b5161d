"""The table in the user's cache: read once per plan, whole at every moment, and never an error."""

from __future__ import annotations

import json
import sys

import attrs
import pytest

import moe_core
from moe_core import ActivationFormat, MoEError, Problem, tuned
from moe_core.tuned import NOT_TUNED, Tuned, TunedFormat, TunedPoint, read_tuned, tuned_file, write_tuned

STANDARD = ActivationFormat.STANDARD


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "cache_folder", lambda: tmp_path / "tuned")
    return tmp_path / "tuned"


@pytest.fixture
def problem(config):
    return Problem(config=config())


MEASURED = (
    TunedFormat().with_point(TunedPoint(16, {"a (x 1)": 5.5}, {"b (x 1)": "dead"})).with_launch("a (x 1)", 16, {"n": 2})
)


def test_what_is_written_is_read(problem):
    assert read_tuned(problem) is NOT_TUNED
    file = write_tuned(problem, Tuned({STANDARD: MEASURED.with_point(TunedPoint(1, {"a (x 1)": 2.0}))}))
    found = read_tuned(problem)
    assert [point.rows for point in found.of(STANDARD).points] == [1, 16], "in rising order"
    assert found.of(STANDARD).launch == {"a (x 1)": ((16, {"n": 2}),)}
    assert found.of(STANDARD).points[1] == MEASURED.points[0]
    assert (found.source, found.complaint) == (str(file), "")
    assert len(found.date) == len("2026-01-31")
    assert found.of(ActivationFormat.BATCHED) == TunedFormat()


@pytest.mark.parametrize("change", [{"top_k": 3}, {"hidden_size": 32}, {"activation": moe_core.ActivationSpec("gelu")}])
def test_another_layer_has_another_file(problem, config, cache, change):
    assert tuned_file(problem, cache) != tuned_file(Problem(config=config(**change)), cache)


def test_another_device_or_share_of_the_experts_has_another_file(problem, cache):
    others = [
        attrs.evolve(problem, device=moe_core.Device("cuda", (9, 0), "NVIDIA H200")),
        attrs.evolve(problem, parallel=moe_core.MoEParallelConfig(ep_size=2)),
        attrs.evolve(problem, parallel=moe_core.MoEParallelConfig(tp_size=2)),
    ]
    assert len({tuned_file(item, cache) for item in [problem, *others]}) == 4


def test_half_of_the_experts_is_another_layer_than_half_as_many(config, cache):
    half = Problem(config=config(num_experts=6), parallel=moe_core.MoEParallelConfig(ep_size=2))
    assert tuned_file(half, cache) != tuned_file(Problem(config=config(num_experts=3)), cache)


def test_one_tensor_parallel_rank_is_a_layer_of_its_width(config, cache):
    split = Problem(config=config(intermediate_size=32), parallel=moe_core.MoEParallelConfig(tp_size=2))
    assert tuned_file(split, cache) == tuned_file(Problem(config=config(intermediate_size=16)), cache)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"file_version": 1}', '{"file_version": 1, "versions": 3}'])
def test_a_damaged_file_is_a_complaint_and_no_error(problem, config, text):
    file = write_tuned(problem, Tuned({STANDARD: MEASURED}))
    file.write_text(text)
    found = read_tuned(problem)
    assert found.complaint.startswith(f"{file} is damaged")
    assert "run moe-core tune again" in found.complaint
    assert found.of(STANDARD) == TunedFormat()
    assert found.complaint in moe_core.plan(config(), device="cpu").explain()


def test_damaged_inside_is_damaged(problem):
    file = write_tuned(problem, Tuned({STANDARD: MEASURED}))
    for broken in ({"standard": {"points": [{"rows": "many"}], "launch": {}}}, {"cubic": {}}, {"standard": []}):
        file.write_text(json.dumps({**json.loads(file.read_text()), "formats": broken}))
        assert "is damaged" in read_tuned(problem).complaint


def test_other_versions_are_told_and_ignored(problem):
    file = write_tuned(problem, Tuned({STANDARD: MEASURED}))
    stored = json.loads(file.read_text())
    stored["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(stored))
    found = read_tuned(problem)
    assert "was measured with torch 1.0" in found.complaint
    assert found.of(STANDARD) == TunedFormat()


def test_a_half_written_file_is_never_in_the_place_of_the_table(problem, monkeypatch):
    file = write_tuned(problem, Tuned({STANDARD: MEASURED}))
    before = file.read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(tuned.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tuned(problem, NOT_TUNED)
    assert file.read_text() == before


def test_the_place_is_the_users_cache(monkeypatch):
    monkeypatch.undo()
    pytest.importorskip("platformdirs")
    assert tuned.cache_folder().parts[-2:] == ("moe-core", "tuned")
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert tuned.cache_folder() is None


def test_without_a_place_there_is_no_table(problem, monkeypatch):
    monkeypatch.setattr(tuned, "cache_folder", lambda: None)
    assert read_tuned(problem) is NOT_TUNED
    with pytest.raises(MoEError, match=r'pip install "moe-core\[cli\]"'):
        write_tuned(problem, NOT_TUNED)
