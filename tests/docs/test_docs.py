"""The pages say what the code says: hooks, capabilities, the tutorial's blocks, and a site that builds."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import attrs
import pytest

import moe_core
from moe_core import hookspecs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ACME = ROOT / "examples" / "acme_backend"
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


def test_every_public_name_stands_on_the_api_page_or_is_told_elsewhere():
    api, capabilities = (DOCS / "api.md").read_text(), (DOCS / "capabilities.md").read_text()
    elsewhere = {"PLUGIN_API", "UNQUANTIZED", "Plan", "SharedExperts", "hookimpl"}
    documented = set(re.findall(r"moe_core\.(\w+)$", api, re.MULTILINE))
    documented |= set(re.findall(r"^## `(\w+)`", capabilities, re.MULTILINE))
    errors = {name for name in moe_core.__all__ if inspect.isclass(getattr(moe_core, name)) and "Error" in name}
    assert set(moe_core.__all__) - errors - elsewhere <= documented


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
