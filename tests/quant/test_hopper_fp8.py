"""The emulation of Hopper's FP8 arithmetic: its rule by hand, and its steps beside `EmulatedExperts`."""

from __future__ import annotations

import pytest
import torch

from moe_core import ActivationSpec, GateUpLayout, Routing
from tests.quant.conftest import relative, routing_of, tokens_of
from tests.quant.hopper_fp8 import HopperStep, Tiles, in_float64, matrix_unit

SCHEMES = ["fp8_block", "fp8_block_ue8m0", "fp8_tensor", "fp8_tensor_dynamic", "fp8_channel"]
OAI = ActivationSpec("swiglu_oai", GateUpLayout.INTERLEAVED, limit=7.0, bias=True)


def codes(values: dict[int, float]) -> torch.Tensor:
    """One row of codes, zero but for these; 32 columns make one instruction."""
    row = torch.zeros(1, 64 if max(values) >= 32 else 32)
    for column, value in values.items():
        row[0, column] = value
    return row.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("a", "b", "kept"),
    [
        ({0: 256, 1: 15}, {0: 256, 1: 1}, 65536 + 8),  # 2^16, so nothing below 2^3 is kept
        ({0: 256, 1: -15}, {0: 256, 1: 1}, 65536 - 8),  # towards zero, term by term
        ({0: 256, 1: 7, 2: 7}, {0: 256, 1: 1, 2: 1}, 65536),
        ({0: 7, 1: 7, 20: 256}, {0: 1, 1: 1, 20: 256}, 65536),  # wherever among 32 the largest stands
        ({0: 256, 40: 7, 41: 7}, {0: 256, 40: 1, 41: 1}, 65536),  # the sum so far counts among the terms
        ({0: 15, 40: 256}, {0: 1, 40: 256}, 65536 + 8),
        ({0: 256, 1: 256, 2: 8}, {0: 256, 1: 256, 2: 1}, 131072),  # kept as a term, but not in the sum
        ({0: 240, 1: 8}, {0: 240, 1: 1}, 57600 + 8),  # 2^7 · 2^7 is the power: 1.875² does not carry into it
        ({0: 2**-9, 1: 2**-6}, {0: 256, 1: 2**-6}, 0.5),  # a subnormal has the exponent -6, so this one's power is 2^2
    ],
)
def test_what_the_unit_keeps(a, b, kept):
    assert matrix_unit(codes(a), codes(b)).item() == kept


def test_small_numbers_are_added_exactly_and_tiles_choose_the_unit():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, (rows, 128), generator=generator).float() for rows in (70, 9))
    assert torch.equal(matrix_unit(a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)), a.double() @ b.double().T)
    rough = [torch.randn(rows, 128, generator=generator).to(torch.float8_e4m3fn) for rows in (70, 9)]
    exact, cut = in_float64(*rough), matrix_unit(*rough)
    assert not bool((exact == cut).all(1).any())
    assert torch.equal(Tiles(16)(*rough), exact)
    assert torch.equal(Tiles(64)(*rough), cut)
    assert torch.equal(Tiles(64, last=16)(*rough), torch.cat([cut[:64], exact[64:]]))
    assert torch.equal(Tiles(64, last=4)(*rough), cut)


@pytest.mark.parametrize("activation", [ActivationSpec("silu"), OAI, ActivationSpec("relu2", None)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_with_exact_products_it_is_the_emulation_and_with_the_units_it_is_near(scheme, activation, layer):
    made = layer(scheme, activation=activation)
    config, weights = made.plan.config, made.experts.weights
    x, routing = tokens_of(12, config), routing_of(12, config)
    expected = made(x, routing).double()
    exact = HopperStep(config, made.plan.scheme, weights, in_float64, in_float64)
    assert relative(exact(x, routing.topk_ids, routing.topk_weights), expected) <= 1e-5
    cut = HopperStep(config, made.plan.scheme, weights, matrix_unit, matrix_unit)
    assert 1e-4 <= relative(cut(x, routing.topk_ids, routing.topk_weights), expected) <= 0.03


def test_rows_that_are_quantized_already(layer):
    from moe_core import formats

    made = layer("fp8_block")
    config, scheme = made.plan.config, made.plan.scheme
    step = HopperStep(config, scheme, made.experts.weights, matrix_unit, matrix_unit)
    x, routing = tokens_of(5, config), Routing(torch.tensor([[0, 1]] * 5), torch.ones(5, 2))
    q, scale = formats.quantize(x, scheme.activation)
    given = step(q, routing.topk_ids, routing.topk_weights, scale)
    assert torch.equal(given, step(x, routing.topk_ids, routing.topk_weights))
