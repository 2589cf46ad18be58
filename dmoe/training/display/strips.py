"""Numbers as a row of characters: the load of the experts, a curve, a bar, a bar of parts.

Letters: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

from rich.text import Text

from dmoe.training.display.glyphs import CharSet

__all__ = ["experts_a_bar", "load_strip", "parts_bar", "progress_bar", "sparkline", "strip_width"]

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
    runs = [(style, gap.join(glyph * breadth for glyph, _ in run)) for style, run in groupby(drawn, key=itemgetter(1))]
    return Text(gap).join(Text(run, style) for style, run in runs)  # one piece a colour: rich takes its time for each


def _load_bar(level: float, glyphs: CharSet) -> tuple[str, str]:
    if level <= 0:
        return glyphs.dead, "bold red"
    style = "red" if level >= FULL else "yellow" if level >= 1.5 else "green" if level >= 0.5 else "blue"
    return glyphs.levels[min(7, math.ceil(level / FULL * 8) - 1)], style


def sparkline(values: Sequence[float | None], width: int, glyphs: CharSet) -> str:
    """`values` from the lowest to the highest, the mean of neighbours where there are more than `width`; a gap where all are None."""
    stretch = max(1.0, len(values) / width)
    points = [_mean(values[int(place * stretch) : int((place + 1) * stretch)]) for place in range(min(width, len(values)))]
    known = [point for point in points if point is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    return "".join(
        " " if point is None else glyphs.levels[min(7, int((point - low) / span * 8)) if span > 0 else 3] for point in points
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
