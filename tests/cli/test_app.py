"""What all commands share: help, missing extras, errors."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMANDS = ["plugins", "doctor", "explain", "run", "demo"]
WITHOUT = (
    "import sys; sys.modules[{package!r}] = None; sys.argv[1:] = {arguments}; from moe_core.cli import main; main()"
)


def without(package, *arguments):
    """The command line in a process that can't import a package."""
    code = WITHOUT.format(package=package, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("package", ["click", "rich"])
def test_missing_extra_names_the_pip_command(package):
    done = without(package, "plugins")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == f'moe-core: the command line needs {package}: pip install "moe-core[cli]"'


def test_missing_transformers_names_the_pip_command(tmp_path):
    done = without("transformers", "demo", "--keep", str(tmp_path / "new"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == 'Error: this command needs transformers: pip install "moe-core[hf]"'


def test_help(invoke):
    text = invoke("--help").stdout
    for command in COMMANDS:
        assert command in text
        help_text = invoke(command, "--help")
        assert help_text.exit_code == 0
        assert "--json" in help_text.stdout


def test_version(process):
    done = process("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("moe-core, version ")


def test_traceback_on_request(invoke, tmp_path):
    with pytest.raises(Exception, match="does not exist"):
        invoke("--traceback", "run", tmp_path / "nowhere")


def test_the_command_line_imports_no_transformers():
    code = "import sys, moe_core.cli.app; sys.exit('transformers' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0
