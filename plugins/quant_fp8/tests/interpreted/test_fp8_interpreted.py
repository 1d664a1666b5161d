"""Every path of the FP8 step against the emulation, in the interpreter: ragged sizes, variants, poisoned memory."""

import dataclasses

import pytest
import torch
from fp8_case import OAI, SCHEMES, Case, check_row_quantizer, check_static_quantizer, relative_error, run, run_batched

from moe_core import ActivationSpec, GateUpLayout
from moe_core.ops import Fp8GroupedConfig, ScanConfig, SlotsConfig, TileConfig

MAPS = TileConfig(32, 128, 128, 4, 2, small_m=16, group=2)
NARROW = dataclasses.replace(MAPS, block_n=64, tma=False)
PATHS = {
    "slots": SlotsConfig(32, 128, 4, 32, 128, 4, pdl=False),
    "scan": ScanConfig(TileConfig(16, 64, 128, 4, 2), TileConfig(16, 64, 128, 4, 2), pdl=False),
    "by_slot": ScanConfig(TileConfig(16, 64, 128, 4, 2), TileConfig(16, 64, 128, 4, 2), by_slot=True, pdl=False),
    "maps": Fp8GroupedConfig(MAPS, MAPS, pdl=False),
    "pointers": Fp8GroupedConfig(NARROW, dataclasses.replace(NARROW, block_m=16, small_m=0), pdl=False),
}
VARIANTS = {
    "oai": {"activation": OAI, "top_k": 3},
    "up_gate": {"activation": ActivationSpec("gelu", GateUpLayout.UP_GATE, limit=0.7), "num_rows": 4},
    "ungated": {"activation": ActivationSpec("relu2", None), "ids_dtype": torch.int64},
}
TOLERANCE = 2e-3  # fp16 between the GEMMs, and codes that another order of additions tips over


def fits(scheme: str, path: str, tokens: int = 2) -> bool:
    """Scales of all of an expert's rows need the rows sorted, but for a single token."""
    return scheme != "fp8_tensor_dynamic" or path in ("maps", "pointers") or (path == "slots" and tokens == 1)


QUICK = {
    ("fp8_block", "slots"), ("fp8_block", "scan"), ("fp8_block", "maps"), ("fp8_block_ue8m0", "pointers"),
    ("fp8_tensor", "slots"), ("fp8_tensor", "maps"), ("fp8_tensor_dynamic", "maps"), ("fp8_channel", "scan"),
    ("fp8_channel", "by_slot"), ("fp8_channel", "pointers"), ("fp8_weight_only", "scan"), ("weight_only_block", "maps"),
}  # fmt: skip
"""Each kernel with each kind of scale once; all pairs are in `make test-all`, and on a GPU."""


def pairs():
    for scheme in SCHEMES:
        for path in PATHS:
            if fits(scheme, path):
                yield pytest.param(scheme, path, marks=() if (scheme, path) in QUICK else pytest.mark.full)


@pytest.mark.parametrize(("scheme", "path"), list(pairs()))
def test_schemes_and_paths(scheme, path):
    out, emulated, exact = run(Case(scheme), PATHS[path])
    assert relative_error(out, emulated) <= TOLERANCE
    assert relative_error(out, exact) <= (0.006 if "weight_only" in scheme else 0.05)


@pytest.mark.parametrize(("variant", "scheme", "path"), [
    ("oai", "fp8_channel", "scan"), ("oai", "fp8_block", "slots"), ("oai", "fp8_channel", "pointers"),
    ("up_gate", "fp8_block_ue8m0", "maps"), ("up_gate", "fp8_tensor", "slots"), ("up_gate", "fp8_block", "scan"),
    ("ungated", "fp8_channel", "scan"), ("ungated", "fp8_tensor", "maps"), ("ungated", "fp8_block", "slots"),
])  # fmt: skip
def test_variants(variant, scheme, path):
    out, emulated, _ = run(Case(scheme, **VARIANTS[variant]), PATHS[path])
    assert relative_error(out, emulated) <= TOLERANCE


@pytest.mark.parametrize("path", ["slots", "scan", "maps"])
def test_gate_and_up_with_different_input_scales(path):
    out, emulated, _ = run(Case("fp8_tensor", halves_differ=True), PATHS[path])
    assert relative_error(out, emulated) <= TOLERANCE
    plain, _, _ = run(Case("fp8_tensor"), PATHS[path])
    assert relative_error(out, plain) > 10 * TOLERANCE


def test_one_token_under_one_scale_for_an_experts_rows():
    out, emulated, _ = run(Case("fp8_tensor_dynamic", tokens=1, routing="distinct"), PATHS["slots"])
    assert relative_error(out, emulated) <= TOLERANCE


@pytest.mark.parametrize("routing", ["one", "none"])
@pytest.mark.parametrize("path", ["scan", "maps"])
def test_all_tokens_to_one_expert_or_to_none(path, routing):
    out, emulated, _ = run(Case("fp8_block", routing=routing), PATHS[path])
    assert relative_error(out, emulated) <= TOLERANCE


@pytest.mark.parametrize(("scheme", "path"), [
    ("fp8_block_ue8m0", "slots"), ("fp8_channel", "slots"), ("fp8_channel", "scan"), ("fp8_block", "maps"),
])  # fmt: skip
def test_rows_that_a_dispatch_has_quantized(scheme, path):
    out, emulated, _ = run(Case(scheme), PATHS[path], given=True)
    assert relative_error(out, emulated) <= TOLERANCE


# Rows past the counts hold NaN; the interpreter multiplies them as 480, and their exponentials overflow.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize(("scheme", "given"), [
    ("fp8_block", False), ("fp8_block", True), ("fp8_channel", True), ("fp8_tensor", False),
    ("fp8_tensor_dynamic", False), ("fp8_weight_only", False),
])  # fmt: skip
def test_batched(scheme, given):
    walk = dataclasses.replace(MAPS, persistent=1)
    counts = (0, 37, 5, 40, 1)
    out, emulated = run_batched(Case(scheme), counts, 40, Fp8GroupedConfig(walk, walk, pdl=False), given)
    for expert, rows in enumerate(counts):
        assert rows == 0 or relative_error(out[expert, :rows], emulated[expert, :rows]) <= TOLERANCE
        assert torch.isnan(out[expert, rows:]).all()


@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_own_choice(tokens):
    out, emulated, _ = run(Case("fp8_block", tokens=tokens))
    assert out.shape[0] == tokens
    assert tokens == 0 or relative_error(out, emulated) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_block_ue8m0", "fp8_channel"])
def test_quantizers_have_the_formats_bits(scheme):
    check_row_quantizer(scheme, "cpu")


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_static_scales_saturate_what_is_finite():
    check_static_quantizer("cpu")
