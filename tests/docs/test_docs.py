"""The pages say what the code says: hooks, capabilities, the tutorial's blocks, and a site that builds."""

from __future__ import annotations

import enum
import importlib
import inspect
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import moe_core
from moe_core import errors, hookspecs
from moe_core.plugins import PluginStatus, registry
from moe_core.testing import Outcome, registered, run_case, run_on_ranks
from moe_core.testing.case import check_xfail
from moe_core.testing.dispatch import dispatch_cases

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ACME = ROOT / "examples" / "acme_backend"
MEASUREMENTS = ("experts_on_gpu", "quantized_experts_on_gpu", "symm_protocol")
HOOKS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("moe_core_register_")}


def first_cells(text: str) -> list[str]:
    return re.findall(r"^\| (`.+?`(?:, `.+?`)*) \|", text, re.MULTILINE)


@pytest.fixture(scope="module")
def taken() -> dict[str, list[str]]:
    """What each hook's `register` takes, seen by a plugin that implements them all."""
    seen: dict[str, list[str]] = {}

    def implementation(name: str):
        def hook(register):
            seen[name] = list(inspect.signature(register).parameters)

        hook.__name__ = name
        return moe_core.hookimpl(hook)

    module = types.ModuleType("curious")
    vars(module).update({name: implementation(name) for name in HOOKS}, moe_core_api=moe_core.PLUGIN_API)
    moe_core.register_plugin(module)
    moe_core.unregister_plugin("curious")
    return seen


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_stands_on_its_page_with_its_arguments(name, taken):
    page = (DOCS / "hooks.md").read_text()
    arguments = ", ".join(inspect.signature(HOOKS[name]).parameters)
    row = re.search(rf"^\| `{name}\({arguments}\)` \|(.*)\|$", page, re.MULTILINE)
    assert row, f"docs/hooks.md has no row for {name}({arguments})"
    shown = re.search(r"`([^`]+)`", row[1])
    assert shown
    assert shown[1].split(", ") == taken[name]


def test_the_page_shows_no_hook_that_does_not_exist():
    page = (DOCS / "hooks.md").read_text()
    assert set(re.findall(r"\| `(moe_core_register_\w+)", page)) == set(HOOKS)


@pytest.mark.parametrize("record", [moe_core.DispatchCapabilities, moe_core.ExpertsCapabilities])
def test_every_capability_stands_on_its_page(record):
    page = (DOCS / "capabilities.md").read_text()
    section = page.split(f"## `{record.__name__}`")[1].split("\n## ")[0]
    listed = [name for cell in first_cells(section) for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(listed) == sorted(field.name for field in attrs.fields(record))
    defaults = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE))
    for field in attrs.fields(record):
        shown = defaults.get(field.name)
        assert (shown == "(required)") == (field.default is attrs.NOTHING), field.name
        assert (shown == "no") == (field.default is False), field.name


def test_every_priority_that_is_shipped_stands_on_the_page_of_hooks():
    """Of what is installed here: CI installs all plugins."""
    section = (DOCS / "hooks.md").read_text().split("## Priorities of what is shipped")[1]
    rows = re.findall(r"^\| (dispatch|experts) `(\w+)` \| `(moe-[\w-]+)` \| (.+) \|$", section, re.MULTILINE)
    listed = {(kind, name): (package, priority) for kind, name, package, priority in rows}
    shipped = {
        (kind, name): (candidate.plugin.split()[0], candidate.priority)
        for kind in ("dispatch", "experts")
        for name, candidate in getattr(registry(), kind).items()
        if candidate.plugin.startswith("moe-")
    }
    for key, (package, priority) in shipped.items():
        first, *later = ((0, priority),) if isinstance(priority, int) else priority
        told = "; ".join([str(first[1]), *(f"from {rows} on {value}" for rows, value in later)])
        assert listed.get(key) == (package, told)
    packages = {package for package, _ in shipped.values()}
    assert {key for key, (package, _) in listed.items() if package in packages} == set(shipped)


def test_every_status_of_a_plugin_stands_on_the_page_of_hooks():
    page = (DOCS / "hooks.md").read_text()
    section = page.split("| status | meaning |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [status.value for status in PluginStatus]


def test_every_public_name_stands_on_the_api_page_or_is_told_elsewhere():
    api, capabilities = (DOCS / "api.md").read_text(), (DOCS / "capabilities.md").read_text()
    elsewhere = {"PLUGIN_API", "UNQUANTIZED", "Plan", "SharedExperts", "hookimpl"}
    documented = set(re.findall(r"moe_core\.(\w+)$", api, re.MULTILINE))
    documented |= set(re.findall(r"^## `(\w+)`", capabilities, re.MULTILINE))
    raised = {name for name in moe_core.__all__ if inspect.isclass(getattr(moe_core, name)) and "Error" in name}
    assert set(moe_core.__all__) - raised - elsewhere <= documented


CONTRACTS = (
    moe_core.PrepareAndFinalize, moe_core.Experts, moe_core.QuantMethod, moe_core.Router, moe_core.MoERunnerInterface,
    moe_core.Group,
)  # fmt: skip


def signature(method: Callable[..., object]) -> str:
    """As the page writes it: names, and where those begin that are passed by name."""
    taken = [item for item in inspect.signature(method).parameters.values() if item.name not in ("self", "cls")]
    by_name = [item.name for item in taken if item.kind is item.KEYWORD_ONLY]
    names = [item.name for item in taken if item.kind is not item.KEYWORD_ONLY]
    return f"{method.__name__}({', '.join([*names, *(['*'] if by_name else []), *by_name])})"


@pytest.mark.parametrize("contract", CONTRACTS)
def test_every_method_of_the_contract_can_be_read_without_the_site(contract):
    section = (DOCS / "api.md").read_text().split(f"**`{contract.__name__}`**")[1]
    text, _, rest = section.partition("\n|")
    rows = re.findall(r"^\| `(\w+\(.*?\))` \| (.*) \|$", rest.partition("\n\n")[0], re.MULTILINE)
    members = {name: getattr(contract, name) for name in vars(contract) if not name.startswith("_")}
    methods = {name: value for name, value in members.items() if callable(value)}
    assert dict(rows).keys() == {signature(method) for method in methods.values()}
    if contract is not moe_core.Group:  # every group has them all
        needed = {row for row, said in rows if said.startswith("needed: ")}
        assert needed == {signature(method) for name, method in methods.items() if name in contract.__abstractmethods__}
    for name in members.keys() - methods.keys():
        assert f"`{name}`" in text


def test_whatever_the_site_shows_of_the_api_has_a_row_that_can_be_read_without_it():
    page = (DOCS / "api.md").read_text()
    told = {name for cell in first_cells(page) for name in re.findall(r"`([\w.]+)`", cell)}
    shown = set(re.findall(r":: moe_core\.([\w.]+)$", page, re.MULTILINE)) - {"formats", "errors", "runner.MoERunner"}
    raised = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
    functions = {f"formats.{name}" for name in ("quantize", "dequantize")}
    assert (shown | raised | functions) - {contract.__name__ for contract in CONTRACTS} <= told
    for name in told:
        owner, _, last = f"moe_core.{name}".rpartition(".")
        assert hasattr(importlib.import_module(owner), last), name
    for name, values in re.findall(r"^\| `(\w+)` \| ([A-Z_0-9, ]+)[:|]", page, re.MULTILINE):
        if issubclass(getattr(moe_core, name), enum.Enum):
            assert values.strip().rstrip(":").split(", ") == list(getattr(moe_core, name).__members__), name


def test_pages_for_authors_name_no_file_of_a_checkout():
    """They have wheels and these pages. The two pages of measurements say how those were made."""
    for page in set(DOCS.glob("*.md")) - {DOCS / f"{name}.md" for name in MEASUREMENTS}:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        assert re.findall(r"`(?:tests|benchmarks|plugins|examples|changes|moe_\w+)/[^`]*`", text) == [], page.name


def tutorial_blocks() -> dict[str, str]:
    text = (DOCS / "write_a_backend.md").read_text()
    blocks = re.findall(r"```(?:python|toml)\n(# (\S+)\n.*?)```", text, re.DOTALL)
    return {name: block for block, name in blocks}


def test_the_tutorial_is_the_example_package():
    blocks = tutorial_blocks()
    shown = {name for name in blocks if (ACME / name).exists()}
    assert shown == {f"acme_moe/{part}.py" for part in ("dispatch", "dispatch_plugin", "experts", "experts_plugin")} | {
        "pyproject.toml",
        "tests/test_conformance.py",
    }
    for name in shown:
        assert blocks[name].removeprefix("# pyproject.toml\n") == (ACME / name).read_text(), name


@pytest.mark.parametrize("part", ["dispatch", "experts"])
def test_a_backend_takes_less_than_sixty_lines(part):
    blocks = tutorial_blocks()
    lines = (blocks[f"acme_moe/{part}.py"] + blocks[f"acme_moe/{part}_plugin.py"]).splitlines()
    assert sum(bool(line.strip()) for line in lines) < 60


def test_neighbours_on_virtual_ranks():
    names: dict[str, Any] = {}
    exec(compile(tutorial_blocks()["neighbours.py"], "neighbours.py", "exec"), names)
    assert run_on_ranks(3, around_a_ring, names["to_the_next"]) == [True] * 3


def around_a_ring(group, to_the_next):
    """After as many steps as there are ranks, each has its own rows again; rank r starts with r rows of r."""
    rows = torch.full((group.rank, 2), float(group.rank))
    for step in range(1, group.size + 1):
        owner = (group.rank - step) % group.size
        rows = to_the_next(group, rows, owner)
        if not torch.equal(rows, torch.full((owner, 2), float(owner))):
            return False
    return True


def test_neighbours_by_torch_on_processes(tmp_path):
    source = tutorial_blocks()["neighbours_by_torch.py"] + inspect.getsource(around_a_ring)
    main = f"""
import os, sys, torch
from moe_core.group import TorchGroup
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
assert around_a_ring(TorchGroup(), to_the_next)
dist.barrier()
os._exit(0)
"""
    (tmp_path / "ring.py").write_text(source + main)
    ranks = [subprocess.Popen([sys.executable, tmp_path / "ring.py", str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=60) for process in ranks] == [0, 0]


@pytest.fixture
def acme(monkeypatch):
    """The example's plugins, registered in this process."""
    monkeypatch.syspath_prepend(str(ACME))
    from acme_moe import dispatch_plugin, experts_plugin

    for module in (dispatch_plugin, experts_plugin):
        moe_core.register_plugin(module)
    yield
    for module in (dispatch_plugin, experts_plugin):
        moe_core.unregister_plugin(module.__name__)


def test_the_tutorials_layer_runs(acme, capsys):
    block = tutorial_blocks()["use_it.py"]
    exec(compile(block, "use_it.py", "exec"), {})
    expected = re.search(r"print\(.*# (.*)$", block, re.MULTILINE)
    assert expected
    assert capsys.readouterr().out.strip() == expected[1]


def test_the_tutorials_owners_are_as_it_says(capsys):
    block = tutorial_blocks()["owners.py"]
    exec(compile(block, "owners.py", "exec"), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^print\(.*# (.*)$", block, re.MULTILINE)


def blocks_of(page: str) -> list[dict[str, Any]]:
    """What each block of Python on a page defines."""
    found = []
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        names: dict[str, Any] = {"__name__": page}
        exec(compile(block, page, "exec"), names)
        found.append(names)
    return found


def test_the_footprint_that_the_page_shows_is_that_of_the_tutorials_dispatch(acme):
    (names,) = blocks_of("plan.md")
    candidate = registered("dispatch", "gather_all")
    capabilities = attrs.evolve(candidate.capabilities, footprint=names["footprint"])
    cases = dispatch_cases(attrs.evolve(candidate, capabilities=capabilities), ranks=3)
    asked = [case for case in cases if case.duty == "footprint"]
    assert asked
    for case in asked:
        assert run_case(case).outcome is Outcome.PASSED, run_case(case).text


def test_the_kits_page_shows_classes_that_pytest_can_collect():
    for names in blocks_of("conformance.md"):
        (shown,) = (kind for name, kind in names.items() if name.startswith("Test"))
        check_xfail(shown().cases(), shown.xfail)


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert "moe_core.PrepareAndFinalize" in (tmp_path / "api.html").read_text()


def test_every_change_is_of_a_kind_that_the_changelog_knows():
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["towncrier"]
    kinds = {kind["directory"] for kind in settings["type"]}
    fragments = [path.name for path in (ROOT / "changes").iterdir()]
    assert fragments
    assert {name for name in fragments if not re.fullmatch(rf"\+[\w-]+\.({'|'.join(kinds)})\.md", name)} == set()
