"""What a run cost and what it reached, as plain numbers: one row of a comparison.

A comparison of two networks says nothing without what each costs, so the costs stand beside the measure: parameters, FLOPs, tokens,
seconds. FLOPs of training are three times those of the forward pass (Kaplan et al. 2020, section 2.1: the backward pass takes twice as
many), which is an upper bound where a part of the model is frozen: its weights need no gradient.

Curves over steps: from metric lines to what page.js draws.

Long runs made small enough to draw: what is left out is never a peak, a trough, the first or the last value.

A screen has some thousand columns; a run may have 100,000 steps. Averages would hide exactly what one looks for (a spike, a step in
which one expert took everything), so nothing is averaged: of each stretch of steps the extreme values stay, as they were measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from dmoe.report.page import Chart, Choice, short
from dmoe.report.run import Record, Run, layers_of
from dmoe.runs.metrics_log import Line, number

FORWARD_AND_BACKWARD = 3
MEASURES = ("bits_per_byte", "accuracy")
"""What people read beside the loss, by the task."""


@dataclass(frozen=True)
class RunSummary:
    """None: not recorded, or the run has no such thing."""

    step: int
    """Of the last line."""
    bits_per_byte: float | None
    accuracy: float | None
    """Held out, at the last evaluation, as is `loss`."""
    loss: float | None
    held_out: float | None
    """Tokens it was measured on."""
    parameters: float | None
    active_parameters: float | None
    trainable_parameters: float | None
    flops_per_token: float | None
    """Of the forward pass; a sample counts as a token where the run learns to tell samples apart."""
    training_flops: float | None
    tokens: float | None
    unit: str
    """What a token is called."""
    seconds: float | None
    """From each start to the last measurement after it: what was measured and undone by a restart was paid for, a pause was not."""
    tokens_per_second: float | None
    """Median."""
    drop_rate: float | None
    """At the last logged step, as is `load_max_over_mean`; None without mixture layers."""
    load_max_over_mean: float | None
    world: float | None
    ep: float | None
    data: str | None
    """The fingerprint."""

    @property
    def partly_trained(self) -> bool:
        """Whether a part of the model is frozen."""
        return (
            None not in (self.trainable_parameters, self.parameters)
            and self.trainable_parameters != self.parameters
        )


def summarize(record: Record) -> RunSummary:
    start, held_out = record.start, record.evals[-1] if record.evals else {}
    routed = record.train[-1] if record.train and layers_of(record.train[-1]) else {}
    forward, tokens = number(start, "flops_per_token"), last_number(record.train, "tokens")
    speeds = [
        value for line in record.train if (value := number(line, "tokens_per_second")) is not None
    ]
    return RunSummary(
        step=record.metrics.lines[-1]["step"] if record.metrics.lines else 0,
        bits_per_byte=number(held_out, "bits_per_byte"),
        accuracy=number(held_out, "accuracy"),
        loss=number(held_out, "loss"),
        held_out=number(held_out, "tokens"),
        parameters=number(start, "parameters"),
        active_parameters=number(start, "active_parameters"),
        trainable_parameters=number(start, "trainable_parameters"),
        flops_per_token=forward,
        training_flops=None
        if forward is None or tokens is None
        else FORWARD_AND_BACKWARD * forward * tokens,
        tokens=tokens,
        unit="sample" if start.get("task") == "classification" else "token",
        seconds=_seconds(record),
        tokens_per_second=median(speeds) if speeds else None,
        drop_rate=number(routed, "drop_rate"),
        load_max_over_mean=number(routed, "load_max_over_mean"),
        world=number(start, "world"),
        ep=number(start, "ep"),
        data=start["data"] if isinstance(start.get("data"), str) else None,
    )


def metric_name(line: Line) -> str:
    """Which measure an evaluation, or one domain of it, is read by: `bits_per_byte`, `accuracy`, or `loss` where it has neither."""
    return next((name for name in MEASURES if name in line), "loss")


def describe_end(record: Record) -> str:
    """How the run ended, in words."""
    step = record.metrics.lines[-1]["step"] if record.metrics.lines else 0
    if record.end is None:
        return f"no end was recorded; the last line is of step {step:,}: still running, or killed"
    if record.end.get("failed"):
        return f"ended by an error after step {step:,}"
    return (
        f"stopped after step {step:,}, and can go on"
        if record.end.get("stopped")
        else f"finished after step {step:,}"
    )


def is_finished(record: Record) -> bool:
    """Whether the run has done all that it was to do."""
    return record.end is not None and not record.end.get("failed") and not record.end.get("stopped")


def last_number(lines: Sequence[Line], *path: str) -> float | None:
    """The last number at `path` there is."""
    return next(
        (value for line in reversed(lines) if (value := number(line, *path)) is not None), None
    )


def latest_by_layer(lines: Sequence[Line], key: str) -> dict[int, Any]:
    """What the last line that has `key` in its layers says of each of them."""
    for line in reversed(lines):
        found = {
            layer: row[key]
            for layer, row in sorted(layers_of(line).items())
            if row.get(key) is not None
        }
        if found:
            return found
    return {}


def _seconds(record: Record) -> float | None:
    """Of all processes that the run has had, one after the other; None where none has measured anything."""
    written = [
        (time, line["event"])
        for line in (*record.metrics.lines, *record.metrics.void)
        if (time := number(line, "time")) is not None
    ]
    began: float | None = None
    spent: list[float] = []
    for time, event in sorted(written, key=lambda pair: pair[0]):
        if event in ("start", "restart"):
            began = time
            spent.append(0.0)
        elif event in ("train", "eval") and began is not None:
            spent[-1] = time - began
    return sum(spent) or None


Reader = Callable[[Line], float | None]
MOST = 1000
"""Points of one curve: about the columns of a screen."""


def curve(
    name: str,
    lines: Sequence[Line],
    read: Reader,
    *,
    colour: int = 0,
    most: int = MOST,
    **style: Any,
) -> dict[str, Any] | None:
    """One curve, thinned; None where no line has the number. `style`: `dash` (an index), `markers`, `depth` (0 to 1, over `colour`)."""
    values = [read(line) for line in lines]
    if all(value is None for value in values):
        return None
    steps, kept = keep_extremes([line["step"] for line in lines], values, most)
    return {
        "name": name,
        "colour": colour,
        "x": steps,
        "y": [short(value) for value in kept],
        **style,
    }


def present(curves: Iterable[dict[str, Any] | None]) -> list[dict[str, Any]]:
    return [item for item in curves if item is not None]


def overlay(
    id: str,
    title: str,
    caption: str,
    unit: str,
    runs: Sequence[Run],
    parts: Mapping[str, Reader],
    **more: Any,
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
            found.append(
                curve(name, run.evals, held_out, colour=colour, dash=len(parts), markers=True)
            )
    curves = present(found)
    view = {"curves": curves, "marks": list(range(len(runs)))}
    return (
        Chart(id, title, caption, "curves", {"": view}, {"x": "step", "y": unit}, **more)
        if curves
        else None
    )


def by_run(
    id: str,
    title: str,
    caption: str,
    unit: str,
    runs: Sequence[Run],
    parts: Mapping[str, Reader],
    **more: Any,
) -> Chart | None:
    """One run at a time, for parts that are too many to overlay. `stack` draws them on top of each other."""
    stack: bool = more.pop("stack", False)
    views = {}
    for index, run in enumerate(runs):
        curves = present(
            curve(part, run.train, read, colour=position, dash=position)
            for position, (part, read) in enumerate(parts.items())
        )
        if curves:
            views[str(index)] = {"curves": curves, "marks": [index], "stack": stack}
    choices = [Choice("Run", [run.name for run in runs])]
    return (
        Chart(id, title, caption, "curves", views, {"x": "step", "y": unit}, choices, **more)
        if views
        else None
    )


def _name(run: str, part: str) -> str:
    return ", ".join(word for word in (run, part) if word)


def keep_extremes(
    steps: Sequence[int], values: Sequence[float | None], most: int
) -> tuple[list[int], list[float | None]]:
    """At most `most` of the points: of each stretch its lowest and its highest. A gap (None) stays where a whole stretch is one."""
    count = len(steps)
    if count <= most:
        return list(steps), list(values)
    kept = {0, count - 1}
    for stretch in _stretches(count, max(1, (most - 2) // 2)):
        present = [index for index in stretch if values[index] is not None]
        kept |= (
            {
                min(present, key=lambda i: values[i] or 0.0),
                max(present, key=lambda i: values[i] or 0.0),
            }
            if present
            else set()
        )
        kept |= set() if present else {stretch[0]}
    order = sorted(kept)
    return [steps[index] for index in order], [values[index] for index in order]


def most_imbalanced_steps(badness: Sequence[float], most: int) -> list[int]:
    """Indices of at most `most` items: the worst of each stretch, and the last one, ascending."""
    count = len(badness)
    if count <= most:
        return list(range(count))
    kept = {
        max(stretch, key=lambda i: badness[i])
        for stretch in _stretches(count - 1, max(1, most - 1))
    }
    return sorted(kept | {count - 1})


def _stretches(count: int, parts: int) -> list[range]:
    bounds = [count * part // parts for part in range(parts + 1)]
    return [range(low, high) for low, high in itertools.pairwise(bounds) if high > low]
