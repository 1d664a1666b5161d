"""The activation between the two GEMMs, as a device function on float32 blocks."""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def activate(gate, up, ACT: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """f(gate) * up in float32; without a gate f(gate), and `up` is ignored. LIMIT 0 means no clamp."""
    if LIMIT > 0:
        # `where` and not `minimum`: a NaN must stay a NaN, as in torch.clamp.
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if ACT == "silu":
        h = gate * tl.sigmoid(gate)
    elif ACT == "swiglu_oai":
        h = gate * tl.sigmoid(ALPHA * gate)
        up = up + 1
    elif ACT == "gelu":
        h = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        h = 0.5 * gate * (1 + _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    else:
        tl.static_assert(ACT == "relu2")
        # Also through `where`, for NaN.
        h = tl.where(gate < 0, 0.0, gate)
        h = h * h
    if GATED:
        h = h * up
    return h


@triton.jit
def gate_and_up(both, N: tl.constexpr, INTERLEAVED: tl.constexpr, UP_FIRST: tl.constexpr):
    """Splits the last dim (2N) of `both [M, 2N]` into gate and up `[M, N]`; a thread keeps its own values."""
    M: tl.constexpr = both.shape[0]
    if INTERLEAVED:
        gate, up = tl.split(tl.reshape(both, (M, N, 2)))
    else:
        gate, up = tl.split(tl.permute(tl.reshape(both, (M, 2, N)), (0, 2, 1)))
    if UP_FIRST:
        return up, gate
    else:
        return gate, up
