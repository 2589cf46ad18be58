"""The panel of a simulated run: rows between its ranks, and how long a step waits for one of them.

Read from RUN/simulation.jsonl (`dmoe simulate`). A line that is damaged is left out, and the panel
says so. Letters: W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from dmoe.report.charts import View, build_matrix_chart, make_curve
from dmoe.report.lost import SIMULATION, simulated_lines
from dmoe.report.page import Chart, Panel, Selector
from dmoe.report.run import Run

CURVES: dict[str, Callable[[list[float]], float]] = {"mean": fmean, "largest": max}


def _summary(of: Callable[[list[float]], float]) -> Callable[[dict[str, Any]], float]:
    return lambda step: of(step["values"])


def simulation_panel(runs: Sequence[Run]) -> Panel | None:
    """Build straggler factor by step and traffic by layer; None if no run was simulated."""
    read = [simulated_lines(run) for run in runs]
    lines = [whole for whole, _ in read]
    lost = [
        f"{run.name}: {count} line(s) of {SIMULATION} could not be read and are left out."
        for run, (_, count) in zip(runs, read, strict=True)
        if count
    ]
    if not any(lines):
        return Panel("simulation", "Simulated ranks", lost) if lost else None
    views: dict[str, Any] = {}
    for index, run_lines in enumerate(lines):
        by_step: dict[int, list[float]] = {}
        for line in run_lines:
            by_step.setdefault(line["step"], []).append(line["straggler"])
        pairs = [{"step": step, "values": values} for step, values in sorted(by_step.items())]
        if pairs:
            curves = [
                make_curve(name, pairs, _summary(of), colour=colour)
                for colour, (name, of) in enumerate(CURVES.items())
            ]
            views[str(index)] = {"curves": curves, "marks": [index]}
    straggler = Chart(
        "simulated-straggler",
        "Straggler factor",
        "Rows of the busiest rank over the mean of the ranks, over the layers of a step: a step "
        "waits for that rank. 1 is perfect balance.",
        "curves",
        views,
        {"x": "step", "y": "max / mean"},
        [Selector("Run", [run.name for run in runs])],
    )
    traffic = Chart(
        "simulated-traffic",
        "Rows from rank to rank",
        "A row is the sender, a column the receiver, after drops. Last step.",
        "matrix",
        axes={
            **{"x": "to rank", "y": "from rank", "z": "times the expectation", "count": "rows"},
            "fair": "margins",
        },
    )
    built = build_matrix_chart(traffic, runs, [_matrices(run_lines) for run_lines in lines])
    sizes = [f"{line[-1]['ranks']} ranks, EP {line[-1]['ep']}" for line in lines if line]
    return Panel(
        "simulation",
        "Simulated ranks",
        [f"One process computed what {'; '.join(sizes)} would have exchanged.", *lost],
        charts=[straggler, *([built] if built is not None else [])],
    )


def _matrices(lines: Sequence[dict[str, Any]]) -> dict[str, View]:
    """Return the traffic of the last step by layer."""
    last = [line for line in lines if line["step"] == lines[-1]["step"] and "traffic" in line]
    views: dict[str, View] = {}
    for line in last:
        axis = list(range(line["ranks"]))
        views[f"layer {line['layer']}"] = {"x": axis, "y": axis, "z": line["traffic"]}
    return views
