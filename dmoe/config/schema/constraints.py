"""Constraints beside their field: `top_p: Annotated[float, between(0, 1)] = 0.6`.

`check_types`, `check_bounds` and `check_only_for` check them, whether the values come from YAML or
from Python. Rules about several fields are in `dmoe/config/rules`.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dmoe.config.errors import ConfigError
from dmoe.config.keywords import shown
from dmoe.config.plugins import parse

LARGEST = 10**12
"""Upper bound of an integer without a bound of its own: steps, intervals, counts."""


@dataclass(frozen=True)
class Bound:
    """A condition on a number, and the last two parts of the error when it fails."""

    holds: Callable[[float], bool]
    allowed: str
    fix: str
    replaces_largest: bool = False
    """True: `LARGEST` does not apply to a field with this bound."""


@dataclass(frozen=True)
class OnlyFor:
    """Condition of `only_for`."""

    name: str
    """Dotted, e.g. `train.task`."""
    values: tuple[str, ...]


@dataclass(frozen=True)
class ItemsFrom:
    """Condition of `items_from`."""

    values: tuple[str, ...]
    fix: str


@dataclass(frozen=True)
class OneOf:
    """Condition of `one_of`."""

    values: tuple[str, ...]


def one_of(*values: str) -> OneOf:
    """Require one of `values`, or a reference to a class of the user's own (`plugins.py`)."""
    return OneOf(values)


def only_for(name: str, *values: str) -> OnlyFor:
    """Require the default unless the field `name` has one of `values`."""
    return OnlyFor(name, values)


def items_from(*values: str, fix: str) -> ItemsFrom:
    """Require that each item of the list is one of `values`."""
    return ItemsFrom(values, fix)


def at_least(low: int) -> Bound:
    """Require a number of `low` or more."""
    allowed = f"must be {low} or more" if low else "must not be negative"
    return Bound(lambda value: value >= low, allowed, f"use {low}")


def above(low: int, allowed: str = "", fix: str = "use a positive number or leave it out") -> Bound:
    """Require a number greater than `low`."""
    return Bound(lambda value: value > low, allowed or f"must be greater than {low}", fix)


def below(high: int) -> Bound:
    """Require a number less than `high`."""
    return Bound(lambda value: value < high, f"must be below {high}", "use the default")


def at_most(high: int, unit: str = "", fix: str = "is there a digit too many?") -> Bound:
    """Require at most `high`, far above any useful value: a typo must not exhaust the memory."""
    allowed = f"must be at most {high}{unit}"
    return Bound(lambda value: value <= high, allowed, fix, replaces_largest=True)


def from_to(low: int, high: int) -> Bound:
    """Require an integer from `low` to `high`, both included."""
    allowed = f"must be from {low} to {high}"
    return Bound(lambda value: low <= value <= high, allowed, "use the default")


def fraction(ends: str = "[]", fix: str = "use the default") -> Bound:
    """Require a number from 0 to 1. `ends`: `[` and `]` include the end, `(` and `)` exclude it."""
    allowed = {
        "[]": "must be between 0 and 1",
        "()": "must be between 0 and 1, both excluded",
        "[)": "must be at least 0 and less than 1",
        "(]": "must be greater than 0 and at most 1",
    }
    low = operator.ge if ends[0] == "[" else operator.gt
    high = operator.le if ends[1] == "]" else operator.lt
    return Bound(lambda value: low(value, 0) and high(value, 1), allowed[ends], fix)


def check_types(section: Any, prefix: str = "") -> None:
    """Refuse a value of another type: Python's dataclasses keep whatever they are given.

    `RouterConfig(score="Softmax")` would be taken for the other of the two scores, and a NaN passes
    or fails every comparison.

    Args:
        section: the whole config, or one section.
        prefix: the section's dotted name and a dot; empty for the whole config.

    Raises:
        ConfigError: for the first such field.
    """
    hints, _ = _schema(type(section))  # type: ignore[arg-type]
    for name, value in vars(section).items():
        kind = _words_or_reference(hints[name], value)
        if is_dataclass(kind) and isinstance(value, kind):  # type: ignore[arg-type]
            check_types(value, f"{prefix}{name}.")
        else:
            check_type(shown(f"{prefix}{name}"), value, kind)


def check_type(name: str, value: Any, kind: Any) -> None:
    """Refuse a value that the annotation `kind` does not allow; `name` is what the error names."""
    if _is_of(value, kind):
        return
    words = [
        word
        for part in _alternatives(kind)
        if get_origin(part) is Literal
        for word in get_args(part)
    ]
    near = difflib.get_close_matches(str(value).lower(), words, n=1)
    fix = f"did you mean {near[0]}?" if near else "use one of them" if words else "use the default"
    shown = str(value) if isinstance(value, int | float | None) else type(value).__name__
    if isinstance(value, str):
        shown = value if words and value else repr(value)
    raise ConfigError(name, shown if len(shown) <= 40 else f"{shown[:37]}...", _must_be(kind), fix)


def check_field(section: type, field: str, name: str, value: Any) -> None:
    """Refuse a value that could not be that of `field` in `section`; errors call it `name`."""
    kind = _schema(section)[0][field]
    check_type(name, value, _words_or_reference(kind, value))
    _check_number(name, value, getattr(kind, "__metadata__", ()))


def check_only_for(config: Any) -> None:
    """Refuse a field that differs from its default although this config does not read it.

    Args:
        config: the whole config.

    Raises:
        ConfigError: for the first such field.
    """
    for name, value, default, constraints in _fields(config, ""):
        for constraint in constraints:
            if not isinstance(constraint, OnlyFor) or value == default:
                continue
            setting: Any = config
            for part in constraint.name.split("."):
                setting = getattr(setting, part)
            if setting not in constraint.values:
                read = ", ".join(constraint.values)
                allowed = f"has no meaning for {constraint.name}={setting}, only for {read}"
                raise ConfigError(name, value, allowed, f"leave {name} out")


def check_bounds(section: Any, prefix: str = "") -> None:
    """Refuse a number outside its bounds, and a list item that is not allowed.

    Args:
        section: the whole config, or one section.
        prefix: the section's dotted name and a dot; empty for the whole config.

    Raises:
        ConfigError: for the first such field.
    """
    for name, value, _, constraints in _fields(section, prefix):
        for constraint in constraints:
            if isinstance(constraint, ItemsFrom) and (unknown := {*value} - {*constraint.values}):
                allowed = f"must be {' or '.join(constraint.values)}"
                raise ConfigError(name, min(unknown), allowed, constraint.fix)
        _check_number(name, value, constraints)


def _check_number(name: str, value: Any, constraints: tuple[Any, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    bounds = [constraint for constraint in constraints if isinstance(constraint, Bound)]
    if isinstance(value, int) and not any(bound.replaces_largest for bound in bounds):
        bounds.append(at_most(LARGEST))
    for bound in bounds:
        if not bound.holds(value):
            raise ConfigError(name, _short(value), bound.allowed, bound.fix)


def _fields(section: Any, prefix: str) -> Iterator[tuple[str, Any, Any, tuple[Any, ...]]]:
    """Yield dotted name, value, default and constraints of each field, subsections included."""
    hints, defaults = _schema(type(section))  # type: ignore[arg-type]
    for name, value in vars(section).items():
        if is_dataclass(value):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            constraints = getattr(hints[name], "__metadata__", ())
            yield shown(f"{prefix}{name}"), value, defaults[name], constraints


@cache
def _schema(section: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the annotated types and the defaults of a section's class."""
    return get_type_hints(section, include_extras=True), vars(section())


def _words_or_reference(kind: Any, value: object) -> Any:
    """Return the type that a value must have: of `one_of` the words, unless it is a reference."""
    words = [part for part in getattr(kind, "__metadata__", ()) if isinstance(part, OneOf)]
    if words and parse(value) is None:
        return Literal[words[0].values]
    return _without_constraints(kind)


def _without_constraints(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Union else (kind,)


def _is_of(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type as the schema's annotations write it."""
    if get_origin(kind) is Union:
        return any(_is_of(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list | tuple) and all(_is_of(v, *get_args(kind)) for v in value)
    if get_origin(kind) is dict:
        items = value.items() if isinstance(value, dict) else [(0, value)]
        return all(isinstance(key, str) and _is_of(v, get_args(kind)[1]) for key, v in items)
    if kind is Any:
        return True
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, kind)


def _must_be(kind: Any) -> str:
    names = {int: "a whole number", float: "a finite number", str: "text", NoneType: "null (None)"}
    words: list[str] = []
    for part in _alternatives(kind):
        if get_origin(part) is Literal:
            words += get_args(part)
        elif get_origin(part) is dict:
            words.append(f"a mapping ({part})")
        elif get_origin(part) is list:
            words.append(f"a list ({part})")
        else:
            words.append("true or false" if part is bool else names.get(part, f"a {part.__name__}"))
    return f"must be {' or '.join(words)}"


def _short(number: float) -> object:
    text = str(number)
    return number if len(text) <= 30 else f"{text[:12]}... ({len(text)} digits)"
