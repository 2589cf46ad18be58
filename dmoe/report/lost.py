"""Sentences on the parts of a run's files that a report or a comparison does not show.

The readers keep what they can of a damaged run. Each number that is left out is said by those who
show the rest: the report, `dmoe compare` and its `--full`.
"""

from __future__ import annotations

import json
from typing import Any

from dmoe.report.format import single_line
from dmoe.report.run import Run
from dmoe.runs.metrics_log import finite, matrix

MEASUREMENTS = ("train", "eval")
SIMULATION = "simulation.jsonl"
"""What `dmoe simulate` writes beside the metrics."""
COUNTS = ("step", "accumulation", "layer", "ranks", "ep")


def problems(run: Run) -> list[str]:
    """Return a sentence for each part of a run that a comparison could not read."""
    name = single_line(run.name)
    unknown = [f"{name}: {run.config_problem}"] if run.config is None else []
    return [*map(single_line, unknown), *lost_lines(run, name)]


def lost_lines(run: Run, name: str) -> list[str]:
    """Return a sentence for each kind of line that could not be read."""
    metrics, sentences = run.metrics, list[str]()
    if metrics.unreadable:
        sentences.append(
            f"{name}: {metrics.unreadable} line(s) of metrics.jsonl could not be read and are left "
            "out."
        )
    if metrics.without_layers:
        sentences.append(
            f"{name}: the layers of {metrics.without_layers} line(s) are missing in "
            "metrics.layers.bin, or damaged, and left out."
        )
    return sentences


def unused_lines(run: Run) -> list[str]:
    """Return a sentence for each kind of line that is whole, and that a report does not show."""
    sentences = []
    if run.metrics.skipped_layers:
        sentences.append(
            f"{run.name}: the numbers per layer of {run.metrics.skipped_layers:,} logged steps, "
            "evenly spread, are not shown; they are in metrics.layers.bin."
        )
    void = sum(line["event"] in MEASUREMENTS for line in run.metrics.void)
    if void:
        sentences.append(
            f"{run.name}: {void} measurement(s) of steps that a restart repeated are left out of "
            "the curves."
        )
    return sentences


def simulated_lines(run: Run) -> tuple[list[dict[str, Any]], int]:
    """Return the lines that `dmoe simulate` wrote, and how many cannot be read; none without it."""
    path = run.path / SIMULATION
    texts = path.read_bytes().split(b"\n") if path.is_file() else []
    parsed = [_simulated(text) for text in texts if text.strip()]
    lines = [line for line in parsed if line is not None]
    return lines, len(parsed) - len(lines)


def _simulated(text: bytes) -> dict[str, Any] | None:
    """Parse a line; None unless it has every number that the panel shows."""
    try:
        line = json.loads(text.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or any(type(line.get(key)) is not int for key in COUNTS):
        return None
    if finite(line.get("straggler")) is None:
        return None
    size = [line["ranks"]] * line["ranks"]
    whole = "traffic" not in line or [len(row) for row in matrix(line["traffic"])] == size
    return line if whole else None
