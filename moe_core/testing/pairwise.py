"""A few rows of a product in which every pair of values still meets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def pairwise(axes: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Rows with one value per axis, such that each two values of different axes that may meet do so in some row.

    Greedy and without randomness: a row is built around the first pair that is still missing, axis by axis with the
    value that brings the most missing pairs. The product may be thousands of rows, this is about the product of the
    two longest axes.

    Args:
        axes: name → values.
        allowed: whether a whole row makes sense; a pair of which no allowed row can be built is left out.
    """
    names = list(axes)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    rows: list[Row] = []
    for pair in sorted(missing, key=lambda pair: [(names.index(name), index) for name, index in pair]):
        if pair not in missing:
            continue
        for attempt in range(max(len(values) for values in axes.values())):
            chosen = _complete(dict(pair), names, axes, missing, attempt)
            row = {name: axes[name][index] for name, index in chosen.items()}
            if allowed(row):
                rows.append(row)
                missing -= set(itertools.combinations([(name, chosen[name]) for name in names], 2))
                break
    return rows or [{name: values[0] for name, values in axes.items()}]


def _complete(
    chosen: dict[str, int],
    names: Sequence[str],
    axes: Mapping[str, Sequence[Any]],
    missing: set[Any],
    attempt: int,
) -> dict[str, int]:
    """Give every other axis a value. `attempt` rotates the candidates, where the best row was not allowed."""
    for name in names:
        if name in chosen:
            continue
        size = len(axes[name])
        order = [(index + attempt) % size for index in range(size)]
        fixed = list(chosen.items())

        def gain(index: int, name: str = name, fixed: list[tuple[str, int]] = fixed) -> int:
            new = (name, index)
            return sum(
                ((other, new) if names.index(other[0]) < names.index(name) else (new, other)) in missing
                for other in fixed
            )

        chosen[name] = max(order, key=gain) if attempt == 0 else order[0]
    return {name: chosen[name] for name in names}
