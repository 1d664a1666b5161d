"""What an author does: a package is built, installed beside the core in a clean environment, and passes the kit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from moe_core.cli.new_plugin import write_plugin
from moe_core.errors import MoEError

EXAMPLE = Path(__file__).parents[2] / "examples" / "acme_backend"


@pytest.fixture
def install(core, wheels, third_party_python, run, tmp_path):
    """Build a project's wheel as an author would, and install it beside the core's."""

    def install(folder: Path) -> None:
        built = tmp_path / "built"
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", built, folder)
        (wheel,) = built.glob("*.whl")
        run(
            third_party_python,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            wheels[core.distribution],
            wheel,
        )

    return install


def conformance(run, python, *names: str) -> dict[str, str]:
    """Subject → verdict, as `moe-core conformance` in that environment has it."""
    verdicts = {}
    for name in names:
        report = Path(python).parents[2] / "report.json"
        run(python, "-m", "moe_core", "conformance", name, "--ranks", "2", "--json", report)
        told = json.loads(report.read_text())
        for each in told:
            verdicts[each["subject"]] = each["verdict"]
    return verdicts


def test_the_example_package_is_built_installed_and_conforms(install, third_party_python, run, list_plugins):
    install(EXAMPLE)
    listed = {record["name"]: record for record in list_plugins(third_party_python)}
    assert listed["acme-gather"]["registers"] == ["dispatch:gather_all"]
    assert listed["acme-loop"]["registers"] == ["experts:acme_loop"]
    verdicts = conformance(run, third_party_python, "gather_all", "acme_loop")
    assert len(verdicts) == 2
    assert set(verdicts.values()) == {"conforms"}


@pytest.mark.parametrize("kind", ["dispatch", "experts", "quant", "router", "runner"])
def test_a_new_plugin_is_found_and_its_own_tests_pass(kind, install, third_party_python, run, list_plugins, tmp_path):
    folder = write_plugin("acme_ring", kind, tmp_path)
    install(folder)
    (found,) = [record for record in list_plugins(third_party_python) if record["name"] == "acme_ring"]
    assert (found["status"], found["distribution"]) == ("loaded", folder.name)
    output = run(third_party_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder / "tests")
    assert " passed" in output


def test_a_folder_that_exists_is_not_overwritten(tmp_path):
    write_plugin("acme", "experts", tmp_path)
    with pytest.raises(MoEError, match="exists already"):
        write_plugin("acme", "experts", tmp_path)


@pytest.mark.parametrize("name", ["Acme", "acme-ring", "class", "1st", ""])
def test_a_name_that_is_no_package_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="Python name"):
        write_plugin(name, "quant", tmp_path)


def test_a_name_that_is_taken_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'local'; a plugin that is installed registers this dispatch already"):
        write_plugin("local", "dispatch", tmp_path)
