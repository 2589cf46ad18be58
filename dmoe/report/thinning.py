"""Long runs made small enough to draw: what is left out is never a peak, a trough, the first or the last value.

A screen has some thousand columns; a run may have 100,000 steps. Averages would hide exactly what one looks for (a spike, a step in
which one expert took everything), so nothing is averaged: of each stretch of steps the extreme values stay, as they were measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

__all__ = ["extremes", "worst_of_each_stretch"]


def extremes(steps: Sequence[int], values: Sequence[float | None], most: int) -> tuple[list[int], list[float | None]]:
    """At most `most` of the points: of each stretch its lowest and its highest. A gap (None) stays where a whole stretch is one."""
    count = len(steps)
    if count <= most:
        return list(steps), list(values)
    kept = {0, count - 1}
    for stretch in _stretches(count, max(1, (most - 2) // 2)):
        present = [index for index in stretch if values[index] is not None]
        kept |= (
            {min(present, key=lambda i: values[i] or 0.0), max(present, key=lambda i: values[i] or 0.0)} if present else set()
        )
        kept |= set() if present else {stretch[0]}
    order = sorted(kept)
    return [steps[index] for index in order], [values[index] for index in order]


def worst_of_each_stretch(badness: Sequence[float], most: int) -> list[int]:
    """Indices of at most `most` items: the worst of each stretch, and the last one, ascending."""
    count = len(badness)
    if count <= most:
        return list(range(count))
    kept = {max(stretch, key=lambda i: badness[i]) for stretch in _stretches(count - 1, max(1, most - 1))}
    return sorted(kept | {count - 1})


def _stretches(count: int, parts: int) -> list[range]:
    bounds = [count * part // parts for part in range(parts + 1)]
    return [range(low, high) for low, high in itertools.pairwise(bounds) if high > low]
