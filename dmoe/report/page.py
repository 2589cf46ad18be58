"""What a report is made of, before any HTML: panels of sentences, tables and charts. Text in here is plain; `html` escapes all of it.

A chart's `views` hold what is drawn for each combination of what the reader may choose, under the positions joined by `|`: with the
choices Run and Layer, `"0|3"` is the first run's fourth layer. A combination without a view is said to be missing, in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Chart", "Choice", "Panel", "Quote", "Table", "short"]


@dataclass(frozen=True)
class Choice:
    label: str
    options: Sequence[str]


@dataclass(frozen=True)
class Chart:
    id: str
    title: str
    caption: str
    """What it shows and how to read it: this is also its text alternative."""
    kind: Literal["curves", "matrix"]
    views: Mapping[str, Any]
    """Plain JSON; page.js says what each kind reads."""
    axes: Mapping[str, str]
    """`x`, `y` and, for a matrix, `z`: names with units."""
    choices: Sequence[Choice] = ()
    wide: bool = False


@dataclass(frozen=True)
class Table:
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The first cell of a row is its header."""


@dataclass(frozen=True)
class Quote:
    """Text a model or a run wrote, shown as it is."""

    title: str
    text: str


@dataclass(frozen=True)
class Panel:
    id: str
    title: str
    words: Sequence[str] = ()
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Headed lists of sentences."""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    quotes: Sequence[Quote] = ()


def short(value: float | None) -> float | None:
    """Six significant digits, an integer where it is one: what a chart can show, in as few bytes."""
    if value is None:
        return None
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() else rounded
