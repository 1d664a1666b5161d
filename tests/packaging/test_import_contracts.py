"""The import contracts bite: each one breaks when an import that it forbids is planted in a copy of the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

LINT_IMPORTS = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]

PLANTED = [
    ("moe_core/kernel.py", "import moe_core.runner", "The core in layers"),
    ("moe_core/types.py", "from moe_core import config", "The core in layers"),
    ("moe_core/ops/__init__.py", "from moe_core.types import Routing", "The core in layers"),
    ("moe_core/builtin/__init__.py", "import moe_core.runner", "The core in layers"),
    ("moe_core/stray.py", "", "The core in layers"),
    ("moe_core/select.py", "import moe_core.builtin", "Built-in backends are loaded by module name"),
    ("moe_core/ops/__init__.py", "import attrs", "ops imports only torch and triton"),
    ("moe_core/reference.py", "import moe_core.quant", "The reference is plain torch"),
    ("moe_core/runner.py", "import moe_batched", "The core imports no plugin"),
    ("moe_core/plugins.py", "def later():\n    import mori", "The core imports no plugin"),
    ("moe_core/build.py", "import transformers", "Only the bridge and the command line know transformers"),
    ("moe_batched/__init__.py", "import moe_second", "Plugins are independent of one another"),
]


@pytest.fixture
def copied_sources(tmp_path: Path, root: Path, plugins) -> Path:
    """Every package side by side in one folder, with the root's settings and a second plugin, `moe_second`."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "moe_core", tmp_path / "moe_core", ignore=ignore)
    for plugin in plugins:
        shutil.copytree(plugin.folder / plugin.package, tmp_path / plugin.package, ignore=ignore)
    (tmp_path / "moe_second").mkdir()
    (tmp_path / "moe_second" / "__init__.py").write_text("")
    settings = (root / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(settings.replace('    "moe_batched",', '    "moe_batched", "moe_second",'))
    return tmp_path


@pytest.fixture
def lint_imports(copied_sources: Path) -> Callable[[], subprocess.CompletedProcess[str]]:
    def lint_imports() -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(copied_sources), "COLUMNS": "200"}
        return subprocess.run(
            LINT_IMPORTS, cwd=copied_sources, env=environment, capture_output=True, text=True, timeout=110
        )

    return lint_imports


def test_contracts_hold(lint_imports):
    done = lint_imports()
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("file", "statement", "contract"), PLANTED)
def test_planted_import_breaks_its_contract(file, statement, contract, copied_sources, lint_imports):
    path = copied_sources / file
    path.write_text(f"{path.read_text() if path.exists() else ''}\n{statement}\n")
    done = lint_imports()
    broken = [line for line in done.stdout.splitlines() if " BROKEN" in line]
    assert done.returncode != 0
    assert any(line.startswith(contract) for line in broken), done.stdout + done.stderr


def test_every_plugin_is_under_the_contracts(settings, plugins):
    linter = settings["tool"]["importlinter"]
    contracts = {contract["name"]: contract for contract in linter["contracts"]}
    lists = {
        "root_packages": linter["root_packages"],
        "independence": contracts["Plugins are independent of one another"]["modules"],
        "forbidden": contracts["The core imports no plugin, no vendor library and no engine"]["forbidden_modules"],
    }
    missing = [(p.package, name) for p in plugins for name, packages in lists.items() if p.package not in packages]
    assert not missing, f"add to pyproject.toml, import-linter: {missing}"
