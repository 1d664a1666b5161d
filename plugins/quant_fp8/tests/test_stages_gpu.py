"""Each stage of the FP8 step on a Hopper GPU, held to its own arithmetic on what the stage before really gave.

A whole step says little about a code between the GEMMs that is off by one: here the codes themselves are compared.
S slots · I intermediate · H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fp8_case import OAI, Case, ids_of_rows, poisoned, relative_error

from moe_core import ActivationSpec
from moe_core.ops import (
    AlternatingConfig,
    Fp8BatchedLauncher,
    Fp8ExpertsLauncher,
    Fp8GroupedConfig,
    Fp8SpecializedConfig,
    Fp8StreamConfig,
    ScanConfig,
    SlotsConfig,
    TileConfig,
)
from tests.quant.hopper_fp8 import HopperStep, in_float64

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU (compute capability 9.0)")]

TALL = TileConfig(64, 128, 128, 4, 3, small_m=32, tma=True)
WARPS, TURNS = Fp8SpecializedConfig(), Fp8SpecializedConfig(5, 1, 64)
HALVES = Fp8SpecializedConfig(4, 1, 64, halves=True)
NARROW = TileConfig(64, 64, 128, 4, 3, tma=True)
PATHS = {
    "slots": SlotsConfig(2, 256, 2, 4, 128, 4),
    "scan": ScanConfig(TileConfig(16, 32, 128, 4, 4), TileConfig(16, 64, 128, 4, 4)),
    "grouped": Fp8GroupedConfig(TALL, TALL),
    "narrow": Fp8GroupedConfig(NARROW, NARROW),  # the quantization is a kernel of its own
    "specialized": Fp8GroupedConfig(WARPS, WARPS, pdl=False),
    "turns": Fp8GroupedConfig(TURNS, TURNS),
    "alternating": Fp8GroupedConfig(TALL, AlternatingConfig(256, 2, 2)),
    "all in turns": Fp8GroupedConfig(TURNS, AlternatingConfig(128, 3, 4)),
    "halves": Fp8GroupedConfig(HALVES, HALVES),
    "stream": Fp8StreamConfig(),
}
FEW = 0.001
"""Of all values: exp has other last bits here than in torch, so a few sums fall on the other side of a border."""


@dataclass
class Stages:
    """What one step left in its workspaces, rows in the order of `slots`; None: not written on this path."""

    step: HopperStep
    ids: torch.Tensor
    x: torch.Tensor
    router: torch.Tensor
    slots: torch.Tensor
    act: torch.Tensor | None
    codes: tuple[torch.Tensor, torch.Tensor | None] | None
    y: torch.Tensor | None
    out: torch.Tensor


def standard(case: Case, config: Any) -> Stages:
    record = case.record()
    launcher = Fp8ExpertsLauncher(case.weights(record), top_k=case.top_k, dtype=case.dtype, plan=((None, config),))
    x, ids, router = case.inputs()
    space = poisoned(launcher.workspace(case.tokens), "cuda")
    out = launcher(x, ids, router, space, torch.full_like(x, float("nan")))
    slots = (ids.flatten() >= 0).nonzero().flatten()
    rows = slots
    if isinstance(config, Fp8GroupedConfig):
        rows = space["row_of_slot"].long()[slots]
    elif isinstance(config, Fp8StreamConfig):
        rows = rows_of_units(ids, slots)
        del space["act_q"]  # its rows are quantized on their way to the matrix unit
    y = None if isinstance(config, SlotsConfig | Fp8StreamConfig) else space["y"][rows]
    return Stages(case.step(record, config), ids, x, router, slots, *between(space, rows), y, out)


def rows_of_units(ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Of each slot: T rows for every distinct expert, in the order of its first slot, one for each token."""
    chosen = ids.flatten()[slots].tolist()
    unit = {expert: number for number, expert in enumerate(dict.fromkeys(chosen))}
    tokens, top_k = ids.shape
    return torch.tensor([tokens * unit[expert] for expert in chosen], device=ids.device) + slots // top_k


def batched(case: Case, counts: tuple[int, ...], capacity: int) -> Stages:
    record = case.record()
    launcher = Fp8BatchedLauncher(case.weights(record), dtype=case.dtype)
    x = torch.randn(case.experts, capacity, case.hidden, generator=torch.Generator().manual_seed(7))
    x, count = x.to(case.dtype).cuda(), torch.tensor(counts, dtype=torch.int32, device="cuda")
    space = poisoned(launcher.workspace(capacity), "cuda")
    out = launcher(x, count, space, torch.zeros_like(x)).flatten(0, 1)
    ids = ids_of_rows(count, capacity)
    rows = (ids.flatten() >= 0).nonzero().flatten()
    step = case.step(record, launcher.config(capacity))
    ones = torch.ones(ids.shape, device="cuda")
    return Stages(step, ids, x.flatten(0, 1), ones, rows, *between(space, rows), out[rows], out)


def between(
    space: dict[str, torch.Tensor], rows: torch.Tensor
) -> tuple[torch.Tensor | None, tuple[torch.Tensor, torch.Tensor | None] | None]:
    """(act, its codes and scales), as far as the step has written them."""
    act, q, scale = space["act"][rows], space.get("act_q"), space.get("act_scale")
    written = q is not None and not bool(q[rows].to(torch.float32).isnan().any())
    codes = (q[rows], None if scale is None else scale[rows]) if q is not None and written else None
    return (None if bool(act.isnan().any()) else act), codes


def differing(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got != wanted).to(torch.float32).mean())


def check(found: Stages) -> None:
    step, ids, slots = found.step, found.ids, found.slots
    act = step.act(found.x, ids)
    if found.act is not None:
        assert differing(found.act, act[slots]) <= FEW
        assert relative_error(found.act, act[slots]) <= 1e-4
        act[slots] = found.act
    q, scale = step.codes(act, ids)
    if found.codes is not None:
        got, got_scale = found.codes
        assert differing(got.float(), q[slots].float()) <= (FEW if found.act is None else 0)
        q.view(torch.uint8)[slots] = got.view(torch.uint8)
        if got_scale is not None:
            assert differing(got_scale, scale[slots]) <= (FEW if found.act is None else 0)
            scale[slots] = got_scale
    y = step.y(q, scale, ids)
    if found.y is not None:
        y = y.to(step.config.dtype)
        assert differing(found.y, y[slots]) <= FEW
        y[slots] = found.y
    assert relative_error(found.out, step.out(y, ids, found.router)) <= 1e-4


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_block_ue8m0", "fp8_tensor", "fp8_tensor_dynamic", "fp8_channel"])
def test_every_stage(scheme, path):
    if path in ("alternating", "all in turns", "halves") and not scheme.startswith("fp8_block"):
        pytest.skip("takes blocks only")
    if scheme == "fp8_tensor_dynamic" and path in ("slots", "scan", "stream"):
        pytest.skip("the scale of an expert's rows needs them sorted")
    if scheme == "fp8_tensor" and path in ("specialized", "turns"):
        pytest.skip("gate and up may have different input scales")
    tokens = {"slots": 40, "scan": 40, "stream": 8}.get(
        path, 300
    )  # above, one to three tiles an expert, the last as it comes
    case = Case(scheme, tokens, hidden=272, experts=7, top_k=3, dtype=torch.bfloat16, device="cuda")
    check(standard(case, PATHS[path]))


@pytest.mark.parametrize("activation", [OAI, ActivationSpec("relu2", None)], ids=["oai", "relu2"])
def test_activations(activation):
    case = Case("fp8_channel", 300, activation=activation, dtype=torch.bfloat16, device="cuda")
    check(standard(case, PATHS["narrow"]))


@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_tensor", "fp8_tensor_dynamic", "fp8_channel"])
def test_batched(scheme):
    check(batched(Case(scheme, dtype=torch.bfloat16, device="cuda"), (0, 37, 5, 150, 1), 150))


def test_float32_sums_in_its_place_would_be_noticed():
    """Else the bounds above would be too wide to hold anything."""
    found = standard(Case("fp8_block", 300, experts=3, dtype=torch.bfloat16, device="cuda"), PATHS["specialized"])
    found.step = HopperStep(found.step.config, found.step.scheme, found.step.record, in_float64, in_float64)
    with pytest.raises(AssertionError):
        check(found)
