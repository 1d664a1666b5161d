"""What moe-symm declares, and what it says where it can't run."""

from __future__ import annotations

import subprocess
import sys

import attrs
import pytest
import torch

import moe_core
from moe_core.config import MoEConfig, MoEParallelConfig, Problem
from moe_core.quant import UNQUANTIZED, QuantScheme, QuantSpec
from moe_core.types import MODEL_DTYPE_PAYLOAD, Device
from moe_symm import availability, emulation, limits
from moe_symm.availability import Host
from moe_symm.layout import Form

CONFIG = MoEConfig(
    num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048, max_tokens_per_rank=128, dtype=torch.bfloat16
)
H200 = Device("cuda", (9, 0), "NVIDIA H200")


GROUPS_OF_64, GROUPS_OF_128 = (QuantSpec("float8_e4m3fn", (1, columns), dynamic=True) for columns in (64, 128))
FP8 = QuantScheme("fp8_block", activation=GROUPS_OF_128)


def problem(
    ranks: int = 4, *, device: Device = H200, own_tokens: bool = True, scheme: QuantScheme = UNQUANTIZED
) -> Problem:
    sizes = {"dp_size": ranks} if own_tokens else {"tp_size": ranks}
    parallel = MoEParallelConfig.fold(**sizes, expert_parallel=True)
    return Problem(config=CONFIG, parallel=parallel, scheme=scheme, device=device)


@pytest.mark.parametrize(
    ("asked", "host", "reason"),
    [
        (problem(), Host(4), None),
        (problem(), Host(), None),
        (problem(8), Host(4), r"ep_size = 8, and this host has 4 GPUs: all ranks must be on one host"),
        (problem(own_tokens=False), Host(8), "all 4 ranks have the same tokens"),
        (problem(device=Device("cuda", (9, 4), "AMD Instinct MI300X")), Host(8), "runs on NVIDIA GPUs"),
        (problem(scheme=FP8), Host(4), None),
        (problem(scheme=attrs.evolve(FP8, activation=GROUPS_OF_64)), Host(4), "groups of 64"),
    ],
)
def test_what_is_refused_and_why(asked, host, reason):
    said = limits.refuse(asked, host)
    assert said is None if reason is None else reason in said


def test_the_probe_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(availability, "this_host", lambda: Host(2, (0, 1)))
    monkeypatch.setattr(availability.ctypes, "CDLL", lambda name: None)
    assert availability.probe().reason == "GPUs 0 and 1 have no peer access to each other"
    monkeypatch.setattr(availability, "this_host", lambda: Host(0))
    assert availability.probe().reason == "there is no NVIDIA GPU"
    monkeypatch.setattr(availability, "this_host", lambda: Host(2))
    assert availability.probe().ok
    monkeypatch.setattr(availability.importlib.util, "find_spec", lambda name: None)
    assert "there is no torch.distributed._symmetric_memory and no triton" in availability.probe().reason
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "needs torch for CUDA" in availability.probe().reason


def test_a_host_without_the_management_library_rules_nothing_out(monkeypatch):
    monkeypatch.setattr(availability, "_MANAGEMENT", "libthere-is-none.so")
    assert availability.this_host.__wrapped__() == Host()


def test_a_listing_imports_no_kernels_and_starts_no_cuda():
    code = (
        "import sys, torch, moe_core\n"
        "from moe_symm import plugin\n"
        "plugin.probe()\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not {'triton', 'moe_symm.peers', 'torch.distributed._symmetric_memory'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_the_footprint_is_what_is_allocated():
    found = limits.footprint_of(Form.STANDARD)(problem(), MODEL_DTYPE_PAYLOAD, 128)
    layout = limits.layout_of(problem())
    assert found.rows == 4 * 128
    assert found.buffer_bytes == layout.total_bytes
    assert found.held_bytes == 0
    arriving = 3 * 128 * (1 - (192 / 256) ** 8)  # draws with replacement are nearly those without
    assert found.combine_wire_bytes == pytest.approx(arriving * 7168 * 2, rel=0.01)
    assert found.dispatch_wire_bytes == pytest.approx(arriving * (7168 * 2 + 8 * 8), rel=0.01)


def test_the_footprint_of_experts_rows():
    found = limits.footprint_of(Form.EXACT)(problem(), "fp8_block", 128)
    assert found.rows == 4 * 128
    assert found.held_bytes == 64 * (512 * (7168 + 56 * 4) + 4)
    assert found.combine_wire_bytes == 3 * 128 * 8 // 4 * 7168 * 2


@pytest.fixture
def emulated():
    moe_core.register_plugin(emulation)
    yield
    moe_core.unregister_plugin(emulation.__name__)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dispatch", ["symm_emulated", "symm_batched_emulated", "symm_exact_emulated"])
def test_a_layer_over_the_emulation_gives_one_rank_s_numbers(dispatch):
    from moe_core.testing.virtual import run_on_ranks

    config = attrs.evolve(CONFIG, num_experts=8, top_k=3, hidden_size=24, intermediate_size=16, max_tokens_per_rank=6)
    config = attrs.evolve(config, dtype=torch.float32)
    weights = torch.Generator().manual_seed(0)
    drawn = {
        (expert, name): torch.randn(shape, generator=weights)
        for expert in range(8)
        for name, shape in {"gate": (16, 24), "up": (16, 24), "down": (24, 16)}.items()
    }
    inputs = [torch.randn(tokens, 24, generator=weights) for tokens in (6, 0, 3)]
    logits = [torch.randn(len(x), 8, generator=weights) for x in inputs]

    def load(layer):
        for expert in layer.routed_experts.expert_map.local_experts:
            for name in ("gate", "up", "down"):
                layer.routed_experts.load_expert(expert, name, drawn[expert, name])
        layer.routed_experts.pack_weights()
        return layer

    def work(group):
        parallel = MoEParallelConfig.fold(dp_size=3, dp_rank=group.rank, expert_parallel=True)
        arguments = {"parallel": parallel, "group": group, "dispatch": dispatch, "device": "cpu"}
        layer = load(moe_core.build_runner(config, **arguments))
        out = layer(inputs[group.rank], router_logits=logits[group.rank])
        layer.check()
        return out

    single = load(moe_core.build_runner(config, device="cpu"))
    for rank, out in enumerate(run_on_ranks(3, work)):
        torch.testing.assert_close(out, single(inputs[rank], router_logits=logits[rank]), rtol=1e-5, atol=1e-5)
