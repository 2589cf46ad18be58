"""Charts as data: curves over steps and matrices, in the form that page.js draws.

Curves are thinned to the width of a screen. Averages would hide what a reader looks for (a spike, a
step in which one expert got everything), so nothing is averaged: of each stretch of steps the
smallest and the largest value stay, as they were measured.

A quantity that did not change, or was measured once, is a few words instead of a chart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any, Literal

from dmoe.report.format import format_bytes, format_number, format_percent
from dmoe.report.page import Chart, Panel, Selector, round_number
from dmoe.report.run import Run, layers_of
from dmoe.runs.metrics_log import Line, finite, number, numbers

Reader = Callable[[Line], float | None]
"""Reads one number from a metrics line."""
View = dict[str, Any]
"""What a chart draws for one combination of its selectors; plain JSON."""
MAX_POINTS = 1000
"""Points per curve, about the pixel columns of a chart."""
MAX_MATRIX_CELLS = 120_000
"""Cells of one matrix chart over all runs and layers: about 0.6 MB of HTML."""
MAX_CONSTANTS = 4
"""Curves of a chart that is said in words."""
FORMATS: dict[str, Callable[[float], str]] = {
    "share": format_percent,
    "bytes": format_bytes,
    "bytes per step": format_bytes,
}
"""By unit; all others are numbers with their unit."""
NO_UNITS = ("raw", "ratio", "factor", "norm", "score", "logit", "rate", "experts", "")
"""Units that say no more than the title."""


def at(*path: str) -> Reader:
    """Return a reader of the number at `path`."""
    return lambda line: number(line, *path)


def layer_mean(key: str, position: int | None = None) -> Reader:
    """Return a reader of the mean over MoE layers of `key`, or of one position of its list."""
    return partial(_layer_mean, key, position)


def layer_sum(key: str) -> Reader:
    """Return a reader of the sum over MoE layers of `key`."""

    def read(line: Line) -> float | None:
        values = [finite(row.get(key)) for row in layers_of(line).values()]
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    return read


def _layer_mean(key: str, position: int | None, line: Line) -> float | None:
    values = []
    for row in layers_of(line).values():
        value = finite(row.get(key))
        if position is not None:
            several = numbers(row.get(key))
            value = several[position] if position < len(several) else None
        if value is not None:
            values.append(value)
    return fmean(values) if values else None


@dataclass(frozen=True)
class CurveChart:
    """Description of one chart of curves over steps."""

    id: str
    title: str
    caption: str
    unit: str
    train: Mapping[str, Reader] = field(default_factory=dict)
    """Readers of train lines by name of the curve; "" names it like the run or the chart."""
    evaluation: Reader | None = None
    """Reader of evaluation lines, drawn with markers."""
    layout: Literal["overlay", "per_run", "stacked"] = "overlay"
    """All runs in one view, one run at a time, or that with the curves stacked."""


def curve_panel(
    id: str, title: str, charts: Sequence[CurveChart], runs: Sequence[Run], absent: str
) -> Panel:
    """Build a panel of curve charts.

    Args:
        id: anchor of the panel.
        title: its heading.
        charts: descriptions; charts without data are left out.
        runs: the runs.
        absent: sentence in place of the charts if none has data.
    """
    built = [chart for spec in charts if (chart := build_curve_chart(spec, runs)) is not None]
    constant = [text for chart in built if (text := describe_constant(chart)) is not None]
    drawn = [chart for chart in built if describe_constant(chart) is None]
    return Panel(id, title, [] if built else [absent], charts=drawn, constant=constant)


def describe_constant(chart: Chart) -> str | None:
    """Return title and value of a chart whose curves do not change; None if one of them does."""
    found: dict[str, str] = {}
    for view in chart.views.values():
        for curve in view["curves"]:
            points = [
                pair for pair in zip(curve["x"], curve["y"], strict=True) if pair[1] is not None
            ]
            if len({value for _, value in points}) > 1:
                return None
            text = _format_value(points[0][1], chart.axes["y"])
            if len(points) == 1:
                text += f" (step {points[0][0]:,} only)"
            found[curve["name"]] = text
    if len(set(found.values())) == 1:
        return f"{chart.title}: {next(iter(found.values()))}"
    if len(found) > MAX_CONSTANTS:
        return None
    return f"{chart.title}: {', '.join(f'{name} {value}' for name, value in found.items())}"


def _format_value(value: float, unit: str) -> str:
    if unit in FORMATS:
        return FORMATS[unit](value)
    return format_number(value) + ("" if unit in NO_UNITS else f" {unit}")


def build_curve_chart(chart: CurveChart, runs: Sequence[Run]) -> Chart | None:
    """Read the curves of a chart; None if no run has recorded any of them."""
    axes = {"x": "step", "y": chart.unit}
    if chart.layout == "overlay":
        curves = _overlaid_curves(chart, runs)
        views = {"": {"curves": curves, "marks": list(range(len(runs)))}} if curves else {}
        selectors = []
    else:
        views = {}
        for index, run in enumerate(runs):
            if curves := _run_curves(chart, run):
                stacked = chart.layout == "stacked"
                views[str(index)] = {"curves": curves, "marks": [index], "stack": stacked}
        selectors = [Selector("Run", [run.name for run in runs])]
    if not views:
        return None
    return Chart(chart.id, chart.title, chart.caption, "curves", views, axes, selectors)


def _overlaid_curves(chart: CurveChart, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Read the curves of all runs.

    One run has a colour per curve. Several runs have a colour per run and a dash per curve.
    """
    curves: list[dict[str, Any] | None] = []
    several = len(runs) > 1
    for index, run in enumerate(runs):
        prefix = [run.name] if several else []
        for position, (part, read) in enumerate(chart.train.items()):
            name = ", ".join([*prefix, *([part] if part else [])]) or chart.title
            colour = index if several else position
            curves.append(make_curve(name, run.train, read, colour=colour, dash=position))
        if chart.evaluation is not None:
            position = len(chart.train)
            style = {"colour": index if several else position, "dash": position, "markers": True}
            name = ", ".join([*prefix, "validation"])
            curves.append(make_curve(name, run.evals, chart.evaluation, **style))
    return [curve for curve in curves if curve is not None]


def _run_curves(chart: CurveChart, run: Run) -> list[dict[str, Any]]:
    lines = run.train
    if chart.layout == "stacked":
        # Stacked curves need the same steps, so they are thinned by their sum.
        sums = [[read(line) or 0.0 for read in chart.train.values()] for line in lines]
        lines = [lines[index] for index in extreme_indices(list(map(sum, sums)), MAX_POINTS)]
    curves = [
        make_curve(name, lines, read, colour=position, dash=position)
        for position, (name, read) in enumerate(chart.train.items())
    ]
    return [curve for curve in curves if curve is not None]


def make_curve(
    name: str,
    lines: Sequence[Line],
    read: Reader,
    *,
    colour: int = 0,
    max_points: int = MAX_POINTS,
    **style: Any,
) -> dict[str, Any] | None:
    """Read one curve and thin it.

    Args:
        name: label of the curve.
        lines: metrics lines by ascending step.
        read: reads the value from a line; None leaves a gap.
        colour: index into the palette.
        max_points: largest number of points.
        style: `dash` (index), `markers` (bool), `depth` (0 to 1, instead of `colour`).

    Returns:
        The curve as plain JSON; None if no line has a value.
    """
    values = [read(line) for line in lines]
    if all(value is None for value in values):
        return None
    steps, kept = keep_extremes([line["step"] for line in lines], values, max_points)
    rounded = [round_number(value) for value in kept]
    return {"name": name, "colour": colour, "x": steps, "y": rounded, **style}


def build_matrix_chart(
    chart: Chart, runs: Sequence[Run], views: Sequence[Mapping[str, View]]
) -> Chart | None:
    """Fill a matrix chart with selectors for run and layer; None if there is no view.

    Args:
        chart: chart without views and selectors.
        runs: the runs.
        views: per run, the views by label of the layer. Only as many layers are kept as fit the
            page, and the caption reports it.
    """
    labels = max((list(by_label) for by_label in views), key=len, default=[])
    if not labels:
        return None
    largest = max(
        len(view["z"]) * len(view["z"][0]) for by_label in views for view in by_label.values()
    )
    fitting = max(1, MAX_MATRIX_CELLS // (largest * len(runs)))
    caption = chart.caption
    if fitting < len(labels):
        caption += f" Only the first {fitting} of {len(labels)} layers are in this page."
    shown = labels[:fitting]
    kept = {
        f"{index}|{position}": by_label[label]
        for index, by_label in enumerate(views)
        for position, label in enumerate(shown)
        if label in by_label
    }
    selectors = [Selector("Run", [run.name for run in runs]), Selector("Layer", shown)]
    return Chart(chart.id, chart.title, caption, "matrix", kept, chart.axes, selectors)


def keep_extremes(
    steps: Sequence[int], values: Sequence[float | None], max_points: int
) -> tuple[list[int], list[float | None]]:
    """Keep the smallest and the largest value of each stretch, and the first and last point.

    A gap (None) stays if a whole stretch is a gap.
    """
    order = extreme_indices(values, max_points)
    return [steps[index] for index in order], [values[index] for index in order]


def extreme_indices(values: Sequence[float | None], max_points: int) -> list[int]:
    """Return the indices of the points that `keep_extremes` keeps, ascending."""
    length = len(values)
    if length <= max_points:
        return list(range(length))
    kept = {0, length - 1}
    for stretch in _stretches(length, max(1, (max_points - 2) // 2)):
        known = {index: value for index in stretch if (value := values[index]) is not None}
        if known:
            kept |= {min(known, key=known.__getitem__), max(known, key=known.__getitem__)}
        else:
            kept.add(stretch[0])
    return sorted(kept)


def most_imbalanced_steps(imbalance: Sequence[float], max_steps: int) -> list[int]:
    """Return at most `max_steps` indices, ascending: the worst per stretch, and the last one."""
    length = len(imbalance)
    if length <= max_steps:
        return list(range(length))
    stretches = _stretches(length - 1, max(1, max_steps - 1))
    worst = {max(stretch, key=lambda index: imbalance[index]) for stretch in stretches}
    return sorted(worst | {length - 1})


def _stretches(length: int, parts: int) -> list[range]:
    bounds = [length * part // parts for part in range(parts + 1)]
    return [range(low, high) for low, high in itertools.pairwise(bounds) if high > low]
