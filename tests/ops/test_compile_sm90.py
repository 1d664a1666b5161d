"""Every kernel of every path compiles for sm_90 on a machine without a GPU."""

import os
from dataclasses import replace

import pytest
import torch

from moe_core.ops import (
    Activation,
    AlternatingConfig,
    BatchedExpertsLauncher,
    ExpertsLauncher,
    GroupedConfig,
    RouteSpec,
    ScanConfig,
    SlotsConfig,
    TileConfig,
)

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

UP, DOWN = TileConfig(128, 128, 64, 8, 4, 64), TileConfig(128, 256, 64, 8, 4, 64)
CONFIGS = {
    "slots": SlotsConfig(2, 1024, 4, 2, 256, 4, 1),
    "scan": ScanConfig(TileConfig(16, 32, 128, 4, 4), TileConfig(16, 64, 128, 4, 3)),
    "by_slot": ScanConfig(TileConfig(16, 32, 128, 4, 4), TileConfig(16, 64, 128, 4, 3), by_slot=True),
    "maps": GroupedConfig(UP, DOWN),
    "tall": GroupedConfig(replace(UP, tall=True), replace(DOWN, tall=True)),
    "keep": GroupedConfig(UP, DOWN, pdl=False, keep_x=True),
    "pointers": GroupedConfig(TileConfig(64, 64, 64, 4, 3, tma=False), TileConfig(64, 128, 64, 4, 3, tma=False)),
}
SHARED_MEMORY = 227 * 1024  # of one Hopper multiprocessor's program


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    # A cache of its own: a hit would prove nothing about this tree's kernels.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from moe_core.ops._compile import compile_only

    with compile_only(90) as kernels:
        yield kernels


def weights(experts=8, hidden=2880, intermediate=1408, transposed=False):
    def meta(*shape):
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16)

    if transposed:
        w13, w2 = (
            meta(experts, hidden, 2 * intermediate).transpose(1, 2),
            meta(experts, intermediate, hidden).transpose(1, 2),
        )
        return {"w13": w13, "w2": w2, "bias13": meta(experts, 2 * intermediate), "bias2": meta(experts, hidden)}
    return {"w13": meta(experts, 2 * intermediate, hidden), "w2": meta(experts, hidden, intermediate)}


def step(launcher, tokens, hidden=2880, top_k=4):
    space = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (shape, dtype) in launcher.workspace(tokens).items()
    }
    x = torch.empty(tokens, hidden, device="meta", dtype=torch.bfloat16)
    ids = torch.empty(tokens, top_k, device="meta", dtype=torch.int32)
    launcher(x, ids, torch.empty(tokens, top_k, device="meta"), space, torch.empty_like(x))


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("path", CONFIGS)
def test_experts_paths(compiled, path, transposed):
    activation = Activation("swiglu_oai", "interleaved", limit=7.0) if transposed else Activation()
    launcher = ExpertsLauncher(
        **weights(transposed=transposed), top_k=4, activation=activation, plan=((None, CONFIGS[path]),)
    )
    step(launcher, 8)
    assert len(compiled) == {"slots": 2, "scan": 3, "by_slot": 2, "maps": 4, "tall": 4, "keep": 4, "pointers": 4}[path]
    assert all(kernel.metadata.shared <= SHARED_MEMORY for kernel in compiled)
    assert all(kernel.asm["cubin"] for kernel in compiled)
    assert ("evict_last" in compiled[0].asm["ptx"]) == (path == "keep")
    if path in ("maps", "tall"):
        # The tensor-map box of both halves feeds the matrix unit from shared memory, not through registers.
        text = compiled[1].asm["ttgir"]
        assert "warp_group_dot" in text
        assert "ttg.local_load" not in text


@pytest.mark.parametrize("sizes", [(128, 2, 2), (256, 1, 2)])
def test_two_warpgroups_in_turns(compiled, sizes):
    config = GroupedConfig(UP, AlternatingConfig(*sizes))
    launcher = ExpertsLauncher(**weights(intermediate=256), top_k=4, activation=Activation(), plan=((None, config),))
    step(launcher, 4096)
    assert compiled[2].metadata.shared <= SHARED_MEMORY
    assert "setmaxnreg" in compiled[2].asm["ptx"]


@pytest.mark.parametrize("columns", [64, 128, 256])
def test_row_pieces_cover_a_tile_once_and_keep_rows_in_their_warp(columns):
    from moe_core.ops._grouped import _row_pieces

    layout = _row_pieces(columns)
    bases = [*layout.reg_bases, *layout.lane_bases, *layout.warp_bases]
    places = [(0, 0)]
    for row, column in bases:
        places += [(r + row, c + column) for r, c in places]
    assert sorted(places) == [(r, c) for r in range(64) for c in range(columns)]
    # The accumulator's layout gives 16 rows to each warp.
    assert layout.warp_bases == [[16, 0], [32, 0]]
    assert layout.reg_bases[:3] == [[0, 1], [0, 2], [0, 4]]


def test_batched(compiled):
    launcher = BatchedExpertsLauncher(**weights(), activation=Activation())
    shapes = launcher.workspace(128)
    space = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
    x = torch.empty(8, 128, 2880, device="meta", dtype=torch.bfloat16)
    launcher(x, torch.empty(8, dtype=torch.int32, device="meta"), space, torch.empty_like(x))
    assert len(compiled) == 3


def test_routing(compiled):
    from moe_core.ops.routing import _prepared

    logits = torch.empty(64, 256, device="meta")
    launch = _prepared(RouteSpec(8, "sigmoid", True, 1e-20, 8, 4), 256, torch.device("meta"))
    ids, router = torch.empty(64, 8, dtype=torch.int64, device="meta"), torch.empty(64, 8, device="meta")
    launch((64, 1, 1), None, logits, torch.empty(256, device="meta"), ids, router, 256, 1e-20)
    assert compiled[0].asm["cubin"]
