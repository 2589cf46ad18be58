"""The load of each expert: the heat map of the first screen, the load by layer, the extremes.

Letters: E experts, L MoE layers.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from statistics import fmean, pstdev

from dmoe.report.charts import View, most_imbalanced_steps
from dmoe.report.format import format_number
from dmoe.report.page import Chart, Panel, Selector, Table, round_number
from dmoe.report.run import Run, layers_of
from dmoe.runs.layer_columns import quantize
from dmoe.runs.metrics_log import numbers

MAX_LOAD_CELLS = 700_000
"""Cells of all load matrices over steps together: about 0.9 MB of HTML."""
MAX_EXACT_CELLS = 30_000
"""With more, the counts of a load matrix are in one byte each (`runs.layer_columns.quantize`)."""
MIN_STEPS, MAX_STEPS = 24, 600
"""Steps of one load matrix."""
MAX_LISTED_LAYERS = 12
"""Layers in the table of extreme loads, the least balanced first."""
NUM_EXTREMES = 3
LOAD_AXES = {"z": "times the fair share", "count": "assignments"}

LoadHistory = dict[int, list[tuple[int, list[float]]]]
"""By layer: (step, load of its E experts)."""


def load_chart(runs: Sequence[Run]) -> list[Chart]:
    """Build the chart of the load by expert and step; an empty list if none was recorded."""
    histories = [_load_history(run) for run in runs]
    if not any(histories):
        return []
    num_experts = sum(len(pairs[-1][1]) for layers in histories for pairs in layers.values())
    max_steps = min(MAX_STEPS, max(MIN_STEPS, MAX_LOAD_CELLS // num_experts))
    longest = max(len(pairs) for layers in histories for pairs in layers.values())
    thinned = ""
    if longest > max_steps:
        thinned = (
            f" Of {longest:,} logged steps {max_steps} are drawn: the least balanced step of each "
            "stretch."
        )
    run_selector = Selector("Run", [run.name for run in runs])
    layers = [f"layer {layer}" for layer in max(histories, key=len)]
    steps = min(max_steps, longest)
    exact = num_experts * steps <= MAX_EXACT_CELLS
    over_time = Chart(
        "load",
        "Load of each expert over time",
        "Assignments of an expert before any drop, over the mean of the experts of that step. "
        f"1 is perfect balance.{thinned}",
        "matrix",
        {
            f"{index}|{position}": _load_view(pairs, max_steps, exact)
            for index, layers in enumerate(histories)
            for position, pairs in enumerate(layers.values())
        },
        {"x": "step", "y": "expert", **LOAD_AXES, "fair": "column"},
        [run_selector, Selector("Layer", layers)],
        {"order": ["by number", "by load"]},
    )
    return [over_time]


def load_panel(runs: Sequence[Run]) -> Panel:
    """Build the load by expert and layer, and a table of extremes."""
    histories = [_load_history(run) for run in runs]
    if not any(histories):
        absent = "No load was recorded: a dense model, or no step was logged."
        return Panel("experts", "Experts", [absent])
    by_layer = Chart(
        "load-last",
        "Load by layer at the last logged step",
        "The same for all layers at once: a row is an MoE layer, a column an expert.",
        "matrix",
        {str(index): _last_view(layers) for index, layers in enumerate(histories) if layers},
        {"x": "expert", "y": "layer", **LOAD_AXES, "fair": "row"},
        [Selector("Run", [run.name for run in runs])],
        {"order": ["by number", "by load"]},
        wide=True,
    )
    extremes = _extreme_loads(runs, histories)
    return Panel("experts", "Experts", charts=[by_layer], tables=[extremes])


def _load_history(run: Run) -> LoadHistory:
    """Return the loads by layer, without steps whose number of experts is not the last one's.

    A run directory that was used twice contains two models.
    """
    found: LoadHistory = {}
    for line in run.train:
        for layer, row in layers_of(line).items():
            if load := numbers(row.get("load")):
                found.setdefault(layer, []).append((line["step"], load))
    return {
        layer: [pair for pair in pairs if len(pair[1]) == len(pairs[-1][1])]
        for layer, pairs in sorted(found.items())
    }


def _load_view(pairs: Sequence[tuple[int, list[float]]], max_steps: int, exact: bool) -> View:
    """Return the matrix of one layer, expert by step, in counted assignments.

    Unless exact, its numbers are `codes`: one byte each, in base64, row by row.
    """
    kept = most_imbalanced_steps([_max_over_mean(load) for _, load in pairs], max_steps)
    drawn = [pairs[index] for index in kept]
    experts = range(len(drawn[-1][1]))
    axes = {"x": [step for step, _ in drawn], "y": list(experts)}
    if exact:
        return axes | {
            "z": [[round_number(load[expert]) for _, load in drawn] for expert in experts]
        }
    low, high, codes = quantize([load[expert] for expert in experts for _, load in drawn])
    return axes | {"low": low, "high": high, "codes": base64.b64encode(codes).decode()}


def _max_over_mean(load: Sequence[float]) -> float:
    mean = fmean(load)
    return max(load) / mean if mean else 1.0


def _last_view(layers: LoadHistory) -> View:
    """Return the matrix of layer by expert at each layer's last step, rows filled with None."""
    width = max(len(pairs[-1][1]) for pairs in layers.values())
    rows = [[round_number(value) for value in pairs[-1][1]] for pairs in layers.values()]
    filled = [row + [None] * (width - len(row)) for row in rows]
    return {"x": list(range(width)), "y": list(layers), "z": filled}


def _extreme_loads(runs: Sequence[Run], histories: Sequence[LoadHistory]) -> Table:
    rows: list[tuple[float, list[str]]] = []
    for run, layers in zip(runs, histories, strict=True):
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        for layer, pairs in layers.items():
            step, load = pairs[-1]
            cells = [f"{prefix}layer {layer}", f"{step:,}", *_load_cells(load)]
            rows.append((_max_over_mean(load), cells))
    rows.sort(key=lambda row: -row[0])
    order = "the least balanced layer first"
    if len(rows) > MAX_LISTED_LAYERS:
        order = f"the {MAX_LISTED_LAYERS} least balanced of {len(rows)} layers"
    return Table(
        f"Most and least loaded experts at the last logged step, {order}; in brackets the load as "
        "a multiple of the fair share",
        [
            *("Layer", "Step", "Max / mean", "Coefficient of variation", "Without any token"),
            *("Most loaded", "Least loaded"),
        ],
        [cells for _, cells in rows[:MAX_LISTED_LAYERS]],
    )


def _load_cells(load: list[float]) -> list[str]:
    mean = fmean(load) or 1.0
    order = sorted(range(len(load)), key=lambda expert: -load[expert])
    extremes = (order[:NUM_EXTREMES], reversed(order[-NUM_EXTREMES:]))
    return [
        format_number(_max_over_mean(load), 3),
        format_number(pstdev(load) / mean, 3),
        str(load.count(0)),
        *(", ".join(f"{e} ({load[e] / mean:.2f})" for e in experts) for experts in extremes),
    ]
