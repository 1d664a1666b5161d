"""Which of the schemes the kernels run: a `QuantScheme` in the words of `moe_core.ops.fp8`."""

from __future__ import annotations

from moe_core.config import Problem
from moe_core.ops import FP8_GROUP, Fp8Format
from moe_core.packed import refuse_sizes
from moe_core.quant import QuantScheme, ScaleFormat

_WEIGHTS = {(FP8_GROUP, FP8_GROUP): "block", (-1, -1): "tensor", (1, -1): "channel"}
_ACTIVATIONS = {(1, FP8_GROUP): "group", (1, -1): "row", (-1, -1): "tensor"}


def format_of(scheme: QuantScheme) -> Fp8Format | str:
    """The scheme as kernels see it, or why there are none for it."""
    assert scheme.weight is not None, "a scheme of this package quantizes weights"
    weights = _WEIGHTS.get(scheme.weight.group_shape)
    if weights is None:
        return f"weight blocks of {scheme.weight.group_shape}; the kernels read blocks of {FP8_GROUP} × {FP8_GROUP}"
    if scheme.activation is None:
        return Fp8Format(weights, None)
    activations = _ACTIVATIONS.get(scheme.activation.group_shape)
    if activations == "tensor" and not scheme.activation.dynamic:
        activations = "static"
    return Fp8Format(weights, activations, scheme.activation.scale_format is ScaleFormat.UE8M0)


def refuse(problem: Problem) -> str | None:
    """For `ExpertsCapabilities.refuse`: sizes that the groups can't have, and blocks that the kernels don't read."""
    if problem.scheme.weight is None:
        return None
    found = format_of(problem.scheme)
    return found if isinstance(found, str) else refuse_sizes(problem)
