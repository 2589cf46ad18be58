"""Numbers as a row of characters: the load of the experts, a curve, a bar, a bar of parts.

Letters: E experts.

The characters a panel is drawn with: blocks and lines, or ASCII where the terminal has no others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from rich.text import Text

FULL = 2.0
"""A bar is full at twice the mean, so the mean is half a bar."""
ROOMY = 64
"""Up to this width an expert gets two to four characters and a gap."""
PARTS = ("cyan", "green", "yellow", "magenta", "blue", "white")


def experts_a_bar(experts: int, width: int) -> int:
    return max(1, -(-experts // max(1, width)))


def strip_width(experts: int, width: int) -> int:
    """What `load_strip` takes of `width`."""
    breadth = _breadth(experts, width)
    if breadth > 1:
        return experts * (breadth + 1) - 1
    return -(-experts // experts_a_bar(experts, width))


def _breadth(experts: int, width: int) -> int:
    """Characters a bar; bars of one stand without a gap."""
    breadth = min(4, (min(width, ROOMY) + 1) // max(1, experts) - 1)
    return breadth if breadth > 1 else 1


def load_strip(load: Sequence[float], width: int, glyphs: CharSet) -> Text:
    """One bar an expert, by id, over the mean of all; several experts share a bar, the busiest's, where `width` is short of E."""
    mean = sum(load) / len(load) if load else 0.0
    together = experts_a_bar(len(load), width)
    bars = [max(load[first : first + together]) for first in range(0, len(load), together)]
    breadth = _breadth(len(load), width)
    drawn = [_load_bar(bar / mean if mean else 0.0, glyphs) for bar in bars]
    gap = " " if breadth > 1 else ""
    runs = [
        (style, gap.join(glyph * breadth for glyph, _ in run))
        for style, run in groupby(drawn, key=itemgetter(1))
    ]
    return Text(gap).join(
        Text(run, style) for style, run in runs
    )  # one piece a colour: rich takes its time for each


def _load_bar(level: float, glyphs: CharSet) -> tuple[str, str]:
    if level <= 0:
        return glyphs.dead, "bold red"
    style = (
        "red"
        if level >= FULL
        else "yellow"
        if level >= 1.5
        else "green"
        if level >= 0.5
        else "blue"
    )
    return glyphs.levels[min(7, math.ceil(level / FULL * 8) - 1)], style


def sparkline(values: Sequence[float | None], width: int, glyphs: CharSet) -> str:
    """`values` from the lowest to the highest, the mean of neighbours where there are more than `width`; a gap where all are None."""
    stretch = max(1.0, len(values) / width)
    points = [
        _mean(values[int(place * stretch) : int((place + 1) * stretch)])
        for place in range(min(width, len(values)))
    ]
    known = [point for point in points if point is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    return "".join(
        " "
        if point is None
        else glyphs.levels[min(7, int((point - low) / span * 8)) if span > 0 else 3]
        for point in points
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def progress_bar(share: float, width: int, glyphs: CharSet) -> Text:
    done = int(width * min(1.0, max(0.0, share)))
    return Text.assemble((glyphs.done * done, "green"), (glyphs.left * (width - done), "dim"))


def parts_bar(parts: Sequence[float], width: int, glyphs: CharSet) -> Text:
    """`parts` of a whole, in order; their lengths sum to `width` exactly."""
    whole, bar, before, shown = sum(parts), Text(), 0.0, 0
    for number, part in enumerate(parts):
        before += part
        end = round(width * before / whole) if whole > 0 else 0
        bar.append(part_glyph(number, glyphs) * (end - shown), part_style(number))
        shown = end
    return bar


def part_glyph(number: int, glyphs: CharSet) -> str:
    return glyphs.parts[number % len(glyphs.parts)]


def part_style(number: int) -> str:
    return PARTS[number % len(PARTS)]


@dataclass(frozen=True)
class CharSet:
    levels: str
    """Eight heights, the lowest first."""
    dead: str
    """An expert that no token chose."""
    done: str
    left: str
    parts: str
    """One fill for each part of a stacked bar; colour tells neighbours apart too, where there is colour."""
    cut: str
    """Stands for what did not fit."""

    def spelled(self, text: str) -> str:
        """`text` as one line without control characters, and in these letters: it may hold what a model wrote, or another user."""
        line = "".join(letter if letter.isprintable() else " " for letter in text)
        return line.encode("ascii", "replace").decode() if self.cut.isascii() else line


UNICODE = CharSet(levels="▁▂▃▄▅▆▇█", dead="x", done="━", left="─", parts="█▓▒░▚━", cut="…")
ASCII = CharSet(levels=".:-=+*#@", dead="x", done="#", left="-", parts="#=+-o~", cut="...")


def charset_for(encoding: str | None, environment: Mapping[str, str]) -> CharSet:
    """By stdout's encoding; ASCII also on the Linux console, whose font has few blocks, and where LC_ALL asks for plain C, although
    Python writes UTF-8 there."""
    poor = environment.get("TERM") == "linux" or environment.get("LC_ALL") in ("C", "POSIX")
    return (
        UNICODE
        if not poor and (encoding or "").lower().replace("-", "").startswith("utf")
        else ASCII
    )
