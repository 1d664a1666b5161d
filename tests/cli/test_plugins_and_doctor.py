"""`moe-core plugins` and `moe-core doctor`: everything is listed, what is broken too, with what to do."""

from __future__ import annotations

import json

import pytest

from moe_core.cli import checks
from moe_core.cli.checks import Rank

WORKS = "moe_core_api = (1, 0)\n"
BROKEN = "import a_vendor_library_that_is_not_there\n"
CRASHES = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
GPU_ONLY = """
import torch
from moe_core import ActivationFormat, Availability, DispatchCapabilities, hookimpl
moe_core_api = (1, 0)
CAPABILITIES = dict(activation_format=ActivationFormat.STANDARD, dtypes=frozenset({torch.float32}))

def probe_that_refuses():
    return Availability(False, "acme is not installed; pip install acme")

def probe_that_raises():
    raise OSError("no driver")

@hookimpl
def moe_core_register_prepare_finalize(register):
    for name, probe in (("quiet", probe_that_refuses), ("loud", probe_that_raises)):
        register(name, print, DispatchCapabilities(**CAPABILITIES, device_types=frozenset({"cpu"})), probe=probe)
    register("far", print, DispatchCapabilities(**CAPABILITIES, device_types=frozenset({"npu"})))
"""

NOT_HERE = "\n".join(line for line in GPU_ONLY.splitlines() if '"far"' not in line)


def test_plugins_lists_what_each_registers(invoke):
    result = invoke("plugins")
    assert result.exit_code == 0
    assert "dispatch:local" in result.stdout
    assert "experts:torch" in result.stdout
    listed = {plugin["name"]: plugin for plugin in json.loads(invoke("plugins", "--json").stdout)["plugins"]}
    assert listed["builtin"]["status"] == "loaded"
    assert {"item": "dispatch:local", "usable": True, "reason": ""} in listed["builtin"]["registers"]


def test_plugins_lists_the_broken_one(process, installed):
    site = installed("acme", BROKEN)
    done = process("plugins", path=site)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("acme"))
    assert "moe-acme 1.2" in line
    assert "failed" in line
    assert "No module named 'a_vendor_library_that_is_not_there'" in " ".join(done.stdout.split())
    (plugin,) = (
        p for p in json.loads(process("plugins", "--json", path=site).stdout)["plugins"] if p["name"] == "acme"
    )
    assert (plugin["status"], plugin["registers"]) == ("failed", [])
    assert "moe_acme.plugin raised ModuleNotFoundError" in plugin["reason"]


def test_a_name_that_a_failed_plugin_would_bring_is_told_with_its_reason(process, installed):
    site = installed("acme", GPU_ONLY.replace("frozenset({torch.float32})", "torch.float32"))
    said = " ".join(process("conformance", "quiet", path=site).stderr.split())
    assert "nothing is registered under the name 'quiet'; there are: " in said
    assert "plugin acme (moe-acme 1.2) is failed: moe_acme.plugin, hook moe_core_register_prepare_finalize" in said
    assert "DispatchCapabilities.dtypes = torch.float32; expected a frozenset of torch.dtype" in said


def test_a_plugin_that_registers_nothing_is_told_so(process, installed):
    listing = " ".join(process("plugins", path=installed("acme", WORKS)).stdout.split())
    assert "moe-acme 1.2 loaded nothing no: it has no hook that registers" in listing


def test_plugins_says_why_a_backend_cannot_be_used(process, installed):
    done = process("plugins", "--json", path=installed("acme", GPU_ONLY))
    (plugin,) = (p for p in json.loads(done.stdout)["plugins"] if p["name"] == "acme")
    reasons = {item["item"]: item["reason"] for item in plugin["registers"]}
    assert reasons["dispatch:quiet"] == "acme is not installed; pip install acme"
    assert reasons["dispatch:loud"] == "its probe raised OSError: no driver"
    assert reasons["dispatch:far"].startswith("runs on npu; here: cpu")


def test_doctor_is_content_here(invoke):
    result = invoke("doctor", "--json")
    found = {check["check"]: check for check in json.loads(result.stdout)["checks"]}
    assert result.exit_code == 0, result.stdout
    assert {"moe-core", "python", "torch", "transformers", "triton", "plugin builtin", "a small layer"} <= set(found)
    assert found["a small layer"]["rank"] == "ok"
    text = invoke("doctor")
    assert text.exit_code == 0
    assert "0 fail" in text.stdout


@pytest.mark.parametrize(
    ("source", "vendor", "said"),
    [
        (WORKS, BROKEN, "No module named 'a_vendor_library_that_is_not_there'"),
        (CRASHES, None, "it died of SIGSEGV"),
        (WORKS, CRASHES, "it died of SIGSEGV"),
    ],
    ids=["vendor library", "plugin crashes", "vendor library crashes"],
)
def test_doctor_fails_on_a_broken_plugin_and_goes_on(source, vendor, said, process, installed):
    site = installed("acme", source, **({"_vendor_api": vendor} if vendor else {}))
    done = process("doctor", "--json", path=site)
    assert done.returncode == 1, done.stderr
    found = {check["check"]: check for check in json.loads(done.stdout)["checks"]}
    check = found["import acme"]
    assert check["rank"] == "fail"
    assert said in check["found"]
    assert check["hint"] == "reinstall or remove moe-acme"
    assert found["a small layer"]["rank"] == "ok"


def test_doctor_imports_a_good_vendor_library(process, installed):
    done = process("doctor", "--json", path=installed("acme", WORKS, _vendor_api="import json\n"))
    found = {check["check"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0
    assert found["import acme"]["found"] == "moe_acme.plugin imports with its vendor library"


def test_doctor_does_not_load_a_vendor_library_that_no_backend_can_use(process, installed):
    """What is missing is said once, in the listing: it is no defect of the plugin."""
    site = installed("acme", NOT_HERE, _vendor_api=BROKEN)
    found = {check["check"]: check for check in json.loads(process("doctor", "--json", path=site).stdout)["checks"]}
    assert found["import acme"]["rank"] == "ok"
    assert found["import acme"]["found"] == "moe_acme.plugin imports"
    assert found["dispatch:quiet"]["rank"] == "warn"
    assert found["dispatch:quiet"]["found"] == "not usable here: acme is not installed; pip install acme"


@pytest.mark.parametrize(
    ("reachable", "rank", "said"),
    [
        (True, Rank.OK, "all 3 GPUs reach each other"),
        (False, Rank.WARN, "none from cuda:0 to cuda:2, cuda:2 to cuda:0"),
    ],
)
def test_doctor_looks_at_what_links_devices(monkeypatch, reachable, rank, said):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 28, 9))
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda i, j: reachable or {i, j} != {0, 2})
    found = {check.name: check for check in checks._links()}
    assert found["nccl"].found == "2.28.9, between GPUs"
    assert (found["peer access"].rank, bool(found["peer access"].hint)) == (rank, not reachable)
    assert found["peer access"].found.startswith(said)


def test_doctor_hints(monkeypatch):
    monkeypatch.setattr(checks, "_version", lambda distribution: None)
    found = {check.name: check for check in [*checks._versions(), *checks._triton()]}
    assert found["transformers"].rank is Rank.WARN
    assert 'pip install "moe-core[hf]"' in found["transformers"].hint
    assert "pip install" in found["triton"].hint
    assert "triton" in found["triton"].hint


def test_a_check_that_breaks_is_a_finding():
    def _broken():
        yield from ()
        raise RuntimeError("oh")

    (check,) = checks._guarded(_broken)
    assert (check.name, check.rank) == ("broken", Rank.FAIL)
    assert "RuntimeError: oh" in check.found
