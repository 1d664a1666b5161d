"""Each distribution is whole on its own: built, installed alone beside the core, found at run time."""

from __future__ import annotations

import zipfile


def test_wheel_holds_its_package_and_nothing_else(project, wheels):
    names = zipfile.ZipFile(wheels[project.distribution]).namelist()
    outside = [name for name in names if not name.startswith(f"{project.package}/") and ".dist-info/" not in name]
    assert not outside, f"{project}: files outside the package {project.package}: {outside}"
    names = [name for name in names if "/cli/template/" not in name]  # what `new-plugin` writes has tests of its own
    tests = [name for name in names if "/tests/" in name or name.rsplit("/")[-1].startswith(("test_", "conftest"))]
    assert not tests, f"{project}: tests ride along in the wheel: {tests}"


def test_core_wheel_is_typed_and_licensed(core, wheels):
    names = zipfile.ZipFile(wheels[core.distribution]).namelist()
    assert "moe_core/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_metadata_states_what_the_documentation_promises(project, wheels):
    with zipfile.ZipFile(wheels[project.distribution]) as wheel:
        (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        lines = wheel.read(metadata).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert "Requires-Python: >=3.10" in lines
    assert not [line for line in required if "triton" in line], "a plain triton would overwrite the one torch brought"
    if project.package != "moe_core":
        assert any(line.startswith("Requires-Dist: moe-core") for line in required), required


def test_core_alone_has_its_built_in_backends(core, wheels, third_party_python, run, list_plugins):
    run(third_party_python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", wheels[core.distribution])
    records = list_plugins(third_party_python)
    assert records, "the built-in backends come through the same hooks and are listed"
    assert {record["status"] for record in records} == {"loaded"}, records
    assert {record["distribution"] for record in records} <= {core.distribution, None}, records


def test_plugin_alone_with_the_core_is_discovered(plugin, core, wheels, third_party_python, run, list_plugins):
    ours = [wheels[core.distribution], wheels[plugin.distribution]]
    run(third_party_python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *ours)
    where = run(third_party_python, "-c", f"import moe_core, {plugin.package}; print({plugin.package}.__file__)")
    assert str(third_party_python.parents[1]) in where, f"{plugin} was imported from elsewhere: {where}"

    records = list_plugins(third_party_python)
    found = {record["name"]: record for record in records if record["distribution"] == plugin.distribution}
    assert sorted(found) == sorted(plugin.entry_points)
    for record in found.values():
        assert record["status"] == "loaded", record
        assert record["version"] == wheels[plugin.distribution].name.split("-")[1]
        assert record["registers"], f"{plugin} registers nothing: {record}"
    others = {record["distribution"] for record in records} - {core.distribution, plugin.distribution, None}
    assert not others, f"the environment was to hold no other plugin, and has {others}"
