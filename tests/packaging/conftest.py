"""The projects of this repository, their wheels (built once for all test workers) and a way to run Python apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Project:
    """One distribution of this repository."""

    folder: Path
    distribution: str
    package: str
    entry_points: dict[str, str]

    def __str__(self) -> str:
        return self.distribution


def read_project(folder: Path) -> Project:
    settings = tomllib.loads((folder / "pyproject.toml").read_text())
    (package,) = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    project = settings["project"]
    entry_points = project.get("entry-points", {}).get("moe_core.plugins", {})
    return Project(folder, project["name"], package, entry_points)


CORE = read_project(ROOT)
PLUGINS = [read_project(path.parent) for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that takes `plugin` one run for each plugin of the repository, and `project` also for the core."""
    if "plugin" in metafunc.fixturenames:
        metafunc.parametrize("plugin", PLUGINS, ids=str)
    if "project" in metafunc.fixturenames:
        metafunc.parametrize("project", [CORE, *PLUGINS], ids=str)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def core() -> Project:
    return CORE


@pytest.fixture(scope="session")
def plugins() -> list[Project]:
    return PLUGINS


@pytest.fixture(scope="session")
def settings() -> dict[str, Any]:
    """The root pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without what would make another Python see or choose our plugins differently."""
    dropped = ("PYTHONPATH", "MOE_CORE_PLUGINS", "MOE_CORE_DISABLE_PLUGINS", "PYTEST_XDIST_WORKER")
    return {name: value for name, value in os.environ.items() if name not in dropped} | variables


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Run a command in an empty folder, so that nothing is imported from the checkout by chance; give its output."""

    def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd or tmp_path,
            env=clean_environment(**variables),
            capture_output=True,
            text=True,
            timeout=110,
        )
        assert done.returncode == 0, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


LISTING = """
import json, sys
import moe_core
{before}
fields = ("name", "distribution", "version", "status", "reason", "registers")
print(json.dumps([{{field: getattr(record, field) for field in fields}} for record in moe_core.plugins()]))
"""


@pytest.fixture
def list_plugins(run: Callable[..., str]) -> Callable[..., list[dict[str, Any]]]:
    """What `moe_core.plugins()` says in a fresh process; `before` runs there ahead of it."""

    def list_plugins(python: str | Path = sys.executable, before: str = "", **variables: str) -> list[dict[str, Any]]:
        output = run(python, "-c", LISTING.format(before=before), **variables)
        records: list[dict[str, Any]] = json.loads(output.splitlines()[-1])
        return records

    return list_plugins


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Distribution → its wheel, built with what this environment has (no isolation, so no download)."""
    worker = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp().parent if worker else tmp_path_factory.getbasetemp()
    folder = base / "wheels"
    with filelock.FileLock(base / "wheels.lock"):
        if not folder.exists():
            build_wheels(base / "unfinished")
            (base / "unfinished").rename(folder)
    return {project.distribution: find_wheel(folder, project) for project in [CORE, *PLUGINS]}


def build_wheels(folder: Path) -> None:
    for project in [CORE, *PLUGINS]:
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
        done = subprocess.run([*command, str(project.folder)], capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, f"the wheel of {project} was not built\n{done.stdout}\n{done.stderr}"


def find_wheel(folder: Path, project: Project) -> Path:
    (wheel,) = folder.glob(f"{project.distribution.replace('-', '_')}-*.whl")
    return wheel


@pytest.fixture
def third_party_python(tmp_path: Path) -> Path:
    """The Python of a fresh environment that has every third-party package of this one, and nothing of ours."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=110)
    (site,) = environment.glob("lib/python*/site-packages")
    for entry in Path(pytest.__file__).parents[1].iterdir():
        ours = entry.name.startswith(tuple({project.package for project in [CORE, *PLUGINS]} | {"moe_"}))
        # .pth files are what editable installs, ours among them, leave behind.
        if not ours and entry.suffix != ".pth" and entry.name != "__pycache__":
            (site / entry.name).symlink_to(entry)
    return environment / "bin" / "python"
