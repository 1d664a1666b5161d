"""Every NVFP4 kernel compiles on a machine without a GPU: for sm_90, and what needs no Hopper for sm_80 too."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from moe_core.ops import Activation, Nvfp4BatchedLauncher, Nvfp4ExpertsLauncher, Nvfp4Weights, compile_only
from moe_core.ops._launch import AlternatingConfig
from moe_core.ops._nvfp4_launch import GemmTile, Nvfp4GemmConfig, Nvfp4RowsConfig, Nvfp4SlotsConfig, WarpsConfig

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

OAI = Activation("swiglu_oai", "interleaved", limit=7.0)
CONFIGS = {
    "slots": (Nvfp4SlotsConfig(WarpsConfig(1, 4, depth=2), WarpsConfig(1, 8)), 2),
    "slots together": (
        Nvfp4SlotsConfig(WarpsConfig(1, 2, registers=80, together=True), WarpsConfig(1, 8, depth=3, together=True)),
        2,
    ),
    "rows": (Nvfp4RowsConfig(WarpsConfig(4, 1, fenced=True), WarpsConfig(4, 1, tiles=4), 1), 4),
    "wide": (Nvfp4RowsConfig(WarpsConfig(8, 1, registers=128), WarpsConfig(2, 2, registers=128), 3), 4),
    "gemm": (Nvfp4GemmConfig(GemmTile(128), GemmTile(128)), 5),
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    # A cache of its own: a hit would prove nothing about this tree's kernels.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, device="meta", dtype=dtype)


def weights(activation, experts=8, hidden=2880, inner=1408):
    codes, halves = torch.uint8, 2 if activation.gated else 1
    bias = (meta(experts, halves * inner), meta(experts, hidden)) if activation is OAI else (None, None)
    up = halves * inner
    return Nvfp4Weights(
        meta(experts, up, hidden // 2, dtype=codes), meta(experts, up, hidden // 16, dtype=codes),
        meta(experts, halves, dtype=torch.float64), meta(experts, hidden, inner // 2, dtype=codes),
        meta(experts, hidden, inner // 16, dtype=codes), meta(experts, 1, dtype=torch.float64), activation, *bias,
    )  # fmt: skip


def step(activation, config, tokens=8):
    launcher = Nvfp4ExpertsLauncher(weights(activation), top_k=4, plan=((None, config),))
    space = {name: meta(*shape, dtype=dtype) for name, (shape, dtype) in launcher.workspace(tokens).items()}
    x, ids = meta(tokens, 2880), meta(tokens, 4, dtype=torch.int32)
    launcher(x, ids, meta(tokens, 4, dtype=torch.float32), space, meta(tokens, 2880))


def check_products_overlap(kernel):
    """Weights are expanded while a product runs. The assembler gives that up if it can't tell which registers a product
    under way reads, and says so only when asked: it then waits for every instruction, not once for a step's four."""
    assert "wgmma.wait_group.sync.aligned 1" in kernel.asm["ptx"]
    lines = kernel.asm["sass"].splitlines()
    assert sum("HGMMA" in line for line in lines) >= 3 * sum("WARPGROUP.DEPBAR" in line for line in lines)


def paths_and_activations():
    for path in CONFIGS:
        for name, activation in {"silu": Activation(), "oai": OAI, "relu2": Activation("relu2", None)}.items():
            slow = path == "gemm" and name == "silu"  # the simplest of three that take seconds each
            yield pytest.param(path, activation, id=f"{path}-{name}", marks=[pytest.mark.full] if slow else [])


@pytest.mark.parametrize(("path", "activation"), list(paths_and_activations()))
def test_paths(path, activation):
    config, launches = CONFIGS[path]
    with compile_only(90) as compiled:
        step(activation, config)
    assert len(compiled) == launches
    assert all(kernel.metadata.shared <= 227 * 1024 for kernel in compiled)
    products = [kernel for kernel in compiled if "mma" in kernel.asm["ptx"]]
    assert len(products) == 2
    for kernel in products:
        text = kernel.asm["ptx"]
        assert ".local" not in text, "no array lies in memory"
        if path == "gemm":
            # The expanded weights go from registers into the product: they never pass through shared memory.
            assert "wgmma.mma_async" in text
            assert "st.shared" not in text.split("wgmma.mma_async")[1]
            check_products_overlap(kernel)
        else:
            assert "v4" in text, "16 bytes a lane and load"


@pytest.mark.parametrize("path", ["slots", "rows"])
def test_without_hopper(path):
    with compile_only(80) as compiled:
        step(Activation(), dataclasses.replace(CONFIGS[path][0], pdl=False))
    assert "mma.sync" in "".join(kernel.asm["ptx"] for kernel in compiled)


@pytest.mark.parametrize(("capacity", "launches"), [(8, 2), (128, 6)])
def test_batched(capacity, launches):
    launcher = Nvfp4BatchedLauncher(weights(Activation()))
    space = {name: meta(*shape, dtype=dtype) for name, (shape, dtype) in launcher.workspace(capacity).items()}
    with compile_only(90) as compiled:
        launcher(meta(8, capacity, 2880), meta(8, dtype=torch.int32), space, meta(8, capacity, 2880))
    assert len(compiled) == launches


def test_alternating():
    packed = weights(Activation(), inner=256)
    plan = ((None, Nvfp4GemmConfig(GemmTile(128), AlternatingConfig(256, 1, 2))),)
    launcher = Nvfp4ExpertsLauncher(packed, top_k=4, plan=plan)
    space = {name: meta(*shape, dtype=dtype) for name, (shape, dtype) in launcher.workspace(300).items()}
    with compile_only(90) as compiled:
        launcher(meta(300, 2880), meta(300, 4, dtype=torch.int32), meta(300, 4, dtype=torch.float32), space,
                 meta(300, 2880))  # fmt: skip
    text = next(k.asm["ptx"] for k in compiled if "setmaxnreg" in k.asm["ptx"])
    assert "st.shared.v4" in text, "16 bytes of expanded weights at once"
    assert "fence.proxy.async" in text
    with pytest.raises(ValueError, match="power of 2"):
        step(Activation(), plan[0][1])


def test_a_kernels_key_does_not_hang_on_what_was_compiled_before():
    """Or one process would not find in Triton's cache what another one has compiled for it."""
    from moe_core.ops._kernels.nvfp4_gemm import nvfp4_gemm_kernel
    from moe_core.ops._kernels.nvfp4_rows import nvfp4_rows_kernel
    from moe_core.ops._kernels.nvfp4_slots import nvfp4_slots_down_kernel, nvfp4_slots_up_kernel

    for kernel in (nvfp4_slots_up_kernel, nvfp4_slots_down_kernel, nvfp4_rows_kernel, nvfp4_gemm_kernel):
        first = kernel.cache_key
        kernel.hash = None  # as if it came last: all functions that it calls have keys by now
        assert kernel.cache_key == first
