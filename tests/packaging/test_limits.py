"""Sizes that keep a file readable at one look, and nothing in the repository that only one machine has."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

FILE_LINES = 500
FUNCTION_LINES = 60
KERNEL_LINES = 120
# Records of measurements and tuned tables are data; nobody reads them from top to bottom.
DATA = {".json", ".csv"}
BINARY = {".safetensors"}
# Homes and work folders of some machine. Spelt in parts, because this file is searched too.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:" + "|".join(["home", "root", "Users", "work", "mnt"]) + r")/\w")


@pytest.fixture(scope="module")
def tracked_files(root: Path) -> list[Path]:
    """The text files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    files = [root / name for name in done.stdout.split("\0") if name]
    return [file for file in files if file.is_file() and file.suffix not in BINARY]


def long_functions(file: Path) -> Iterator[str]:
    kernels = {"_kernels", "kernels"} & set(file.parts)
    limit = KERNEL_LINES if kernels else FUNCTION_LINES
    lines = file.read_text().splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > limit and not re.search(r"# long: \w", lines[node.lineno - 1]):
                yield f"{file.name}:{node.lineno} {node.name}: {length} lines, limit {limit}"


def test_no_file_is_too_long(tracked_files, root):
    too_long = []
    for file in tracked_files:
        if file.suffix in DATA:
            continue
        lines = file.read_text().count("\n")
        if lines > FILE_LINES:
            too_long.append(f"{file.relative_to(root)}: {lines} lines, limit {FILE_LINES}")
    assert not too_long, "\n".join(too_long)


def test_no_function_is_too_long(tracked_files):
    """A longer one says why on its `def` line: `# long: reason`."""
    too_long = [found for file in tracked_files if file.suffix == ".py" for found in long_functions(file)]
    assert not too_long, "\n".join(too_long)


def test_no_path_of_a_machine(tracked_files, root):
    found = []
    for file in tracked_files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{file.relative_to(root)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
