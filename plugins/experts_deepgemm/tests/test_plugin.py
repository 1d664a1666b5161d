"""What is declared and refused, without the library: this runs on machines that could never load it."""

from __future__ import annotations

import inspect
import subprocess
import sys

import attrs
import pytest
import stand_in
import torch

import moe_core
from experts_deepgemm import availability
from moe_core import Device
from moe_core.config import ActivationSpec, MoEConfig
from moe_core.errors import UnsupportedError
from moe_core.plugins import registry
from moe_core.quant import UNQUANTIZED, QuantScheme, QuantSpec
from moe_core.tuned import Tuned, TunedFormat, TunedPoint
from moe_core.types import ActivationFormat, Availability, GateUpLayout

CONFIG = MoEConfig(num_experts=8, top_k=2, hidden_size=256, intermediate_size=128, dtype=torch.bfloat16)
HOPPER = Device("cuda", (9, 0), "NVIDIA H200")
FP8 = QuantScheme(
    "fp8_block", QuantSpec("float8_e4m3fn", (128, 128)), QuantSpec("float8_e4m3fn", (1, 128), dynamic=True)
)
SMALL_BLOCKS = QuantScheme(
    "fp8_block", QuantSpec("float8_e4m3fn", (64, 64)), QuantSpec("float8_e4m3fn", (1, 64), dynamic=True)
)


@pytest.fixture
def available(monkeypatch):
    """The library is declared to be here, and Triton too; planning imports neither."""
    found = registry().experts
    for name in {"deepgemm", "triton", "fp8_triton"} & found.keys():
        monkeypatch.setitem(found, name, attrs.evolve(found[name], probe=lambda: Availability(True)))


def test_listing_it_imports_no_vendor_library() -> None:
    code = "import sys, experts_deepgemm.plugin; print(sorted(m for m in sys.modules if 'gemm' in m or 'tvm' in m))"
    path = str(availability.Path(availability.__file__).parents[1])
    out = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"],
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert out.stdout.strip() == "['experts_deepgemm', 'experts_deepgemm.availability', 'experts_deepgemm.plugin']"


def test_where_it_cannot_run_the_table_says_what_would() -> None:
    if availability.probe().ok:
        pytest.skip("it can run here")
    with pytest.raises(UnsupportedError, match=r"known to run: sgl-deep-gemm 0\.1\.5 with torch 2\.11"):
        moe_core.plan(CONFIG, experts="deepgemm", device=HOPPER)


@pytest.mark.parametrize(
    ("torch_version", "cuda", "installed", "nvcc", "expected"),
    [
        ("2.11.0+cpu", None, {}, True, "built without CUDA"),
        ("2.13.0+cu130", "13.0", {}, True, "no wheel of sgl-deep-gemm is known to run with torch 2.13.0"),
        ("2.11.0+cu130", "13.0", {}, True, "sgl-deep-gemm is not installed: pip install sgl-deep-gemm==0.1.5"),
        ("2.11.0", "13.0", {"sgl-deep-gemm": "0.2.5"}, True, "sgl-deep-gemm 0.2.5 does not run with torch 2.11.0"),
        ("2.11.0", "13.0", {"sgl-deep-gemm": "0.1.5"}, True, "apache-tvm-ffi is not installed"),
        ("2.11.0", "13.0", {"sgl-deep-gemm": "0.1.5", "apache-tvm-ffi": "0.1.11"}, False, "there is no nvcc"),
        ("2.11.0", "13.0", {"sgl-deep-gemm": "0.1.5", "apache-tvm-ffi": "0.1.11"}, True, ""),
    ],
)
def test_the_probe_names_versions(monkeypatch, torch_version, cuda, installed, nvcc, expected) -> None:
    monkeypatch.setattr(availability.sys, "platform", "linux")
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(availability, "_installed", installed.get)
    monkeypatch.setattr(availability, "_nvcc", lambda: nvcc or None)
    found = availability.probe()
    assert found.ok is (expected == "")
    assert expected in found.reason


@pytest.mark.parametrize("scheme", [UNQUANTIZED, FP8], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("dispatch", ["local", "batched"])
def test_it_serves_both_formats_and_both_schemes(available, dispatch, scheme) -> None:
    plan = moe_core.plan(CONFIG, scheme=scheme, dispatch=dispatch, experts="deepgemm", device=HOPPER)
    assert plan.activation_format is (ActivationFormat.BATCHED if dispatch == "batched" else ActivationFormat.STANDARD)
    carried = scheme.name if scheme is FP8 and dispatch == "batched" else "model dtype"
    assert plan.payload == carried


def _with(**changes) -> MoEConfig:
    return attrs.evolve(CONFIG, **changes)


@pytest.mark.parametrize(
    ("config", "scheme", "device", "reason"),
    [
        (CONFIG, FP8, Device("cuda", (10, 0), "NVIDIA B200"), "written for compute capability 9.0"),
        (CONFIG, FP8, Device("cuda", (8, 0), "NVIDIA A100"), "needs compute capability 9.0"),
        (CONFIG, SMALL_BLOCKS, HOPPER, r"weight blocks of \(64, 64\)"),
        (_with(hidden_size=320), UNQUANTIZED, HOPPER, "hidden size 320: must be a multiple of 128"),
        (_with(intermediate_size=64), FP8, HOPPER, "intermediate size per rank 64: must be a multiple of 128"),
        (_with(dtype=torch.float16), UNQUANTIZED, HOPPER, "dtype float16"),
        (_with(activation=ActivationSpec(bias=True)), UNQUANTIZED, HOPPER, "expert biases are not supported"),
        (_with(activation=ActivationSpec("silu", GateUpLayout.INTERLEAVED)), FP8, HOPPER, "interleaved"),
    ],
)
def test_refusals(available, config, scheme, device, reason) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        moe_core.plan(config, scheme=scheme, dispatch="local", experts="deepgemm", device=device)


def test_calls_bind_to_the_signatures_of_the_wheel(monkeypatch) -> None:
    """The stand-in has the signatures of sgl-deep-gemm 0.1.5; each call of the shim must fit its function's."""
    module = stand_in.install(monkeypatch)
    calls = []

    def recorded(name, function):
        return lambda *args, **named: calls.append((name, inspect.signature(function).bind(*args, **named)))

    for name, function in inspect.getmembers(module, inspect.isfunction):
        if "gemm" in name:
            monkeypatch.setattr(module, name, recorded(name, function))
    from experts_deepgemm import _vendor_api as vendor

    vendor.check_alignment()
    w = torch.empty(2, 8, 4)
    vendor.contiguous_bf16("x", w, "out", "experts")
    vendor.contiguous_bf16("x", w.transpose(1, 2), "out", "experts")
    vendor.masked_bf16("x", "w", "out", "counts", 3)
    vendor.contiguous_fp8("x", "xs", "w", "ws", "out", "ends")
    vendor.masked_fp8("x", "xs", "w", "ws", "out", "counts", 3)
    bound = {name: dict(signature.arguments) for name, signature in calls}
    assert [name for name, _ in calls] == [
        "m_grouped_bf16_gemm_nt_contiguous", "m_grouped_bf16_gemm_nn_contiguous", "m_grouped_bf16_gemm_nt_masked",
        "m_grouped_fp8_gemm_nt_contiguous", "fp8_m_grouped_gemm_nt_masked",
    ]  # fmt: skip
    assert bound["m_grouped_bf16_gemm_nt_contiguous"] == {"a": "x", "b": w, "d": "out", "grouped_layout": "experts"}
    assert bound["m_grouped_fp8_gemm_nt_contiguous"] == {
        "a": ("x", "xs"), "b": ("w", "ws"), "d": "out", "grouped_layout": "ends", "disable_ue8m0_cast": True,
        "use_psum_layout": True,
    }  # fmt: skip
    assert bound["fp8_m_grouped_gemm_nt_masked"] == {
        "a": ("x", "xs"), "b": ("w", "ws"), "d": "out", "masked_m": "counts", "expected_m": 3,
        "disable_ue8m0_cast": True,
    }  # fmt: skip


@pytest.mark.parametrize(("scheme", "own"), [(UNQUANTIZED, "triton"), (FP8, "fp8_triton")], ids=["bf16", "fp8"])
def test_it_runs_in_the_ranges_where_it_was_measured_faster(available, monkeypatch, scheme, own) -> None:
    """Without a measurement the experts of higher priority run everywhere, and it is in the table as outranked."""
    if own not in registry().experts:
        pytest.skip("needs moe-quant-fp8")
    plan = moe_core.plan(CONFIG, scheme=scheme, dispatch="local", device=HOPPER)
    assert [item.candidate.name for item in plan.ranges] == [own]
    times = {1: (30.0, 90.0), 1024: (400.0, 410.0), 4096: (900.0, 700.0)}
    points = []
    for rows, (ours, theirs) in times.items():
        by_name = {own: ours, "deepgemm": theirs}
        points.append(TunedPoint(rows, {c.label: by_name.get(c.name, 5000.0) for c in plan.fitting}))
    measured = Tuned({ActivationFormat.STANDARD: TunedFormat(tuple(points))}, date="today", source="a test")
    monkeypatch.setattr("moe_core.build.read_tuned", lambda problem: measured)
    ranges = moe_core.plan(CONFIG, scheme=scheme, dispatch="local", device=HOPPER).ranges
    assert [item.candidate.name for item in ranges] == [own, "deepgemm"]
    assert 1024 < ranges[1].first_row <= 4096
