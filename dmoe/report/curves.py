"""Curves over steps: from metric lines to what page.js draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dmoe.report.metrics import Line
from dmoe.report.page import Chart, Choice, short
from dmoe.report.run import Run
from dmoe.report.thinning import extremes

__all__ = ["Reader", "by_run", "curve", "overlay"]

Reader = Callable[[Line], float | None]
MOST = 1000
"""Points of one curve: about the columns of a screen."""


def curve(
    name: str, lines: Sequence[Line], read: Reader, *, colour: int = 0, most: int = MOST, **style: Any
) -> dict[str, Any] | None:
    """One curve, thinned; None where no line has the number. `style`: `dash` (an index), `markers`, `depth` (0 to 1, over `colour`)."""
    values = [read(line) for line in lines]
    if all(value is None for value in values):
        return None
    steps, kept = extremes([line["step"] for line in lines], values, most)
    return {"name": name, "colour": colour, "x": steps, "y": [short(value) for value in kept], **style}


def present(curves: Iterable[dict[str, Any] | None]) -> list[dict[str, Any]]:
    return [item for item in curves if item is not None]


def overlay(
    id: str, title: str, caption: str, unit: str, runs: Sequence[Run], parts: Mapping[str, Reader], **more: Any
) -> Chart | None:
    """All runs in one chart. One run: a colour for each part. Several: a colour for each run, a dash for each part.

    `parts` read train lines. `held_out`, where it is given, reads eval lines and is drawn with markers.
    """
    held_out: Reader | None = more.pop("held_out", None)
    found: list[dict[str, Any] | None] = []
    for index, run in enumerate(runs):
        for position, (part, read) in enumerate(parts.items()):
            name = _name(run.name if len(runs) > 1 else "", part) or title
            colour, dash = (index, position) if len(runs) > 1 else (position, position)
            found.append(curve(name, run.train, read, colour=colour, dash=dash))
        if held_out is not None:
            colour = index if len(runs) > 1 else len(parts)
            name = _name(run.name if len(runs) > 1 else "", "held-out")
            found.append(curve(name, run.evals, held_out, colour=colour, dash=len(parts), markers=True))
    curves = present(found)
    view = {"curves": curves, "marks": list(range(len(runs)))}
    return Chart(id, title, caption, "curves", {"": view}, {"x": "step", "y": unit}, **more) if curves else None


def by_run(
    id: str, title: str, caption: str, unit: str, runs: Sequence[Run], parts: Mapping[str, Reader], **more: Any
) -> Chart | None:
    """One run at a time, for parts that are too many to overlay. `stack` draws them on top of each other."""
    stack: bool = more.pop("stack", False)
    views = {}
    for index, run in enumerate(runs):
        curves = present(
            curve(part, run.train, read, colour=position, dash=position) for position, (part, read) in enumerate(parts.items())
        )
        if curves:
            views[str(index)] = {"curves": curves, "marks": [index], "stack": stack}
    choices = [Choice("Run", [run.name for run in runs])]
    return Chart(id, title, caption, "curves", views, {"x": "step", "y": unit}, choices, **more) if views else None


def _name(run: str, part: str) -> str:
    return ", ".join(word for word in (run, part) if word)
