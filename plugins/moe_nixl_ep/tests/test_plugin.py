"""What moe-nixl-ep declares, and what it says where NIXL EP can't run. The stand-ins for its wheels are files alone."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from moe_core.config import MoEConfig, MoEParallelConfig, Problem
from moe_core.quant import QuantScheme, QuantSpec
from moe_core.types import MODEL_DTYPE_PAYLOAD, Device
from moe_nixl_ep import availability, buffers, emulation, limits

CONFIG = MoEConfig(
    num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048, max_tokens_per_rank=128, dtype=torch.bfloat16
)
OWN_TOKENS = MoEParallelConfig.fold(dp_size=4, expert_parallel=True)
FP8 = QuantSpec("float8_e4m3fn", (1, 128), dynamic=True)
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
TORCH = "".join(torch.__version__.split(".")[:2])


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put packages with these files where they are found, in a torch that says it is built for CUDA 13."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(availability, "_DRIVER", "libc.so.6")

    def make(**files: list[str]) -> Path:
        for package, names in files.items():
            (tmp_path / package).mkdir()
            for name in ["__init__.py", *names]:
                (tmp_path / package / name).write_text("raise AssertionError('a probe imports no vendor library')")
        return tmp_path

    return make


@pytest.mark.parametrize(
    "files",
    [
        {"nixl_ep_cu13": [f"nixl_ep_cpp_torch{TORCH}{SUFFIX}", f"nixl_ep_cpp_torch999{SUFFIX}"]},
        {"nixl_ep_cu13": [f"nixl_ep_cpp{SUFFIX}"]},
        {"nixl_ep": [f"nixl_ep_cpp{SUFFIX}"]},
        {"nixl_ep": [], "nixl_ep_cu13": [f"nixl_ep_cpp_torch{TORCH}{SUFFIX}"]},
    ],
    ids=["1.4", "1.3", "1.1", "the package that chooses"],
)
def test_a_wheel_that_fits_is_found_by_its_files(packages, files):
    packages(**files)
    assert availability.probe().ok, availability.probe().reason


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "the library is not installed: pip install nixl-cu13"),
        ({"nixl_ep": []}, "nixl_ep is installed without its CUDA part: pip install nixl-cu13"),
        (
            {"nixl_ep_cu13": [f"nixl_ep_cpp_torch999{SUFFIX}"]},
            f"nixl_ep_cu13 holds nixl_ep_cpp_torch999{SUFFIX}, and none is for torch {torch.__version__}, Python",
        ),
        ({"nixl_ep_cu13": [f"nixl_ep_cpp_torch{TORCH}.cpython-39.so"]}, "nixl_ep_cu13 holds nixl_ep_cpp_torch"),
    ],
    ids=["nothing", "no backend", "another torch", "another Python"],
)
def test_a_wheel_that_does_not_fit_is_named(packages, files, said):
    packages(**files)
    availability_here = availability.probe()
    assert not availability_here.ok
    assert availability_here.reason.startswith(said)
    assert "\n" not in availability_here.reason


def test_everything_that_is_missing_stands_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(availability, "_DRIVER", "libdriver_of_nobody.so.1")
    reason = availability.probe().reason
    assert "is built for ROCm; the library is not installed: pip install nixl-cu13; there is no NVIDIA driver" in reason


def test_a_listing_imports_neither_the_library_nor_the_adapter():
    code = (
        "import sys, moe_nixl_ep.plugin as p; p.probe(); "
        "print([m for m in sys.modules if m.startswith(('nixl', 'moe_nixl_ep.prepare', 'moe_nixl_ep._v'))])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def import_vendor(packages: Callable[..., Path]) -> Iterator[Callable[[], Any]]:
    """Imports `_vendor_api` anew, and forgets it and the stand-ins afterwards."""

    def forget() -> None:
        for name in ("moe_nixl_ep._vendor_api", "nixl_ep_cu13", "nixl_ep"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()

    def load() -> Any:
        forget()
        return importlib.import_module("moe_nixl_ep._vendor_api")

    yield load
    forget()


def test_the_build_imports_the_first_module_that_loads_or_says_why_none_does(packages, import_vendor, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the stand-ins change within one tick of the clock
    folder = packages(nixl_ep_cu13=[], nixl_ep=[])
    (folder / "nixl_ep_cu13" / "__init__.py").write_text("raise ImportError('libcuda.so.1: cannot open')")
    (folder / "nixl_ep" / "__init__.py").write_text("topk_idx_t = None")
    assert import_vendor().module.__name__ == "nixl_ep"
    (folder / "nixl_ep" / "__init__.py").write_text("raise OSError('no backend')")
    wanted = "NIXL EP can't be imported: nixl_ep_cu13: libcuda.so.1: cannot open; nixl_ep: no backend"
    with pytest.raises(ImportError, match=re.escape(wanted)):
        import_vendor()


@pytest.mark.parametrize(
    ("version", "hidden", "sizes", "topk"),
    [(None, 3500, 4096, 11), ((1, 4, 0), 3500, 4096, 11), ((1, 5, 1), 3500, 3584, 16), ((1, 5, 1), 7168, 7168, 16)],
)
def test_limits_by_version(version, hidden, sizes, topk):
    known = limits.limits_of(version)
    assert (limits.wire_hidden(hidden, known), known.max_topk) == (sizes, topk)


def test_slots_are_a_multiple_of_four_over_all_ranks():
    for ranks in (1, 2, 3, 4, 6, 8, 16):
        for tokens in range(1, 40):
            slots = limits.slots_per_rank(tokens, ranks)
            assert slots * ranks % 4 == 0
            assert tokens <= slots < tokens + 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": Device("cuda", (9, 4), "AMD Instinct MI300X")}, "runs on NVIDIA GPUs, not on AMD Instinct MI300X"),
        ({"parallel": MoEParallelConfig(ep_size=4)}, "all 4 ranks have the same tokens"),
        ({"parallel": MoEParallelConfig.fold(dp_size=12, expert_parallel=True)}, "ep_size = 12: .* multiples of 8"),
        ({"hidden_size": 8200}, "hidden size 8200: at most 8192"),
        ({"top_k": 12}, "top_k = 12: at most 11"),
        ({"num_experts": 2048}, "num_experts = 2048: at most 1848"),
        (
            {"scheme": QuantScheme("fp8_block", FP8, attrs.evolve(FP8, group_shape=(1, 64)))},
            "scheme fp8_block with groups of 64: the library quantizes groups of 128",
        ),
    ],
    ids=str,
)
def test_what_the_library_cannot_do_is_refused(changes, said):
    own = {"parallel": OWN_TOKENS, "device": Device("cuda", (9, 0), "NVIDIA H200")}
    own |= {k: v for k, v in changes.items() if k in ("parallel", "scheme", "device")}
    config = attrs.evolve(CONFIG, **{k: v for k, v in changes.items() if k not in own})
    reason = limits.refuse(Problem(config=config, **own), limits.limits_of((1, 4)))
    assert reason is not None
    assert re.search(said, reason), reason
    fine = Problem(config=CONFIG, parallel=OWN_TOKENS)
    assert limits.refuse(fine, limits.limits_of(None)) is None


def test_the_buffer_is_as_large_as_the_library_says():
    """1.9 GB a rank for DeepSeek-V3's sizes: the figure that the library's own hint gives."""
    assert limits.buffer_bytes(128, 7168, 256) == 256 * 128 * (2 * 7168 + 7168 // 32) * 4 + 2 * 2048


def test_bytes_of_a_step_follow_the_choices():
    problem = Problem(config=CONFIG, parallel=OWN_TOKENS)
    plain = limits.footprint(problem, MODEL_DTYPE_PAYLOAD, 64, limits.limits_of(None))
    fp8 = limits.footprint(problem, "fp8_block", 64, limits.limits_of(None))
    assert plain.rows == 4 * 128
    assert plain.combine_wire_bytes == fp8.combine_wire_bytes == 64 * 8 * 3 // 4 * 7168 * 2
    assert plain.dispatch_wire_bytes == 64 * 8 * 3 // 4 * (7168 * 2 + 16)
    assert fp8.dispatch_wire_bytes == 64 * 8 * 3 // 4 * (7168 + 56 * 4 + 16)
    assert not plain.own_output
    padded = Problem(config=attrs.evolve(CONFIG, hidden_size=2880), parallel=OWN_TOKENS)
    assert limits.footprint(padded, MODEL_DTYPE_PAYLOAD, 64, limits.limits_of(None)).own_output


@pytest.mark.parametrize(
    ("devices", "version", "preset", "wanted"),
    [
        ([], (1, 4, 0), {}, {"UCX_TLS": "cuda_copy,cuda_ipc,sm,self", "UCX_RESOLVE_REMOTE_EP_ID": "y"}),
        ([], (1, 5, 1), {}, {"UCX_TLS": "cuda_copy,cuda_ipc,sm,self"}),
        ([], (1, 4, 0), {"UCX_TLS": "all"}, {"UCX_TLS": "all", "UCX_RESOLVE_REMOTE_EP_ID": "y"}),
        (["mlx5_0"], (1, 4, 0), {}, {}),
    ],
    ids=["no NIC", "a mended version", "the user's own", "with a NIC"],
)
def test_transport_is_chosen_where_only_nvlink_is(monkeypatch, devices, version, preset, wanted):
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(devices))
    for name in ("UCX_TLS", "UCX_RESOLVE_REMOTE_EP_ID"):
        monkeypatch.setenv(name, preset.get(name, ""))
        if name not in preset:
            monkeypatch.delenv(name)
    buffers.choose_transport(version)
    assert {name: os.environ[name] for name in ("UCX_TLS", "UCX_RESOLVE_REMOTE_EP_ID") if name in os.environ} == wanted


SIGNATURES = {
    "__init__": "disable_ll_nvlink explicitly_destroy rank low_latency_mode group comm tcp_store_group timeout_ms",
    "low_latency_dispatch": "x topk_idx num_max_dispatch_tokens_per_rank num_experts "
    "cumulative_local_expert_recv_stats dispatch_wait_recv_cost_stats use_fp8 round_scale use_ue8m0 async_finish "
    "return_recv_hook",
    "low_latency_combine": "x topk_idx topk_weights handle use_logfmt zero_copy async_finish return_recv_hook out "
    "combine_wait_recv_cost_stats",
    "update_memory_buffers": "num_ranks num_experts_per_rank num_rdma_bytes num_nvl_bytes",
    "connect_ranks": "remote_ranks activate",
    "query_mask_buffer": "mask_status",
    "get_low_latency_buffer_size_hint": "num_max_dispatch_tokens_per_rank hidden num_ranks num_experts",
    "destroy": "",
}
"""Parameters of `nixl_ep.Buffer` in all of 1.1.0 to 1.5.1, in their order."""


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_emulation_has_the_librarys_signatures(name):
    """So a call of the adapter that the emulation takes binds to the library's."""
    found: dict[str, Any] = dict(inspect.signature(getattr(emulation.Buffer, name)).parameters)
    found.pop("self", None)
    assert list(found) == SIGNATURES[name].split()
