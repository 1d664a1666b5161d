"""Device functions that kernels of plugins may call: one formula in one place, the bits of `moe_core.formats`.

Unlike the rest of `moe_core.ops`, importing this module imports Triton.
"""

from moe_core.ops._kernels.fp8_quantize import magnitude, scale_of, to_e4m3

__all__ = ["magnitude", "scale_of", "to_e4m3"]
