"""Where the tokens went: the load of every expert, at every logged step and at the last.

Letters: E experts, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any

from dmoe.report.figures import most_imbalanced_steps
from dmoe.report.format import format_number
from dmoe.report.page import Chart, Choice, Panel, Table, short
from dmoe.report.run import Run, layers_of
from dmoe.runs.metrics_log import numbers

CELLS = 700_000
"""Of all heat-maps over steps together: about 4 MB of HTML."""
COLUMNS = (24, 600)
"""Fewest and most steps of one heat-map."""
HOTTEST = 12
"""Layers in the table of hottest and coldest experts, the least even first."""


def loads(runs: Sequence[Run]) -> Panel:
    """Load by expert and step, by expert and layer, and who is hottest and coldest."""
    history = [_history(run) for run in runs]
    if not any(history):
        return Panel(
            "experts", "Experts", ["No load was recorded: a dense model, or no step was logged."]
        )
    columns = _columns(history)
    views = {
        f"{index}|{position}": load_view(steps_and_loads, columns)
        for index, layers in enumerate(history)
        for position, steps_and_loads in enumerate(layers.values())
    }
    most = max(history, key=len)
    names = [run.name for run in runs]
    longest = max(len(pairs) for layers in history for pairs in layers.values())
    thinned = (
        f" Of {longest:,} logged steps {columns} are drawn: of each stretch, the least even one."
        if longest > columns
        else ""
    )
    over_time = Chart(
        "load",
        "Load of each expert over time",
        "Choices an expert got, before any drop, as a multiple of the fair share (the mean over the experts of that step). "
        f"1 is perfect balance.{thinned}",
        "matrix",
        views,
        {
            "x": "step",
            "y": "expert",
            "z": "times the fair share",
            "count": "choices",
            "fair": "column",
        },
        [Choice("Run", names), Choice("Layer", [f"layer {layer}" for layer in most])],
        wide=True,
    )
    last = {str(index): _last_view(layers) for index, layers in enumerate(history) if layers}
    by_layer = Chart(
        "load-last",
        "Load by layer at the last logged step",
        "The same measure for every layer at once: a row is a MoE layer, a column an expert.",
        "matrix",
        last,
        {
            "x": "expert",
            "y": "layer",
            "z": "times the fair share",
            "count": "choices",
            "fair": "row",
        },
        [Choice("Run", names)],
        wide=True,
    )
    return Panel(
        "experts", "Experts", charts=[over_time, by_layer], tables=[_hottest(runs, history)]
    )


Layers = dict[int, list[tuple[int, list[float]]]]
"""By layer: (step, load of its E experts)."""


def _history(run: Run) -> Layers:
    """Only steps with as many experts as the last one: a run directory that was used twice holds two models."""
    found: Layers = {}
    for line in run.train:
        for layer, row in layers_of(line).items():
            if load := numbers(row.get("load")):
                found.setdefault(layer, []).append((line["step"], load))
    return {
        layer: [pair for pair in pairs if len(pair[1]) == len(pairs[-1][1])]
        for layer, pairs in sorted(found.items())
    }


def _columns(history: Sequence[Layers]) -> int:
    experts = sum(len(pairs[-1][1]) for layers in history for pairs in layers.values())
    low, high = COLUMNS
    return min(high, max(low, CELLS // experts))


def load_view(pairs: Sequence[tuple[int, list[float]]], columns: int) -> dict[str, Any]:
    """The matrix of one layer, expert by step, in choices as they were counted."""
    kept = most_imbalanced_steps([max_over_mean(load) for _, load in pairs], columns)
    chosen = [pairs[index] for index in kept]
    experts = range(len(chosen[-1][1]))
    return {
        "x": [step for step, _ in chosen],
        "y": list(experts),
        "z": [[short(load[expert]) for _, load in chosen] for expert in experts],
    }


def max_over_mean(load: Sequence[float]) -> float:
    mean = fmean(load)
    return max(load) / mean if mean else 1.0


def _last_view(layers: Layers) -> dict[str, Any]:
    """Layer by expert at each layer's last step. Layers with fewer experts end earlier."""
    width = max(len(pairs[-1][1]) for pairs in layers.values())
    rows = [[short(value) for value in pairs[-1][1]] for pairs in layers.values()]
    return {
        "x": list(range(width)),
        "y": list(layers),
        "z": [row + [None] * (width - len(row)) for row in rows],
    }


def _hottest(runs: Sequence[Run], history: Sequence[Layers]) -> Table:
    rows: list[tuple[float, list[str]]] = []
    for run, layers in zip(runs, history, strict=True):
        for layer, pairs in layers.items():
            step, load = pairs[-1]
            mean = fmean(load) or 1.0
            order = sorted(range(len(load)), key=lambda expert: -load[expert])
            cells = [
                f"{run.name}, layer {layer}" if len(runs) > 1 else f"layer {layer}",
                f"{step:,}",
                format_number(max_over_mean(load), 3),
                format_number(pstdev(load) / mean, 3),
                str(sum(value == 0 for value in load)),
                ", ".join(f"{expert} ({load[expert] / mean:.2f})" for expert in order[:3]),
                ", ".join(
                    f"{expert} ({load[expert] / mean:.2f})" for expert in reversed(order[-3:])
                ),
            ]
            rows.append((max_over_mean(load), cells))
    rows.sort(key=lambda row: -row[0])
    shown = (
        f"the {HOTTEST} least even of {len(rows)} layers"
        if len(rows) > HOTTEST
        else "the least even layer first"
    )
    return Table(
        f"Hottest and coldest experts at the last logged step, {shown}; in brackets the load as a multiple of the fair share",
        [
            "Layer",
            "Step",
            "Max / mean",
            "Coefficient of variation",
            "Without any token",
            "Hottest",
            "Coldest",
        ],
        [cells for _, cells in rows[:HOTTEST]],
    )
