"""Reads and checks `config.router.params`, with one wording of errors for every router."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from moe_core.config import MoEConfig

REQUIRED: Final = object()
"""The `default` of a parameter that has none."""


@attrs.frozen
class Param:
    """One parameter of a router.

    Attributes:
        default: taken where the parameter is not given, and not checked; `REQUIRED`: it must be given.
        legal: the legal values, in words, for errors.
        accepts: whether a given value is legal.
    """

    default: Any
    legal: str
    accepts: Callable[[Any], bool]


def flag(default: bool = False) -> Param:
    """A parameter that is True or False (and not a 0 or 1 that was meant for its neighbour)."""
    return Param(default, "True or False", lambda value: isinstance(value, bool))


def count(default: Any, legal: str = "int >= 1") -> Param:
    """A parameter that is a positive int."""
    return Param(default, legal, lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1)


def read_params(router: str, config: MoEConfig, known: Mapping[str, Param]) -> dict[str, Any]:
    """The value of every parameter in `known`.

    Args:
        router: the router's name, for errors.
        config: whose `router.params` are read.
        known: the router's parameters.

    Raises:
        ValueError: a parameter is unknown, missing or has an illegal value. The text names the router, the parameter
            and what is legal.
    """
    given = dict(config.router.params)
    for name in given:
        if name not in known:
            legal = ", ".join(f"{key} ({param.legal})" for key, param in known.items()) or "none, it takes no parameter"
            raise ValueError(f"router {router!r} has no parameter {name!r}; legal parameters: {legal}")
    for name, param in known.items():
        if name not in given:
            if param.default is REQUIRED:
                raise ValueError(
                    f"router {router!r} needs the parameter {name!r}; legal values: {param.legal}. "
                    f"Give it as RouterSpec.of({router!r}, {name}=…)"
                )
        elif not param.accepts(given[name]):
            raise ValueError(f"router {router!r}: {name} = {given[name]!r}; legal values: {param.legal}")
    return {name: given.get(name, param.default) for name, param in known.items()}
