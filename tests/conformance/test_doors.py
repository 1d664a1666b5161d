"""The two doors of the kit: an author's test module under pytest, and `moe-core conformance`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("click")

from click.testing import CliRunner

import moe_core
import moe_core.testing
from moe_core.cli.app import app
from moe_core.errors import UnsupportedError
from moe_core.testing import registered, suites

AUTHOR = """
import attrs
from moe_core.testing import PrepareFinalizeConformance, registered

def broken(*given):
    made = registered("dispatch", "batched").factory(*given)
    finalize = made.finalize
    def forgets_weights(expert_out, handle, routing, out):
        finalize(expert_out, handle, attrs.evolve(routing, topk_weights=routing.topk_weights * 0 + 1), out)
    made.finalize = forgets_weights
    return made

class TestRight(PrepareFinalizeConformance):
    ranks = 1
    def backend(self):
        return registered("dispatch", "batched")

class TestBroken(PrepareFinalizeConformance):
    ranks = 1
    xfail = {"numbers: ids distinct, 1 rank": "weights come with 0.2"}
    def backend(self):
        return attrs.evolve(registered("dispatch", "batched"), factory=broken)
"""


def test_a_class_and_one_factory_are_an_authors_whole_test_module(tmp_path):
    file = tmp_path / "test_mine.py"
    file.write_text(AUTHOR)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rxf", "-p", "no:cacheprovider", "--rootdir", tmp_path, file],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=100,
    )
    told = done.stdout
    assert done.returncode == 1, told + done.stderr
    assert "TestRight" not in told.partition("short test summary")[2], "the right one passes"
    assert "router weight: it was not applied" in told, "the broken one is told what it broke"
    assert "XFAIL" in told
    assert "weights come with 0.2" in told


def invoke(*arguments):
    return CliRunner().invoke(app, ["conformance", *arguments], catch_exceptions=False)


def test_the_command_prints_a_table_and_writes_every_case(tmp_path):
    result = invoke("local", "--ranks", "1", "--json", str(tmp_path / "report.json"))
    assert result.exit_code == 0, result.output
    assert "dispatch local" in result.stdout
    assert "router weight" not in result.stdout.partition("conforms")[2]
    report = json.loads((tmp_path / "report.json").read_text())[0]
    assert report["verdict"] == "conforms"
    assert all(case["outcome"] in ("passed", "skipped") for case in report["cases"])
    assert {"name", "duty", "tier", "claim", "outcome", "text"} == set(report["cases"][0])


@pytest.fixture
def acme():
    """A dispatch backend "acme", made by the factory that the test gives."""
    local = registered("dispatch", "local")
    module = types.ModuleType("acme_dispatch")
    module.moe_core_api = (1, 0)

    def install(factory):
        def hook(register):
            register("acme", factory, local.capabilities)

        module.moe_core_register_prepare_finalize = moe_core.hookimpl(hook)
        moe_core.register_plugin(module)

    yield install
    moe_core.unregister_plugin("acme_dispatch")


def test_one_cause_is_printed_once(acme):
    acme(lambda *_: None)
    result = invoke("acme", "--ranks", "1")
    assert result.exit_code == 1
    assert result.stdout.count("FAILED") == 1
    told = " ".join(result.stdout.split())
    assert "a step runs: " in told
    assert "dispatch 'acme' (in process, moe_core_register_prepare_finalize): its factory returned None" in told
    assert "expected factory(config, parallel, scheme, group, placement) -> moe_core.PrepareAndFinalize" in told
    assert "'one step runs' failed; what follows is asked when it passes" in told


def test_failures_of_one_text_are_printed_together(acme):
    def refuses_one_choice(*given):
        made = registered("dispatch", "local").factory(*given)
        whole = made.prepare

        def prepare(hidden_states, routing, **named):
            if routing.topk_ids.shape[1] == 1:
                raise RuntimeError("no K = 1")
            return whole(hidden_states, routing, **named)

        made.prepare = prepare
        return made

    acme(refuses_one_choice)
    told = re.search(r"FAILED (\d+) cases, first: (.*)\n.*no K = 1", invoke("acme", "--ranks", "1").stdout)
    assert told, "with their number and the name of the first"
    assert int(told[1]) > 1


def test_markdown_for_a_readme():
    result = invoke("sigmoid", "--markdown")
    assert result.exit_code == 0
    assert "**conforms**" in result.stdout
    assert "| duty | tier | passed |" in result.stdout


def test_a_backend_that_cannot_run_here_is_not_said_to_conform():
    result = invoke("custom")
    assert result.exit_code == 3
    assert "was not exercised" in result.stdout


def test_a_router_is_given_its_parameters():
    assert invoke("grouped_sigmoid", "--params", '{"num_groups": 2, "topk_groups": 2}').exit_code == 0
    assert "is not JSON" in invoke("grouped_sigmoid", "--params", "2,").stderr


@pytest.mark.full
def test_a_dispatch_on_the_ranks_of_a_launcher(tmp_path):
    report = tmp_path / "report.json"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moe_core"]
    done = subprocess.run(
        [sys.executable, *command, "conformance", "all_gather", "--launched", "--json", report],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(report.read_text())[0]
    assert "2 processes" in told["subject"]
    assert sum(case["outcome"] == "passed" for case in told["cases"]) > 100


def test_without_a_launcher_there_are_no_launched_ranks():
    assert "takes its ranks from torchrun" in CliRunner().invoke(app, ["conformance", "local", "--launched"]).stderr


def test_names_are_as_in_the_listing():
    with pytest.raises(UnsupportedError, match=r"registered under the name 'nope'; there are: .*dispatch:local"):
        suites("nope")
    with pytest.raises(UnsupportedError, match="unknown kind 'expert'"):
        suites("expert:torch")
    assert [suite.subject.split()[0] for suite in suites("experts:torch")] == ["experts"]
    with pytest.raises(ValueError, match="kinds are dispatch, experts, scheme, router, runner"):
        registered("dispatcher", "local")


def test_the_docs_know_every_duty_that_a_report_can_name():
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text()
    told = {duty.strip() for line in re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE) for duty in line.split(",")}
    names = ("dispatch:batched", "dispatch:all_gather", "experts:torch", "experts:fp8_torch", "scheme:nvfp4_w4a4",
             "router:sigmoid", "runner:default")  # fmt: skip
    of_cases = {case.duty for name in names for suite in suites(name, ranks=2) for case in suite.cases}
    kit = Path(moe_core.testing.__file__).parent
    raised = {found for file in kit.glob("*.py") for found in re.findall(r'Violation\(\s*"([^"]+)"', file.read_text())}
    assert of_cases | raised <= told
