"""The table of the MoE layers: who gets the tokens, who gets none, what is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from dmoe.observability.display.bars import CharSet, experts_a_bar, load_strip, strip_width
from dmoe.runs.metrics_log import finite, number, numbers

GAP = "  "
SHORTEST = 16
"""Characters a strip is worth having."""
KEEP = ("layer", "max/mean", "drop", "dead", "min/mean", "entropy")
"""Columns, the ones to keep first; the strip stands behind the first."""
CONCERN = {"max/mean": 2.0, "drop": 0.1, "dead": 1}
"""Shown in yellow from here on."""


@dataclass(frozen=True)
class Row:
    load: list[float]
    cells: dict[str, tuple[str, str]]
    """By column: text and style."""
    trouble: tuple[float, float, float]
    """What makes this layer worth the room it takes: dead experts, imbalance, drops."""


def layer_table(layers: Any, width: int, height: int, glyphs: CharSet) -> list[Text]:
    """At most `height` lines of at most `width` characters: a heading, a row a layer, what was left out, the meaning of the bars.

    `layers` as in a `train` line. Where not all layers fit, the ones in most trouble stay, in their order. Empty for no layers.
    """
    rows = (
        [_row(layer, index) for index, layer in enumerate(layers) if isinstance(layer, dict)]
        if isinstance(layers, list)
        else []
    )
    if not rows or height < 2:
        return []
    shown, note = _choose(rows, height - 1)
    columns = _columns(rows, width)
    widths = {name: max(len(name), *(len(row.cells[name][0]) for row in rows)) for name in columns}
    taken = sum(widths.values()) + len(GAP) * len(columns)
    experts = max(len(row.load) for row in rows)
    room = strip_width(experts, width - taken) if experts else 0
    lines = [
        _heading(columns, widths, room),
        *(_line(row, columns, widths, room, glyphs) for row in shown),
    ]
    if len(lines) + len(note) < height and experts:
        note = [*note, _legend(experts, room, glyphs)]
    for text in (lines := lines + [Text(words, "dim") for words in note]):
        text.truncate(width)
    return lines


def _row(layer: dict[str, Any], index: int) -> Row:
    load = numbers(layer.get("load"))
    mean = sum(load) / len(load) if load else 0.0
    most, least = (
        (max(load) / mean, min(load) / mean)
        if mean
        else (number(layer, "load_max_over_mean"), None)
    )
    found = {
        "drop": number(layer, "drop_rate"),
        "dead": number(layer, "dead_experts"),
        "entropy": number(layer, "router_entropy"),
    }
    if found["dead"] is None and load:
        found["dead"] = load.count(0)
    spelled = {
        "layer": f"{layer.get('layer', index)}",
        "max/mean": ""
        if most is None
        else f"{most:.2f}" + (f" e{load.index(max(load))}" if mean else ""),
        "min/mean": "" if least is None else f"{least:.2f} e{load.index(min(load))}",
        "drop": _spell(found["drop"], "{:.1%}"),
        "dead": _spell(found["dead"], "{:.0f}"),
        "entropy": _spell(found["entropy"], "{:.2f}"),
    }
    concerns = {"max/mean": most, **found}
    styles = {
        name: "yellow" if (concerns[name] or 0) >= limit else "" for name, limit in CONCERN.items()
    }
    cells = {name: (text, styles.get(name, "")) for name, text in spelled.items()}
    return Row(load, cells, (found["dead"] or 0, most or 0, found["drop"] or 0))


def _spell(value: float | None, form: str) -> str:
    return "" if finite(value) is None else form.format(value)


def _choose(rows: list[Row], height: int) -> tuple[list[Row], list[str]]:
    """The rows to show, and a line for the rest."""
    if len(rows) <= height:
        return rows, []
    worst = sorted(range(len(rows)), key=lambda place: rows[place].trouble, reverse=True)[
        : height - 1
    ]
    rest = [row for place, row in enumerate(rows) if place not in worst]
    note = f"and {len(rest)} more: max/mean at most {max(row.trouble[1] for row in rest):.2f}"
    return [rows[place] for place in sorted(worst)], [
        f"{note}, drop at most {max(row.trouble[2] for row in rest):.1%}"
    ]


def _columns(rows: list[Row], width: int) -> list[str]:
    """Those that hold something and leave the strip enough room."""
    columns = [name for name in KEEP if any(row.cells[name][0] for row in rows)]
    needed = min(SHORTEST, max(len(row.load) for row in rows))
    while (
        len(columns) > 1
        and needed + sum(_breadth(name, rows) + len(GAP) for name in columns) > width
    ):
        columns.pop()
    return columns


def _breadth(name: str, rows: list[Row]) -> int:
    return max(len(name), *(len(row.cells[name][0]) for row in rows))


def _heading(columns: Sequence[str], widths: dict[str, int], room: int) -> Text:
    first, *rest = (name.rjust(widths[name]) for name in columns)
    return Text(
        GAP.join([first, *(["load by expert"[:room].ljust(room)] if room else []), *rest]), "dim"
    )


def _line(
    row: Row, columns: Sequence[str], widths: dict[str, int], room: int, glyphs: CharSet
) -> Text:
    first, *rest = (
        Text(row.cells[name][0].rjust(widths[name]), row.cells[name][1]) for name in columns
    )
    strip = load_strip(row.load, room, glyphs) if row.load and room else Text()
    strip.pad_right(room - len(strip))
    return Text(GAP).join([first, *([strip] if room else []), *rest])


def _legend(experts: int, room: int, glyphs: CharSet) -> str:
    together = experts_a_bar(experts, room)
    share = f"; {together} experts a bar, the busiest shown" if together > 1 else ""
    return f"{glyphs.levels[3]} mean  {glyphs.levels[7]} twice the mean or more  {glyphs.dead} no token{share}"
