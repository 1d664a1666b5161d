"""Every FP8 kernel of every path compiles for sm_90 on a machine without a GPU."""

import os

import pytest
import torch
from fp8_case import SCHEMES

from moe_core.ops import (
    Activation,
    AlternatingConfig,
    Fp8BatchedLauncher,
    Fp8ExpertsLauncher,
    Fp8GroupedConfig,
    Fp8SpecializedConfig,
    Fp8StreamConfig,
    Fp8Weights,
    ScanConfig,
    SlotsConfig,
    TileConfig,
)
from quant_fp8.formats import format_of

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

TILE = TileConfig(128, 128, 128, 8, 3, small_m=64)
CONFIGS = {
    "slots": SlotsConfig(2, 1024, 2, 4, 256, 4),
    "scan": ScanConfig(TileConfig(16, 32, 128, 4, 5), TileConfig(16, 128, 128, 4, 4)),
    "by_slot": ScanConfig(TileConfig(16, 32, 128, 4, 5), TileConfig(16, 64, 128, 2, 4), by_slot=True),
    "specialized": Fp8GroupedConfig(Fp8SpecializedConfig(), Fp8SpecializedConfig(), pdl=False),
    "turns": Fp8GroupedConfig(Fp8SpecializedConfig(5, 1, 64), Fp8SpecializedConfig(5, 1, 64)),
    "halves": Fp8GroupedConfig(*[Fp8SpecializedConfig(4, 1, 64, halves=True)] * 2),
    "stream": Fp8StreamConfig(),
    "grouped": Fp8GroupedConfig(TILE, TileConfig(64, 128, 128, 4, 3)),
}
SHARED_MEMORY = 227 * 1024  # of one Hopper multiprocessor's program
H, I, E, K = 2048, 768, 8, 4


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    # A cache of its own: a hit would prove nothing about this tree's kernels.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from moe_core.ops._compile import compile_only

    with compile_only(90) as kernels:
        yield kernels


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def weights(scheme, I=I):
    form = format_of(SCHEMES[scheme])
    fp8 = torch.float8_e4m3fn
    scales = {
        "block": (meta(E, 2, I // 128, H // 128), meta(E, H // 128, I // 128)),
        "tensor": (meta(E, 2, 1, 1), meta(E, 1, 1)),
        "channel": (meta(E, 2 * I, 1), meta(E, H, 1)),
    }[form.weights]
    static = (meta(E, 2), meta(E, 1)) if form.activations == "static" else (None, None)
    return Fp8Weights(
        meta(E, 2 * I, H, dtype=fp8), meta(E, H, I, dtype=fp8), *scales, form, Activation(), None, None, *static
    )


def space(shapes):
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}


PATHS = [
    ("fp8_block", "slots", 2), ("fp8_block", "by_slot", 4), ("fp8_block", "grouped", 5),
    ("fp8_block", "specialized", 5), ("fp8_block", "turns", 5), ("fp8_block", "halves", 5), ("fp8_block", "stream", 2),
    ("fp8_tensor", "slots", 2), ("fp8_tensor_dynamic", "grouped", 10), ("weight_only_block", "grouped", 4),
]  # fmt: skip
MORE = [
    ("fp8_block", "scan", 5), ("fp8_tensor", "scan", 4), ("fp8_tensor", "grouped", 5), ("fp8_channel", "slots", 2),
    ("fp8_channel", "stream", 2), ("fp8_tensor", "stream", 2),
    ("fp8_channel", "by_slot", 4), ("fp8_channel", "specialized", 6), ("fp8_channel", "grouped", 6),
    ("fp8_weight_only", "scan", 3),
]  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "path", "kernels"), PATHS + [pytest.param(*more, marks=pytest.mark.full) for more in MORE]
)
def test_paths(compiled, scheme, path, kernels):
    launcher = Fp8ExpertsLauncher(weights(scheme), top_k=K, dtype=torch.bfloat16, plan=((None, CONFIGS[path]),))
    x, ids = meta(8, H, dtype=torch.bfloat16), meta(8, K, dtype=torch.int32)
    launcher(x, ids, meta(8, K), space(launcher.workspace(8)), torch.empty_like(x))
    assert len(compiled) == kernels
    assert all(kernel.metadata.shared <= SHARED_MEMORY and kernel.asm["cubin"] for kernel in compiled)
    if path == "grouped" and "weight_only" not in scheme:
        gemms = [kernel for kernel in compiled if kernel.name == "fp8_gemm_kernel"]
        # e4m3 goes from shared memory to the matrix unit as it is
        assert len(gemms) == 2
        assert all("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in kernel.asm["ptx"] for kernel in gemms)


@pytest.mark.parametrize(("up", "inner"), [
    (TILE, 256), (CONFIGS["turns"].up, 256), pytest.param(TILE, 128, marks=pytest.mark.full),
], ids=["plain", "early", "one_block"])  # fmt: skip
def test_alternating(compiled, up, inner):
    config = Fp8GroupedConfig(up, AlternatingConfig(256, 2, 4))
    launcher = Fp8ExpertsLauncher(weights("fp8_block", inner), top_k=K, dtype=torch.bfloat16, plan=((None, config),))
    x, ids = meta(8, H, dtype=torch.bfloat16), meta(8, K, dtype=torch.int32)
    launcher(x, ids, meta(8, K), space(launcher.workspace(8)), torch.empty_like(x))
    (down,) = [kernel for kernel in compiled if kernel.name == "fp8_alternating_down_kernel"]
    assert down.metadata.shared <= SHARED_MEMORY
    assert "STL" not in down.asm["sass"]  # its sums stay in registers
    # A plain kernel lets it come before it is known where rows end.
    assert ("griddepcontrol.wait" in down.asm["ptx"]) == (up is not TILE)


@pytest.mark.parametrize("scheme", ["fp8_tensor", pytest.param("fp8_block", marks=pytest.mark.full)])
def test_batched(compiled, scheme):
    launcher = Fp8BatchedLauncher(weights(scheme), dtype=torch.bfloat16)
    x = meta(E, 128, H, dtype=torch.bfloat16)
    launcher(x, meta(E, dtype=torch.int32), space(launcher.workspace(128)), torch.empty_like(x))
    assert all(kernel.asm["cubin"] for kernel in compiled)


def inner_loops(sass, instruction):
    """The shortest loop around each `instruction`."""
    lines = sass.splitlines()
    labels = {line.rstrip(":"): at for at, line in enumerate(lines) if line.startswith("LBB")}
    jumps = [(line.split("BRA ")[1].rstrip(";"), at) for at, line in enumerate(lines) if "BRA LBB" in line]
    # A label may be missing: of a jump past the last instruction.
    ends = [(labels[label], at) for label, at in jumps if label in labels]
    for at, line in enumerate(lines):
        if instruction in line:
            yield min((lines[first:end] for first, end in ends if first <= at < end), key=len)


@pytest.mark.parametrize("path", ["specialized", "turns"])
def test_loading_warps_give_their_registers_to_those_that_multiply(compiled, path):
    launcher = Fp8ExpertsLauncher(weights("fp8_block"), top_k=K, dtype=torch.bfloat16, plan=((None, CONFIGS[path]),))
    x, ids = meta(8, H, dtype=torch.bfloat16), meta(8, K, dtype=torch.int32)
    launcher(x, ids, meta(8, K), space(launcher.workspace(8)), torch.empty_like(x))
    gemms = [kernel for kernel in compiled if kernel.name == "fp8_specialized_kernel"]
    assert len(gemms) == 2
    for kernel, registers in zip(gemms, (224, 232), strict=True):
        assert f"setmaxnreg.inc.sync.aligned.u32 \t{registers}" in kernel.asm["ptx"]
        # And these are enough: sums that go through memory would cost what the second group of warps hides.
        loops = list(inner_loops(kernel.asm["sass"], "QGMMA"))
        assert len(loops) == 2 * 2 * 4  # groups, blocks, products of 32 columns
        assert not any("STL" in line or "LDL" in line for loop in loops for line in loop)


def test_given_rows_from_any_byte_on_compile(compiled):
    """The compiler knows of a pointer that it is a multiple of 16, or nothing."""
    for path in ("turns", "halves"):
        config = CONFIGS[path]
        launcher = Fp8ExpertsLauncher(weights("fp8_block"), top_k=K, dtype=torch.bfloat16, plan=((None, config),))
        out, ids = meta(8, H, dtype=torch.bfloat16), meta(8, K, dtype=torch.int32)
        for first in (0, 1, 4, 8):
            x = meta(8, H + 8, dtype=torch.float8_e4m3fn)[:, first : first + H]
            launcher(x, ids, meta(8, K), space(launcher.workspace(8)), out, None, meta(8, -(-H // 128)))
    assert all(kernel.asm["cubin"] for kernel in compiled)


def test_halves_are_for_blocks():
    config = CONFIGS["halves"]
    launcher = Fp8ExpertsLauncher(weights("fp8_channel"), top_k=K, dtype=torch.bfloat16, plan=((None, config),))
    out, ids = meta(8, H, dtype=torch.bfloat16), meta(8, K, dtype=torch.int32)
    with pytest.raises(ValueError, match="halves are for weights and activations in blocks"):
        launcher(out, ids, meta(8, K), space(launcher.workspace(8)), out)


def test_a_kernels_key_does_not_hang_on_what_was_compiled_before():
    from moe_core.ops._kernels.fp8_halves import fp8_specialized_halves_kernel
    from moe_core.ops._kernels.fp8_specialized import fp8_specialized_kernel

    for kernel in (fp8_specialized_halves_kernel, fp8_specialized_kernel):
        first = kernel.cache_key
        kernel.hash = None  # as if it came last: all functions that it calls have keys by now
        assert kernel.cache_key == first
