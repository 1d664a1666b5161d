"""The activation, in place, against the reference's.

Shape letters: M rows · I intermediate.
"""

from __future__ import annotations

import pytest
import torch

from moe_core.builtin.activation import activate
from moe_core.config import MODEL_DTYPES
from moe_core.reference import activation_reference
from tests.builtin.conftest import ACTIVATIONS, NAN, assert_near


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_equal_to_the_reference(name: str) -> None:
    spec = ACTIVATIONS[name]
    for dtype in MODEL_DTYPES:
        for rows, intermediate in ((0, 3), (1, 1), (5, 7), (40, 65)):
            width = intermediate * (2 if spec.gated else 1)
            h = (torch.randn(rows, width) * 3).to(dtype)
            expected = activation_reference(h.double(), spec)
            for turned in (False, True):
                scratch = h.t().contiguous().t() if turned else h.clone()
                out = torch.full((rows, intermediate), NAN, dtype=dtype)
                activate(spec, spec.gate_up_layout, scratch, out)
                assert_near(out, expected, dtype, (rows, intermediate, turned))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_large_values_stay_finite(name: str) -> None:
    """σ and gelu saturate; nothing may become Inf · 0."""
    spec = ACTIVATIONS[name]
    h = torch.tensor([[-1e4, 1e4, 90.0, -90.0, 0.0, -0.0]])
    out = torch.empty(1, 3 if spec.gated else 6)
    activate(spec, spec.gate_up_layout, h, out)
    assert out.isfinite().all()
