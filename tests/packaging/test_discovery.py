"""Discovery with real installed packages: a broken one says what is wrong with it, and never hides a good one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOOD = """
import moe_core, torch
moe_core_api = (1, 0)

def factory(*arguments, **keywords):
    raise AssertionError("a listing builds nothing")

@moe_core.hookimpl
def moe_core_register_prepare_finalize(register):
    capabilities = moe_core.DispatchCapabilities(
        activation_format=moe_core.ActivationFormat.STANDARD,
        dtypes=frozenset({torch.float32}),
        device_types=frozenset({"cpu"}),
    )
    register(__name__, factory, capabilities)
"""
MISSPELT = GOOD.replace("moe_core_register_prepare_finalize", "moe_core_register_expert")
TOO_NEW = GOOD.replace("(1, 0)", "(2, 0)")
MINOR_TOO_NEW = GOOD.replace("(1, 0)", "(1, 999)")
MISTYPED = GOOD.replace("frozenset({torch.float32})", "torch.float32")
UNMARKED = GOOD.replace("@moe_core.hookimpl\n", "")
AT_IMPORT = "import moe_core\nmoe_core.DispatchCapabilities(carry_tokens=True)"
NO_API = GOOD.replace("moe_core_api = (1, 0)", "")


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., None]:
    """Put a package where a fresh process finds it as installed: its module, and its metadata beside it."""

    def install(distribution: str, body: str, *, name: str | None = None, version: str = "1.2.3") -> None:
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(body)
        metadata = tmp_path / f"{module}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (metadata / "entry_points.txt").write_text(f"[moe_core.plugins]\n{name or module} = {module}\n")

    return install


@pytest.fixture
def listing(tmp_path: Path, list_plugins: Callable[..., Any]) -> Callable[..., dict[str, dict[str, Any]]]:
    """Distribution → record, as a fresh process lists it."""

    def listing(**arguments: str) -> dict[str, dict[str, Any]]:
        records = list_plugins(PYTHONPATH=str(tmp_path), **arguments)
        return {record["distribution"]: record for record in records}

    return listing


def assert_refused(record: dict[str, Any], status: str, *words: str) -> None:
    """Refused with that status, by a reason that holds all the words: who, what was wrong, what to do."""
    assert record["status"] == status, record
    assert not [word for word in words if word not in record["reason"]], record
    assert not record["registers"], record


def test_broken_plugins_are_listed_and_good_ones_load_beside_them(install, listing):
    install("acme-import", "import acme_vendor_that_is_not_here")
    install("acme-syntax", "def broken(:")
    install("acme-hook", MISSPELT)
    install("acme-mistyped", MISTYPED)
    install("acme-unmarked", UNMARKED)
    install("acme-at-import", AT_IMPORT)
    install("acme-major", TOO_NEW)
    install("acme-minor", MINOR_TOO_NEW)
    install("acme-silent", NO_API)
    install("acme-good", GOOD)
    install("zeta-good", GOOD)  # after every broken one in the order of discovery
    found = listing()

    assert_refused(found["acme-import"], "failed", "acme_import", "acme_vendor_that_is_not_here", "acme-import")
    assert_refused(found["acme-syntax"], "failed", "acme_syntax", "SyntaxError", "acme-syntax")
    assert_refused(
        found["acme-hook"], "failed", "acme_hook", "moe_core_register_expert", "moe_core_register_prepare_finalize"
    )
    mistyped = "DispatchCapabilities.dtypes = torch.float32; expected a frozenset of torch.dtype"
    assert_refused(found["acme-mistyped"], "failed", "acme_mistyped.py:10: ", mistyped, "docs/capabilities.md")
    assert_refused(found["acme-unmarked"], "failed", "without @moe_core.hookimpl", "docs/hooks.md")
    assert_refused(found["acme-at-import"], "failed", "acme_at_import.py:2: ", "'carry_tokens'", "carries_tokens?")
    assert not [d for d in ("acme-mistyped", "acme-at-import") if "reinstall" in found[d]["reason"]]
    assert_refused(found["acme-major"], "incompatible", "(2, 0)", "(1, 0)", "pip install")
    assert_refused(found["acme-minor"], "incompatible", "(1, 999)", "pip install", "docs/stability.md")
    assert_refused(found["acme-silent"], "incompatible", "acme_silent", "moe_core_api")
    for distribution in ("acme-good", "zeta-good"):
        record = found[distribution]
        assert (record["status"], record["version"], record["reason"]) == ("loaded", "1.2.3", "")
        assert record["registers"] == [f"dispatch:{record['name']}"]


def test_plugin_that_exits_does_not_end_the_process(install, listing):
    """Vendor libraries do so when a licence or a device is missing."""
    install("acme-exit", "raise SystemExit('no licence here')")
    install("zeta-good", GOOD)
    found = listing()
    assert_refused(found["acme-exit"], "failed", "acme_exit", "no licence here")
    assert found["zeta-good"]["status"] == "loaded"


def test_second_plugin_of_a_name_is_a_duplicate(install, listing):
    install("acme-first", GOOD, name="acme")
    install("acme-second", GOOD, name="acme")
    found = listing()
    assert found["acme-first"]["status"] == "loaded"
    assert_refused(found["acme-second"], "duplicate", "'acme'", "acme-first", "pip uninstall")


def test_second_backend_of_a_name_fails_its_whole_plugin(install, listing):
    same_name = GOOD.replace("register(__name__,", "register('acme',")
    install("acme-first", same_name)
    install("acme-second", same_name)
    found = listing()
    assert found["acme-first"]["registers"] == ["dispatch:acme"]
    assert_refused(found["acme-second"], "failed", "acme_second", "'acme'", "acme-first")


def test_environment_blocks_a_plugin(install, listing):
    install("acme-one", GOOD)
    install("acme-two", "raise AssertionError('a blocked plugin is not imported')")
    found = listing(MOE_CORE_DISABLE_PLUGINS="acme_two, acme_three")
    assert found["acme-one"]["status"] == "loaded"
    assert_refused(found["acme-two"], "disabled", "MOE_CORE_DISABLE_PLUGINS", "acme_two", "unset")


def test_environment_chooses_the_plugins(install, listing):
    for distribution in ("acme-one", "acme-two", "acme-three"):
        install(distribution, GOOD)
    found = listing(MOE_CORE_PLUGINS="acme_one,acme_two", MOE_CORE_DISABLE_PLUGINS="acme_two")
    assert found["acme-one"]["status"] == "loaded"
    assert_refused(found["acme-two"], "disabled", "MOE_CORE_DISABLE_PLUGINS")
    assert_refused(found["acme-three"], "disabled", "MOE_CORE_PLUGINS=acme_one,acme_two")


def test_empty_choice_loads_no_installed_plugin(install, listing):
    install("acme-one", GOOD)
    found = listing(MOE_CORE_PLUGINS="")
    assert_refused(found["acme-one"], "disabled", "MOE_CORE_PLUGINS")
    assert found["moe-core"]["status"] == "loaded", "what ships with the core is not chosen by this variable"


def test_module_registered_in_process_is_listed(install, listing, tmp_path):
    (tmp_path / "notebook_backend.py").write_text(GOOD)
    install("acme-good", GOOD)
    found = listing(before="import notebook_backend; moe_core.register_plugin(notebook_backend)")
    assert found["acme-good"]["status"] == "loaded"
    (record,) = [record for record in found.values() if record["name"] == "notebook_backend"]
    assert (record["status"], record["registers"]) == ("loaded", ["dispatch:notebook_backend"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (TOO_NEW, ("notebook_backend", "(2, 0)", "pip install")),
        (MISSPELT, ("notebook_backend", "moe_core_register_expert")),
    ],
    ids=["api", "hook"],
)
def test_broken_module_registered_in_process_raises(body, words, run, tmp_path):
    (tmp_path / "notebook_backend.py").write_text(body)
    script = """
import sys, moe_core, notebook_backend
try:
    moe_core.register_plugin(notebook_backend)
except moe_core.PluginError as error:
    print(error)
"""
    output = run(sys.executable, "-c", script, PYTHONPATH=str(tmp_path))
    assert not [word for word in words if word not in output], output


def test_import_loads_no_plugin(install, run, tmp_path):
    install("acme-good", GOOD)
    output = run(
        sys.executable, "-c", "import sys, moe_core; print('acme_good' in sys.modules)", PYTHONPATH=str(tmp_path)
    )
    assert output.strip() == "False"
