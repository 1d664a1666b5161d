"""The NVFP4 schemes: e2m1 codes, an e4m3 scale for each 16 columns, and a second-level scale for each projection.

The formulas are `moe_core.formats`; x ≈ code · scale · global scale.
"""

from __future__ import annotations

from moe_core.quant import QuantScheme, QuantSpec, ScaleFormat

GROUP = 16
MMA_LAYOUT = "nvfp4_mma"
"""The weight layout of `moe_core.ops.pack_nvfp4_matrix`: what nvfp4_triton reads."""
_WEIGHT = QuantSpec("float4_e2m1", (1, GROUP), ScaleFormat.E4M3, second_level=True)
_ACTIVATION = QuantSpec("float4_e2m1", (1, GROUP), ScaleFormat.E4M3, dynamic=True, second_level=True)

NVFP4 = QuantScheme("nvfp4", _WEIGHT)
"""W4A16: activations stay in the model dtype. What runs by default, also where a checkpoint was made for W4A4."""
NVFP4_W4A4 = QuantScheme("nvfp4_w4a4", _WEIGHT, _ACTIVATION)
"""Activations go through the format's quantizer, under the checkpoint's second-level scale of each input."""

SCHEMES = (NVFP4, NVFP4_W4A4)
