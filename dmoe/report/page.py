"""The parts of a report page as data: tiles, panels of sentences, tables and charts.

Text in them is plain. `render.py` writes the markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["", "good", "warn"]
"""Colour of a tile."""


@dataclass(frozen=True)
class Selector:
    """A choice of the reader, for example of a run or a layer."""

    label: str
    options: Sequence[str]
    is_switch: bool = False
    """Show all options side by side."""


@dataclass(frozen=True)
class Chart:
    """A chart with one view per combination of its selectors."""

    id: str
    title: str
    caption: str
    """Content and how to read it; also the text alternative."""
    kind: Literal["curves", "matrix"]
    views: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON by the selected positions joined by `|`: with selectors for run and layer, `0|3`
    is the fourth layer of the first run. A missing combination is reported in words."""
    axes: Mapping[str, str] = field(default_factory=dict)
    """`x`, `y` and, for a matrix, `z`: names with units. `fair` of a matrix is the expectation that
    the colours compare with: see `matrix.js`."""
    selectors: Sequence[Selector] = ()
    options: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Choices of the drawing by the names that the scripts read: x, range, order."""
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first cell per row is the row's header."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()
    """Row and column of the cells with the best value of a row."""


@dataclass(frozen=True)
class TextBlock:
    """Preformatted text that a model or a run wrote."""

    title: str
    text: str


@dataclass(frozen=True)
class Panel:
    """One section of the page, closed until it is opened."""

    id: str
    title: str
    sentences: Sequence[str] = ()
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Lists of sentences by heading."""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    texts: Sequence[TextBlock] = ()
    constant: Sequence[str] = ()
    """`Title: value` of each quantity that did not change: a line instead of a chart."""
    gist: str = ""
    """What the closed section says; empty: its number of charts and tables."""


@dataclass(frozen=True)
class Tile:
    """One number of the first screen."""

    title: str
    value: str
    detail: str
    state: State = ""


@dataclass(frozen=True)
class Overview:
    """The first screen."""

    title: str
    facts: Mapping[str, str]
    """Date, command, commit, machine, data by name."""
    sentence: str
    tiles: Sequence[Tile] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()


def round_number(value: float | None) -> float | None:
    """Round to six significant digits, as an int if it is one: enough for a chart, few bytes."""
    if value is None:
        return None
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() else rounded
