"""The checks of `moe-core doctor`. Each one is guarded: a check that breaks is a finding, not the end of the report."""

from __future__ import annotations

import enum
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import attrs
import torch
import torch.distributed as dist

import moe_core
from moe_core.cli.backends import usable
from moe_core.hookspecs import ENTRY_POINT_GROUP
from moe_core.plugins import PluginRecord, PluginStatus

_IMPORT_SECONDS = 120
_OPTIONAL = {
    "transformers": 'the run, explain and demo commands need it: pip install "moe-core[hf]"',
    "safetensors": 'checkpoints are read with it: pip install "moe-core[hf]"',
}
_IMPORT_PLUGIN = """
import importlib, importlib.util, sys
name = sys.argv[1]
module = importlib.import_module(name)
available = []
def register(name, factory, capabilities, probe=None, priority=0):
    try:
        available.append(probe is None or probe().ok)
    except Exception:
        available.append(False)
for kind in ("prepare_finalize", "experts"):
    getattr(module, "moe_core_register_" + kind, lambda register: None)(register)
vendor = name.partition(".")[0] + "._vendor_api"
if importlib.util.find_spec(vendor) is not None and (any(available) or not available):
    importlib.import_module(vendor)
    print("vendor")
"""
"""A plugin imports its vendor library in the file `_vendor_api.py` of its package and nowhere else. Where all of its
backends say that they can't run here, the library is not asked to load: the listing has their reasons."""


class Rank(enum.Enum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    """Something is not there that one may want."""
    FAIL = "fail"
    """Something that is there does not work."""


@attrs.frozen
class Check:
    """One line of the report: what was looked at, what was found, and what to do about it."""

    name: str
    rank: Rank
    found: str
    hint: str = ""


def run_checks() -> list[Check]:
    """Every check, in the order in which they are read: interpreter, libraries, devices, plugins, a layer that runs."""
    checks: list[Check] = []
    for group in (_versions, _triton, _devices, _links, _imports, _plugins, _layer):
        checks += _guarded(group)
    return checks


def _guarded(group: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from group()
    except Exception as error:  # noqa: BLE001 - the report must go on, whatever is broken
        name = group.__name__.strip("_")
        yield Check(name, Rank.FAIL, f"the check itself raised {type(error).__name__}: {error}", "report this")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Check]:
    yield Check("moe-core", Rank.OK, f"{moe_core.__version__}, plugin API {'.'.join(map(str, moe_core.PLUGIN_API))}")
    yield Check("python", Rank.OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU only"
    yield Check("torch", Rank.OK, f"{torch.__version__} ({build}), {torch.get_num_threads()} threads")
    for distribution, hint in _OPTIONAL.items():
        version = _version(distribution)
        yield Check(
            distribution, Rank.OK if version else Rank.WARN, version or "not installed", "" if version else hint
        )


def _triton() -> Iterator[Check]:
    """Its version alone: the import, which can take seconds, is left to the backends that use it."""
    version = _version("triton")
    if version is not None:
        yield Check("triton", Rank.OK, version)
        return
    gpu_build = torch.version.cuda or torch.version.hip
    hint = (
        "this torch build brings its own triton, and it is gone: pip install --force-reinstall torch"
        if gpu_build
        else "the Triton backends need it: pip install triton (GPU builds of torch bring it along)"
    )
    yield Check("triton", Rank.FAIL if gpu_build else Rank.WARN, "not installed", hint)


def _devices() -> Iterator[Check]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            yield Check(f"cuda:{index}", Rank.OK, f"{name}, compute capability {major}.{minor}")
    elif torch.version.cuda or torch.version.hip:
        hint = "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
        yield Check("cuda", Rank.WARN, "this torch is built for GPUs and sees none", hint)
    else:
        yield Check("cuda", Rank.OK, "no GPU build of torch: everything runs on the CPU")


def _links() -> Iterator[Check]:
    """What carries tensors between ranks: torch's own libraries, and memory of one device that another can reach."""
    if not dist.is_available():
        yield Check("torch.distributed", Rank.WARN, "not in this build of torch", "layers run on one rank only")
        return
    yield Check("gloo", *_answer(dist.is_gloo_available(), "between CPUs", "not in this build of torch"))
    devices = torch.cuda.device_count()
    if not devices:
        return
    nccl = dist.is_nccl_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if nccl else ""
    hint = "" if nccl else "install a build of torch with it: dispatch between GPUs by torch.distributed needs it"
    yield Check("nccl", *_answer(nccl, f"{version}, between GPUs", "not in this build of torch"), hint)
    pairs = [(i, j) for i in range(devices) for j in range(devices) if i != j]
    if not pairs:
        yield Check("peer access", Rank.OK, "one GPU is visible, so nothing to reach")
        return
    apart = [f"cuda:{i} to cuda:{j}" for i, j in pairs if not torch.cuda.can_device_access_peer(i, j)]
    hint = "dispatch over NVLink or Infinity Fabric needs it; see nvidia-smi topo -p2p r, or rocm-smi --showtopo"
    found = f"all {devices} GPUs reach each other's memory"
    yield Check("peer access", *_answer(not apart, found, f"none from {', '.join(apart)}"), hint if apart else "")


def _answer(good: bool, found: str, missing: str) -> tuple[Rank, str]:
    return (Rank.OK, found) if good else (Rank.WARN, missing)


def _imports() -> Iterator[Check]:
    """Import each installed plugin, and its vendor library, in a process of its own."""
    found = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    for entry_point in sorted(found, key=lambda item: item.name):
        name = f"import {entry_point.name}"
        brings = entry_point.dist.name if entry_point.dist else entry_point.module
        command = [sys.executable, "-c", _IMPORT_PLUGIN, entry_point.module]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS)
        except subprocess.TimeoutExpired:
            hint = f"reinstall or remove {brings}"
            yield Check(name, Rank.FAIL, f"{entry_point.module} did not import in {_IMPORT_SECONDS} s", hint)
            continue
        if done.returncode == 0:
            vendor = " with its vendor library" if "vendor" in done.stdout.split() else ""
            yield Check(name, Rank.OK, f"{entry_point.module} imports{vendor}")
            continue
        if done.returncode < 0:  # it would take this process with it, so it is kept out of the listing below
            blocked = os.environ.get("MOE_CORE_DISABLE_PLUGINS", "")
            os.environ["MOE_CORE_DISABLE_PLUGINS"] = f"{blocked},{entry_point.name}".strip(",")
            said = f"it died of {signal.Signals(-done.returncode).name}"
        else:
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield Check(name, Rank.FAIL, f"{entry_point.module}: {said}", f"reinstall or remove {brings}")


def _plugins() -> Iterator[Check]:
    for record in moe_core.plugins():
        yield from _plugin(record)


def _plugin(record: PluginRecord) -> Iterator[Check]:
    name = f"plugin {record.name}"
    if record.status is PluginStatus.DISABLED:
        yield Check(name, Rank.WARN, f"{record.label}: disabled {record.reason}")
    elif record.status is not PluginStatus.LOADED:
        found, _, hint = record.reason.rpartition("; ")
        yield Check(
            name, Rank.FAIL, f"{record.label}: {record.status}: {found or record.reason}", hint if found else ""
        )
    else:
        items = usable(record)
        yield Check(name, Rank.OK, f"{record.label}: {', '.join(item.item for item in items) or 'registers nothing'}")
        for item in items:
            if not item.ok:
                yield Check(item.item, Rank.WARN, f"not usable here: {item.reason}")


def _layer() -> Iterator[Check]:
    """The whole way once: plan, build, load and run a small layer, and hold it against the dense reference."""
    from moe_core.cli.self_test import largest_error  # noqa: PLC0415 - a broken core is this check's finding

    error, plan = largest_error()
    says = f"{plan.dispatch.name} + {plan.ranges[0].candidate.name} on cpu: differs from the reference by {error:.1e}"
    good = error < 1e-4
    yield Check("a small layer", Rank.OK if good else Rank.FAIL, says, "" if good else "report this")
