"""The chart of loss, bits per byte and accuracy, over steps, tokens or time.

The training curve is drawn twice: as measured, and smoothed by an exponential mean of the values
before and after: s_t = sum_i b^|t - i| x_i / sum_i b^|t - i|, b = 2^(-60 / n): its half-life is
a sixtieth of the n logged steps. It is computed before the curve is thinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dmoe.report.charts import MAX_POINTS, Reader, at, extreme_indices
from dmoe.report.page import Chart, Selector, round_number
from dmoe.report.run import Record, Run
from dmoe.runs.metrics_log import Line, number

QUANTITIES = {
    "Bits per byte": ("bits_per_byte", "bits per byte"),
    "Accuracy": ("accuracy", "share"),
    "Loss": ("loss", "nats per target"),
}
"""Key and unit by title."""
SMOOTHING_PARTS = 60


def quality_chart(runs: Sequence[Run]) -> Chart | None:
    """Build the chart; None if no run has recorded a loss."""
    found = {title: _curves(runs, key) for title, (key, _) in QUANTITIES.items()}
    views = {title: curves for title, curves in found.items() if curves}
    if not views:
        return None
    several = "one colour per run; " if len(runs) > 1 else ""
    return Chart(
        "loss",
        "Validation and training",
        f"Points: validation data. Line: the training batches, smoothed ({several}faint: as "
        "measured). The axis leaves out the first steps; “all” shows them.",
        "curves",
        {
            str(position): {
                "curves": curves,
                "marks": list(range(len(runs))),
                "y": QUANTITIES[title][1],
            }
            for position, (title, curves) in enumerate(views.items())
        },
        {"x": "step", "y": ""},
        [Selector("Quantity", list(views), is_switch=True)],
        {
            "x": ["steps", "tokens", "time", "log steps"],
            "range": ["useful range", "all"],
        },
    )


def _curves(runs: Sequence[Run], key: str) -> list[dict[str, Any]]:
    curves = []
    for index, run in enumerate(runs):
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        parts = {"training": run.train, "validation": run.evals}
        for part, lines in parts.items():
            style = {"colour": index if len(runs) > 1 else int(part == "validation"), "dash": 0}
            if part == "validation":
                style["markers"] = True
            curve = _curve(f"{prefix}{part}", run, lines, at(key), smoothed=part == "training")
            if curve is not None:
                curves.append(curve | style)
    return curves


def _curve(
    name: str, run: Run, lines: Sequence[Line], read: Reader, *, smoothed: bool
) -> dict[str, Any] | None:
    """Return a curve with its steps, tokens and seconds; None if no line has a value."""
    values = [read(line) for line in lines]
    if all(value is None for value in values):
        return None
    kept = extreme_indices(values, MAX_POINTS)
    seconds = _elapsed_seconds(run, lines)
    curve: dict[str, Any] = {
        "name": name,
        "x": [lines[index]["step"] for index in kept],
        "tokens": [round_number(tokens) for tokens in _tokens(run, [lines[i] for i in kept])],
        "seconds": [round_number(seconds[index]) for index in kept],
        "y": [round_number(values[index]) for index in kept],
    }
    if smoothed:
        smooth = smooth_values(values)
        curve["smooth"] = [round_number(smooth[index]) for index in kept]
    return curve


def smooth_values(values: Sequence[float | None]) -> list[float | None]:
    """Return the exponential mean around each value; gaps stay gaps."""
    decay = 2.0 ** (-SMOOTHING_PARTS / max(1, len(values)))
    before = _decayed_sums(values, decay)
    after = _decayed_sums(values[::-1], decay)[::-1]
    found: list[float | None] = []
    for value, (left, left_weight), (right, right_weight) in zip(
        values, before, after, strict=True
    ):
        if value is None:
            found.append(None)
        else:
            # the value itself is in both sums
            found.append((left + right - value) / (left_weight + right_weight - 1.0))
    return found


def _decayed_sums(values: Sequence[float | None], decay: float) -> list[tuple[float, float]]:
    """Return sum and weight of each value and those before it, by their distance."""
    total = weight = 0.0
    sums = []
    for value in values:
        total, weight = total * decay, weight * decay
        if value is not None:
            total, weight = total + value, weight + 1.0
        sums.append((total, weight))
    return sums


def _tokens(run: Run, lines: Sequence[Line]) -> list[float | None]:
    """Return the trained tokens at each line. Every step has as many."""
    known = ((number(line, "tokens"), line["step"]) for line in reversed(run.train))
    tokens, step = next(((n, s) for n, s in known if n is not None and s), (None, 1))
    return [None if tokens is None else tokens / step * line["step"] for line in lines]


def _elapsed_seconds(record: Record, lines: Sequence[Line]) -> list[float | None]:
    """Return the seconds of training at each line, without the pauses between two processes."""
    timed = [
        (time, line["event"])
        for line in (*record.metrics.lines, *record.metrics.void)
        if (time := number(line, "time")) is not None
    ]
    timed.sort(key=lambda pair: pair[0])
    elapsed: dict[float, float] = {}
    seconds = 0.0
    before: float | None = None
    for time, event in timed:
        if before is not None and event not in ("start", "restart"):
            seconds += time - before
        elapsed[time] = seconds
        before = time
    times = [number(line, "time") for line in lines]
    return [None if time is None else elapsed[time] for time in times]
