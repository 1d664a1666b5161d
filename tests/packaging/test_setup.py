"""The set-up that every `make` task begins with: pinned, complete, repeated only when its inputs change."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """The files that decide about the set-up, and a virtual environment whose Python only writes down its calls."""
    for pattern in ("Makefile", "constraints*.txt", "pyproject.toml", "plugins/*/pyproject.toml"):
        for source in root.glob(pattern):
            target = tmp_path / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    script(tmp_path / ".venv" / "bin" / "python", 'echo "$@" >> calls')
    return tmp_path


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)


def test_second_setup_installs_nothing(checkout, plugins):
    python = f"PYTHON={sys.executable}"
    assert make(checkout, "setup", python).returncode == 0
    first = (checkout / "calls").read_text()
    installs = [call for call in first.splitlines() if "pip install" in call]
    assert installs
    assert all("-c constraints.txt" in call for call in installs), first
    assert all(f"-e ./plugins/{plugin.folder.name}" in first for plugin in plugins), first
    assert make(checkout, "setup", python).returncode == 0
    assert (checkout / "calls").read_text() == first
    os.utime(checkout / "constraints.txt", (4e9, 4e9))  # as if edited later
    assert make(checkout, "setup", python).returncode == 0
    assert (checkout / "calls").read_text() != first


def test_too_old_python_is_refused_by_name(checkout):
    old = checkout / "old-python"
    code = "import sys; sys.version_info = (3, 9, 18); sys.version = '3.9.18 (old)'"
    script(old, f"exec {sys.executable} -c \"{code}; exec(compile('$2', '-c', 'exec'))\"".replace("'$2'", "'''$2'''"))
    done = make(checkout, "setup", f"PYTHON={old}")
    assert done.returncode != 0
    assert "3.10 or newer" in done.stderr
    assert "3.9.18" in done.stderr
    assert not (checkout / "calls").exists()


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_every_requirement_is_pinned(name, root, settings):
    text = (root / name).read_text()
    pinned = set(re.findall(r"^([a-z0-9-]+)==", text, flags=re.MULTILINE))
    project = settings["project"]
    required = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = {re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower() for requirement in required}
    assert names <= pinned, f"{name} pins no version of {sorted(names - pinned)}"
    loose = [line for line in text.splitlines() if line and not line.startswith("#") and "==" not in line]
    assert not loose


def test_installed_versions_are_the_pinned_ones(root):
    """Nothing came into this environment past the constraints."""
    torch = Version(importlib.metadata.version("torch"))
    oldest = torch < Version("2.12")
    lines = (root / ("constraints-oldest.txt" if oldest else "constraints.txt")).read_text().splitlines()
    wrong = []
    for line in lines:
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is not None and not pin.marker.evaluate():
            continue
        try:
            installed = importlib.metadata.version(pin.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement of another build of torch
        if not pin.specifier.contains(installed):
            wrong.append(f"{pin}: {installed} is installed")
    assert not wrong, wrong
