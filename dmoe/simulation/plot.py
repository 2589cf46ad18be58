"""The plot of a replay: straggler factor by step, a curve per setting, as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.report.charts import make_curve
from dmoe.report.page import Chart, Overview, Panel, Table
from dmoe.report.render import render_page
from dmoe.simulation.replay import Setting, table
from dmoe.simulation.trace import Trace


def write_plot(
    path: Path, rows: Sequence[dict[str, Any]], settings: Sequence[Setting], trace: Trace
) -> None:
    """Write the page to `path`: the curves, and the table below.

    Args:
        path: of the file.
        rows: of `replay.summarize`.
        settings: one per row.
        trace: what was replayed.

    Raises:
        ConfigError: the file cannot be written.
    """
    curves = []
    for index, (row, setting) in enumerate(zip(rows, settings, strict=True)):
        points = zip(row["steps"], row["straggler_by_step"], strict=True)
        lines = [{"step": step + 1, "value": value} for step, value in points]
        curves.append(make_curve(setting.label, lines, lambda line: line["value"], colour=index))
    chart = Chart(
        "straggler",
        "Straggler factor",
        "Rows of the busiest rank over the mean, mean over the layers; a step waits for that rank.",
        "curves",
        {"": {"curves": curves, "marks": []}},
        {"x": "step", "y": "max / mean"},
    )
    caption = "The trace under each setting"
    head, cells = table(rows)
    settings_table = Table(caption, [title.replace("\n", " ") for title in head], cells)
    sentence = f"{len(trace.steps)} steps, {trace.spec.layers} layers, replayed without training."
    overview = Overview(f"Replay of {trace.path}", {}, sentence, charts=[chart])
    panel = Panel("settings", "Settings", tables=[settings_table])
    text = render_page([trace.path.name], overview, [panel], [[]])
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        allowed = f"cannot be written ({error.strerror})"
        raise ConfigError("--plot", path, allowed, "choose another file") from None
