"""What may stand in a declaration: one rule for each type that its fields are annotated with.

A field that is typed wrongly is refused where it is written, by an error that names field, value, what was expected and
the page of the docs; later it would fail in the plan of a layer that doesn't use the backend.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Set
from typing import Any

import attrs

CAPABILITIES_PAGE = "docs/capabilities.md"
HOOKS_PAGE = "docs/hooks.md"
API_PAGE = "docs/api.md"
STABILITY_PAGE = "docs/stability.md"

_LONGEST_VALUE = 100
"""Characters of a wrong value that are shown: it may be a whole record."""


@attrs.frozen
class Rule:
    """What a value must be, as a predicate and in words. Used as an attrs validator, it raises ValueError."""

    expected: str
    holds: Callable[[Any], bool]

    def complaint(self, name: str, value: object, page: str) -> str:
        """What is wrong with the value of `name`, or ""."""
        return "" if self.holds(value) else f"{name} = {shown(value)}; expected {self.expected} ({page})"

    def __call__(self, record: Any, field: attrs.Attribute[Any], value: object) -> None:
        if complaint := self.complaint(f"{type(record).__name__}.{field.name}", value, CAPABILITIES_PAGE):
            raise ValueError(complaint)


def shown(value: object) -> str:
    """A value in an error: its repr, of a long one the beginning."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ints(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_int, value))


def _is_priority(value: Any) -> bool:
    if not isinstance(value, tuple):
        return _is_int(value)
    rising = bool(value) and all(map(_are_ints, value))
    return rising and all(low < high for (low, _), (high, _) in itertools.pairwise(value))


FLAG = Rule("True or False", lambda value: isinstance(value, bool))
TEXT = Rule("a str", lambda value: isinstance(value, str))
NAME = Rule("a str, not empty", lambda value: isinstance(value, str) and bool(value))
COUNT = Rule("an int >= 1", lambda value: _is_int(value) and value >= 1)
FUNCTION = Rule("a function", callable)
VERSION = Rule("a pair of ints, (major, minor)", _are_ints)
PRIORITY_BY_ROWS = Rule("an int, or ((first_row, priority), …) with rising rows", _is_priority)


def instance_of(kind: type, name: str) -> Rule:
    return Rule(name, lambda value: isinstance(value, kind))


def optional(rule: Rule) -> Rule:
    return Rule(f"{rule.expected}, or None", lambda value: value is None or rule.holds(value))


def set_of(item: Rule, name: str, *, may_be_empty: bool = False) -> Rule:
    """A set whose members keep a rule. An empty one would mean a backend that can never be selected."""
    return Rule(
        f"a frozenset of {name}" + ("" if may_be_empty else ", not empty"),
        lambda value: isinstance(value, Set) and (may_be_empty or bool(value)) and all(map(item.holds, value)),
    )


def mapping_of(key: Rule, value: Rule, names: str) -> Rule:
    return Rule(
        f"a mapping of {names}",
        lambda given: (
            isinstance(given, Mapping) and all(map(key.holds, given)) and all(map(value.holds, given.values()))
        ),
    )


def checked_by(rules: Mapping[str, Rule]) -> Callable[[type, list[attrs.Attribute[Any]]], list[attrs.Attribute[Any]]]:
    """For `attrs.frozen(field_transformer=…)`: each field that has no rule of its own gets that of its annotation.

    Every field is checked, then: an annotation without a rule is a KeyError when the class is made.
    """

    def transform(_: type, fields: list[attrs.Attribute[Any]]) -> list[attrs.Attribute[Any]]:
        return [field if field.validator else field.evolve(validator=rules[str(field.type)]) for field in fields]

    return transform
