"""Which `ActivationSpec` a foreign experts module computes: found by running its gate, not by reading its name.

Shape letters: I intermediate per rank · P pairs of probe values · N rows of the probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from moe_core.config import GATED_FUNCTIONS, UNGATED_FUNCTIONS, ActivationSpec
from moe_core.reference import activation_reference
from moe_core.types import GateUpLayout

TOLERANCE = 1e-6
"""Relative, and absolute below 1. The probe is fp64; a gate that computes in fp32 inside is still within it."""
_VALUES = (0.0, 1e-3, 0.1, 0.5, 1.0, 1.7, 3.0, 5.0, 6.9, 7.1, 9.9, 10.1, 25.0, 101.0, 1e3, 2e4, 3e5)
"""Each is probed with both signs. The large ones are there to show a clamp, the close ones to show where it is."""
_MIN_ROWS = 4
_DRAWS_PER_PAIR = 8
"""So many random draws miss a given pair of gate and up value once in e^8."""


def gate_function(module: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the module itself puts between its two projections: `[N, 2I]` (`[N, I]` without a gate) → `[N, I]`."""
    function: Callable[[torch.Tensor], torch.Tensor]
    function = module._apply_gate if module.has_gate else module.act_fn  # type: ignore[assignment]
    return function


@torch.no_grad()
def recognise_gate(module: torch.nn.Module, intermediate_size: int) -> ActivationSpec | str:
    """Evaluate the module's gate once and compare it with every formula that `ActivationSpec` can name.

    The probe is as wide as the real thing, so that a gate that treats channels differently is not taken for one that
    doesn't.

    Args:
        module: an experts module; limits and alphas are read from its attributes and its config's.
        intermediate_size: I.

    Returns:
        the spec, or the reason why there is none, in one line.
    """
    limits = _numbers(module, "limit", "clamp")
    alphas = _numbers(module, "alpha") or [1.702]
    gated, bias = bool(module.has_gate), bool(getattr(module, "has_bias", False))
    probe = _probe(intermediate_size * (2 if gated else 1), gated, limits)
    name = f"{type(module).__name__}.{'_apply_gate' if gated else 'act_fn'}"
    try:
        actual = gate_function(module)(probe.clone())
    except Exception as error:  # noqa: BLE001 - foreign code; whatever it raises, the answer is "not recognised"
        return f"{name} could not be evaluated on a probe ({type(error).__name__}: {str(error).splitlines()[:1]})"
    if not isinstance(actual, torch.Tensor) or actual.shape != (probe.shape[0], intermediate_size):
        return f"{name} returned {getattr(actual, 'shape', type(actual))} for a probe of {tuple(probe.shape)}"
    actual = actual.to("cpu", torch.float64)
    concatenated = bool(getattr(module, "is_concatenated", True))
    for spec in _candidates(gated, bias, concatenated, limits, alphas):
        if torch.allclose(actual, activation_reference(probe, spec), rtol=TOLERANCE, atol=TOLERANCE):
            return spec
    return (
        f"{name} equals no activation that moe-core has ({', '.join(GATED_FUNCTIONS if gated else UNGATED_FUNCTIONS)})"
    )


def _candidates(
    gated: bool, bias: bool, concatenated: bool, limits: list[float], alphas: list[float]
) -> Iterator[ActivationSpec]:
    """Every spec that could fit, the likely ones first."""
    if not gated:
        yield from (ActivationSpec(function, None, bias=bias) for function in UNGATED_FUNCTIONS)
        return
    layouts = [GateUpLayout.GATE_UP, GateUpLayout.INTERLEAVED, GateUpLayout.UP_GATE]
    if not concatenated:
        layouts.sort(key=lambda layout: layout is not GateUpLayout.INTERLEAVED)
    for layout in layouts:
        for limit in (*limits, None):
            for function in GATED_FUNCTIONS:
                for alpha in alphas if function == "swiglu_oai" else (1.702,):
                    yield ActivationSpec(function, layout, limit=limit, alpha=alpha, bias=bias)


def _probe(width: int, gated: bool, limits: list[float]) -> torch.Tensor:
    """`[N, width]` fp64 on the CPU: random draws from the values above, so that any layout sees every pair."""
    values = [*_VALUES, *(limit * factor for limit in limits for factor in (0.999, 1.001, 2.0))]
    table = torch.tensor([sign * value for value in values for sign in (1.0, -1.0)], dtype=torch.float64, device="cpu")
    pairs = len(table) ** (2 if gated else 1)
    rows = max(_MIN_ROWS, math.ceil(_DRAWS_PER_PAIR * pairs * (2 if gated else 1) / width))
    generator = torch.Generator("cpu").manual_seed(0)
    return table[torch.randint(len(table), (rows, width), generator=generator, device="cpu")]


def _numbers(module: torch.nn.Module, *words: str) -> list[float]:
    """Positive numbers among the attributes of the module, its activation and its config, whose names hold a word."""
    owners: list[Any] = [module, getattr(module, "act_fn", None), getattr(module, "config", None)]
    found: list[float] = []
    for owner in owners:
        for name, value in getattr(owner, "__dict__", {}).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and math.isfinite(value) and value > 0 and any(word in name.lower() for word in words):
                found.append(float(value))
    return list(dict.fromkeys(found))
