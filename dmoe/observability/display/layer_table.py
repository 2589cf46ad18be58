"""Table of the MoE layers: load per expert, dead experts, drop rate, router entropy.

Letters: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich.text import Text

from dmoe.runs.metrics_log import finite, number, numbers

GAP = "  "
FULL_BAR = 2.0
"""Load of a full bar as a multiple of the mean: the mean is half a bar."""
MAX_WIDE_BARS = 64
"""Width in characters up to which a bar is two to four characters wide, with a gap."""
MIN_BARS_WIDTH = 16
"""Smallest useful width of all bars, in characters."""
COLUMNS = ("layer", "max/mean", "drop", "dead", "min/mean", "entropy")
"""Columns in order of importance; the bars stand behind the first."""
WARN_FROM = {"max/mean": 2.0, "drop": 0.1, "dead": 1}
"""Values from which a cell is yellow."""


@dataclass(frozen=True)
class CharSet:
    """Characters of the panel: blocks and lines, or ASCII where the terminal has no others."""

    levels: str
    """Bars of eight heights, the lowest first."""
    dead: str
    """Bar of an expert without tokens."""
    done: str
    left: str
    parts: str
    """One fill per part of a stacked bar; where there is colour, it separates the parts too."""
    cut: str
    """Mark of truncated text."""

    def printable(self, text: str) -> str:
        """Return `text` on one line without control characters, in this character set.

        The text may hold a model's output or another user's input.
        """
        line = "".join(letter if letter.isprintable() else " " for letter in text)
        return line.encode("ascii", "replace").decode() if self.cut.isascii() else line


UNICODE = CharSet(levels="▁▂▃▄▅▆▇█", dead="x", done="━", left="─", parts="█▓▒░▚━", cut="…")
ASCII = CharSet(levels=".:-=+*#@", dead="x", done="#", left="-", parts="#=+-o~", cut="...")


def charset_for(encoding: str | None, environment: Mapping[str, str]) -> CharSet:
    """Choose the character set by stdout's encoding.

    ASCII also on the Linux console, whose font has few blocks, and where LC_ALL is plain C,
    although Python writes UTF-8 there.
    """
    limited = environment.get("TERM") == "linux" or environment.get("LC_ALL") in ("C", "POSIX")
    utf = (encoding or "").lower().replace("-", "").startswith("utf")
    return UNICODE if utf and not limited else ASCII


def load_bars(load: Sequence[float], width: int, charset: CharSet) -> Text:
    """Draw one bar per expert, by id, relative to the mean load.

    Where `width` is less than E, neighbouring experts share a bar, which shows the highest load.
    """
    mean = sum(load) / len(load) if load else 0.0
    per_bar = experts_per_bar(len(load), width)
    highest = [max(load[first : first + per_bar]) for first in range(0, len(load), per_bar)]
    bar_width = _bar_width(len(load), width)
    drawn = [_load_bar(value / mean if mean else 0.0, charset) for value in highest]
    gap = " " if bar_width > 1 else ""
    # One piece per run of equal colour: rich's cost grows with the number of pieces.
    pieces = [
        Text(gap.join(char * bar_width for char, _ in run), style)
        for style, run in groupby(drawn, key=itemgetter(1))
    ]
    return Text(gap).join(pieces)


def load_bars_width(experts: int, width: int) -> int:
    """Return the part of `width` that `load_bars` needs."""
    bar_width = _bar_width(experts, width)
    if bar_width > 1:
        return experts * (bar_width + 1) - 1
    return -(-experts // experts_per_bar(experts, width))


def experts_per_bar(experts: int, width: int) -> int:
    """Return the number of experts that share one bar."""
    return max(1, -(-experts // max(1, width)))


def _bar_width(experts: int, width: int) -> int:
    """Characters per bar; bars of one character stand without a gap."""
    bar_width = min(4, (min(width, MAX_WIDE_BARS) + 1) // max(1, experts) - 1)
    return bar_width if bar_width > 1 else 1


def _load_bar(level: float, charset: CharSet) -> tuple[str, str]:
    """Character and colour of a load of `level` times the mean."""
    if level <= 0:
        return charset.dead, "bold red"
    colours = ((FULL_BAR, "red"), (1.5, "yellow"), (0.5, "green"), (0.0, "blue"))
    colour = next(colour for lowest, colour in colours if level >= lowest)
    return charset.levels[min(7, math.ceil(level / FULL_BAR * 8) - 1)], colour


@dataclass(frozen=True)
class LayerRow:
    """One row of the table."""

    load: list[float]
    cells: dict[str, tuple[str, str]]
    """Text and style by column."""
    severity: tuple[float, float, float]
    """Sort key: dead experts, imbalance, drop rate."""


def layer_table(layers: Any, width: int, height: int, charset: CharSet) -> list[Text]:
    """Draw the table: a heading, one row per layer, a line on omitted layers, a legend.

    Args:
        layers: value of `layers` in a `train` line.
        width: characters per line at most.
        height: lines at most. Where not all layers fit, the ones in the worst state are kept.
        charset: characters of the terminal.

    Returns:
        The lines; none if there are no layers.
    """
    found = enumerate(layers) if isinstance(layers, list) else ()
    rows = [_layer_row(layer, index) for index, layer in found if isinstance(layer, dict)]
    if not rows or height < 2:
        return []
    shown, notes = _select_rows(rows, height - 1)
    columns = _select_columns(rows, width)
    widths = {name: _column_width(name, rows) for name in columns}
    experts = max(len(row.load) for row in rows)
    free = width - sum(widths.values()) - len(GAP) * len(columns)
    bars_width = load_bars_width(experts, free) if experts else 0
    lines = [_heading(widths, bars_width)]
    lines += [_draw_row(row, widths, bars_width, charset) for row in shown]
    if len(lines) + len(notes) < height and experts:
        notes = [*notes, _legend(experts, bars_width, charset)]
    lines += [Text(note, "dim") for note in notes]
    for line in lines:
        line.truncate(width)
    return lines


def _layer_row(layer: dict[str, Any], index: int) -> LayerRow:
    load = numbers(layer.get("load"))
    mean = sum(load) / len(load) if load else 0.0
    highest, lowest = number(layer, "load_max_over_mean"), None
    if mean:
        highest, lowest = max(load) / mean, min(load) / mean
    drop, dead = number(layer, "drop_rate"), number(layer, "dead_experts")
    if dead is None and load:
        dead = load.count(0)
    texts = {
        "layer": f"{layer.get('layer', index)}",
        "max/mean": _format(highest, "{:.2f}") + (f" e{load.index(max(load))}" if mean else ""),
        "min/mean": "" if lowest is None else f"{lowest:.2f} e{load.index(min(load))}",
        "drop": _format(drop, "{:.1%}"),
        "dead": _format(dead, "{:.0f}"),
        "entropy": _format(number(layer, "router_entropy"), "{:.2f}"),
    }
    values = {"max/mean": highest, "drop": drop, "dead": dead}
    warned = {name for name, limit in WARN_FROM.items() if (values[name] or 0) >= limit}
    cells = {name: (text, "yellow" if name in warned else "") for name, text in texts.items()}
    return LayerRow(load, cells, (dead or 0, highest or 0, drop or 0))


def _format(value: float | None, template: str) -> str:
    return "" if finite(value) is None else template.format(value)


def _select_rows(rows: list[LayerRow], height: int) -> tuple[list[LayerRow], list[str]]:
    """Rows to show, in order, and a line on the omitted ones."""
    if len(rows) <= height:
        return rows, []
    by_severity = sorted(range(len(rows)), key=lambda i: rows[i].severity, reverse=True)
    kept = set(by_severity[: height - 1])
    omitted = [row for i, row in enumerate(rows) if i not in kept]
    imbalance = max(row.severity[1] for row in omitted)
    drop = max(row.severity[2] for row in omitted)
    note = f"and {len(omitted)} more: max/mean at most {imbalance:.2f}, drop at most {drop:.1%}"
    return [rows[i] for i in sorted(kept)], [note]


def _select_columns(rows: list[LayerRow], width: int) -> list[str]:
    """Columns that hold something and leave the bars enough width."""
    columns = [name for name in COLUMNS if any(row.cells[name][0] for row in rows)]
    bars_width = min(MIN_BARS_WIDTH, max(len(row.load) for row in rows))
    while len(columns) > 1:
        if bars_width + sum(_column_width(name, rows) + len(GAP) for name in columns) <= width:
            break
        columns.pop()
    return columns


def _column_width(name: str, rows: list[LayerRow]) -> int:
    return max(len(name), *(len(row.cells[name][0]) for row in rows))


def _heading(widths: dict[str, int], bars_width: int) -> Text:
    first, *rest = (name.rjust(width) for name, width in widths.items())
    bars = ["load by expert"[:bars_width].ljust(bars_width)] if bars_width else []
    return Text(GAP.join([first, *bars, *rest]), "dim")


def _draw_row(row: LayerRow, widths: dict[str, int], bars_width: int, charset: CharSet) -> Text:
    first, *rest = (
        Text(row.cells[name][0].rjust(width), row.cells[name][1]) for name, width in widths.items()
    )
    bars = load_bars(row.load, bars_width, charset) if row.load and bars_width else Text()
    bars.pad_right(bars_width - len(bars))
    return Text(GAP).join([first, *([bars] if bars_width else []), *rest])


def _legend(experts: int, bars_width: int, charset: CharSet) -> str:
    per_bar = experts_per_bar(experts, bars_width)
    shared = f"; {per_bar} experts per bar, the highest load shown" if per_bar > 1 else ""
    mean, full = charset.levels[3], charset.levels[7]
    return f"{mean} mean  {full} twice the mean or more  {charset.dead} no tokens{shared}"
