"""What is right, how far off is wrong, which duty explains an error, and whether somebody wrote what he only may read.

Shape letters: T rows · H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch

from moe_core.testing.case import Violation

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
"""Half the distance of neighbouring values near 1: what one rounding may change, relatively."""

Explanations = Mapping[str, Callable[[], torch.Tensor]]
"""Duty (with a few words after a colon) → what would come out if exactly this were not done."""


@attrs.frozen(eq=False)
class Truth:
    """What must come out, in float64.

    Attributes:
        value: `[T, H]`.
        size: `[T, 1]`, the largest magnitude that takes part in a row's sums: rounding errors are relative to it.
    """

    value: torch.Tensor
    size: torch.Tensor

    @classmethod
    def of(cls, value: torch.Tensor, terms: torch.Tensor | None = None) -> Truth:
        """`terms` `[K, T, H]`: what was summed, if anything was."""
        magnitudes = value.abs() if terms is None else terms.abs().sum(0)
        return cls(value, magnitudes.amax(-1, keepdim=True) if value.shape[-1] else magnitudes.sum(-1, keepdim=True))


def check_numbers(
    got: torch.Tensor,
    truth: Truth,
    *,
    duty: str,
    steps: float,
    dtype: torch.dtype | None = None,
    where: str = "",
    explanations: Explanations | None = None,
) -> None:
    """Hold a result to the truth, within `steps` roundings of its dtype.

    Args:
        got: `[T, H]`.
        truth: what it must be.
        duty: what is broken if it is not.
        steps: how many roundings may add up.
        dtype: the one that rounds, where it is not the one of `got`.
        where: which rank, which call.
        explanations: looked at in order; the first that gives what came out names the duty.

    Raises:
        Violation: shape, NaN or numbers are wrong.
    """
    if got.shape != truth.value.shape:
        raise Violation(
            "shapes and dtypes", f"{where} the result is {tuple(got.shape)}, not {tuple(truth.value.shape)}"
        )
    bound = truth.size * (steps * ROUNDOFF[dtype or got.dtype])
    error = (got.to(torch.float64) - truth.value).abs()
    wrong = ~(error <= bound).all(dim=-1)  # NaN compares false
    if not bool(wrong.any()):
        return
    row = int(torch.where(wrong)[0][0])
    worst = error[wrong].nan_to_num(torch.inf).amax()
    text = (
        f"{where} {int(wrong.sum())} of {got.shape[0]} rows are wrong; row {row} is off by up to {float(worst):.3g}, "
        f"allowed {float(bound[row, 0]):.3g} (got {_shown(got[row])}, expected {_shown(truth.value[row])})"
    ).strip()
    for explanation, compute in (explanations or {}).items():
        other = compute()
        if bool(((got.to(torch.float64) - other).abs() <= bound + 1e-9)[wrong].all()):
            named, _, how = explanation.partition(": ")
            raise Violation(named, f"{how + ': ' if how else ''}{text}")
    if duty == "rows" and not bool(got[wrong].isfinite().all()):
        raise Violation("padding is not read", f"what holds nothing was read, or left unwritten: {text}")
    raise Violation(duty, text)


def _shown(row: torch.Tensor) -> str:
    values = ", ".join(f"{float(value):.4g}" for value in row[:3])
    return f"[{values}, …]" if row.shape[0] > 3 else f"[{values}]"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit, also where it is NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor as uint8 `[N]`, whatever its strides."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class Untouched:
    """Remembers tensors that may only be read. `check` looks at their version counters and at every bit.

    Of a view the whole storage is remembered, so that what lies between its rows counts too.
    """

    def __init__(self, **tensors: torch.Tensor | None) -> None:
        self._seen = [
            (name, tensor, tensor._version, _storage(tensor).clone())
            for name, tensor in tensors.items()
            if tensor is not None
        ]

    def check(self, during: str) -> None:
        for name, tensor, version, before in self._seen:
            if not torch.equal(_storage(tensor), before):
                raise Violation("read-only inputs", f"{during} wrote into {name}")
            if tensor._version != version:
                raise Violation("read-only inputs", f"{during} wrote the same values into {name} (version counter)")


def _storage(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


_GUARD = 256
"""Bytes on each side. Larger than any vector store."""


class Guarded:
    """Memory of exactly the given shape, with a guard on either side; filled with one byte, which is NaN for 255.

    Attributes:
        tensor: to be handed out.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, fill: int = 255, pad: int = 0
    ) -> None:
        """`pad`: columns after each row that do not belong to the tensor either."""
        rows = (*shape[:-1], shape[-1] + pad) if shape else ()
        elements = 1
        for extent in rows:
            elements *= extent
        self._guard = -(-_GUARD // dtype.itemsize) * dtype.itemsize
        size = elements * dtype.itemsize
        self._bytes = torch.full((size + 2 * self._guard,), fill, dtype=torch.uint8, device=device)
        whole = self._bytes[self._guard : self._guard + size].view(dtype).view(rows)
        self.tensor = whole[..., : shape[-1]] if pad else whole
        self._outside = torch.ones_like(self._bytes, dtype=torch.bool)
        inside = self._outside[self._guard : self._guard + size].view(*rows, dtype.itemsize)
        (inside[..., : shape[-1], :] if pad else inside).fill_(False)
        self._before = self._bytes.clone()

    def check(self, duty: str, name: str) -> None:
        changed = (self._bytes != self._before) & self._outside
        if bool(changed.any()):
            raise Violation(duty, f"{int(changed.sum())} bytes outside of {name} were written")
