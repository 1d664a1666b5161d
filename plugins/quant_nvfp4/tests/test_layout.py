"""The kernels' order of packed weights: every byte comes back, and what the kernels read from it is the format's."""

from __future__ import annotations

import pytest
import torch
from nvfp4_case import Case, relative_error

from moe_core import ActivationSpec, GateUpLayout, formats
from moe_core.ops import nvfp4_experts_torch, pack_nvfp4_matrix, unpack_nvfp4_matrix
from moe_core.ops._nvfp4_layout import SCALE_FACTOR, WORD_BITS, expand_nvfp4_matrix, row_order, scale_codes
from quant_nvfp4.schemes import NVFP4

LAYOUTS = [None, "gate_up", "up_gate", "interleaved"]


def matrix(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Any codes, and every scale that is not negative: zero, the subnormal ones, the largest, NaN."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 256, (rows, columns // 2), generator=generator).to(torch.uint8)
    scale = torch.randint(0, 129, (rows, columns // 16), generator=generator).to(torch.uint8)
    scale.view(-1)[:4] = torch.tensor([0, 1, 126, 127])
    return q, scale.view(torch.float8_e4m3fn)


def test_every_bit_of_a_word_has_one_place():
    bits = [bit for p in WORD_BITS for half in p for bit in half]
    assert sorted(bits) == list(range(16))


def test_scale_bytes_are_permuted_and_expand_to_the_scale():
    codes = scale_codes().to(torch.int64)
    assert sorted(codes.tolist()) == list(range(256))
    expanded = (16 * codes + 0x7500).to(torch.int16).view(torch.bfloat16).double() * 2.0**-116
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    assert torch.equal(expanded[:127], values[:127])
    assert expanded[127].isnan()
    assert abs(float(expanded[128])) * 6 * 2.0**-126 < 2.0**-149, "what stands for -0 vanishes in every product"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_permuted_with_gate_and_up_side_by_side(layout):
    order = row_order(64, layout)
    assert sorted(order.tolist()) == list(range(64))
    gate = {"gate_up": range(32), "up_gate": range(32, 64), "interleaved": range(0, 64, 2)}.get(layout or "")
    if gate is not None:
        for tile in order.view(4, 2, 8):
            assert set(tile[0].tolist()) <= set(gate)
            assert not set(tile[1].tolist()) & set(gate)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (32, 192), (48, 320), (64, 256)])
def test_bytes_come_back(rows, columns, layout):
    q, scale = matrix(rows, columns)
    packed_q, packed_scale = q.clone(), scale.clone()
    pack_nvfp4_matrix(packed_q, packed_scale, layout)
    assert not torch.equal(packed_q, q)
    unpack_nvfp4_matrix(packed_q, packed_scale, layout)
    assert torch.equal(packed_q, q)
    assert torch.equal(packed_scale.view(torch.uint8), scale.view(torch.uint8))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [64, 192, 256, 448])
def test_what_the_kernels_make_of_it_is_the_formats_value(columns, layout):
    q, scale = matrix(32, columns, seed=columns)
    top = torch.tensor(0.37, dtype=torch.float64)
    expected = formats.dequantize(q, scale, NVFP4.weight, top)
    pack_nvfp4_matrix(q, scale, layout)
    got = torch.empty_like(expected)
    got[row_order(32, layout)] = expand_nvfp4_matrix(q, scale).double().mul_(SCALE_FACTOR * 0.37).float()
    # the format rounds scale times global scale to fp32 first, the kernels multiply their sum
    torch.testing.assert_close(got, expected, rtol=2.0**-23, atol=0, equal_nan=True)
    assert bool(expected.isnan().any()), "the case holds a NaN scale"


def test_a_negative_scale_is_refused():
    q, scale = matrix(16, 64)
    scale.view(torch.uint8)[3, 1] = 0x81
    with pytest.raises(ValueError, match="negative"):
        pack_nvfp4_matrix(q, scale, None)


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize(
    "activation",
    [
        ActivationSpec(),
        ActivationSpec("gelu", GateUpLayout.UP_GATE),
        ActivationSpec("swiglu_oai", GateUpLayout.INTERLEAVED, limit=1.0, bias=True),
        ActivationSpec("relu2", None, bias=True),
    ],
    ids=["gate_up", "up_gate", "interleaved", "ungated"],
)
def test_the_twin_of_the_kernels_is_the_layer(activation, extreme):
    case = Case(12, 256, 128, activation=activation, extreme=extreme, num_rows=9, device="cpu")
    record = case.record()
    x, ids, router = case.inputs()
    got = nvfp4_experts_torch(x, ids, router.nan_to_num(0.0), case.packed(record), num_rows=case.row_count())
    assert relative_error(got[:9], case.expected(record, x, ids, router)[:9]) <= 0.003
    assert bool((got[9:] == 0).all())
