"""The report on one or several runs: one HTML file that needs no network.

It reads `metrics.jsonl` and `resolved.yaml` of a run directory, never a checkpoint, and does not
import torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dmoe.report.overview import build_overview
from dmoe.report.page import Panel
from dmoe.report.panels import (
    experts,
    layers,
    load,
    progress,
    simulation,
    summary,
)
from dmoe.report.panels.plan import Grade, plan_panel
from dmoe.report.render import render_page
from dmoe.report.run import Run, load_runs

__all__ = ["write_report"]

PANELS: tuple[Callable[[Sequence[Run]], Panel | None], ...] = (
    summary.summary_panel,
    progress.domains_panel,
    load.load_panel,
    layers.drops_panel,
    load.balance_panel,
    layers.router_panel,
    layers.layers_panel,
    experts.specialization_panel,
    experts.traffic_panel,
    simulation.simulation_panel,
    progress.time_panel,
    progress.gradients_panel,
    summary.samples_panel,
    summary.events_panel,
)


def write_report(
    runs: Sequence[Path], output: Path, grades: Mapping[str, Grade] | None = None
) -> Path:
    """Write the report on the run directories `runs` to `output` atomically; return `output`.

    `grades`: by the name of a run, what its plan predicts (`dmoe.simulation.grade`).

    Cost: one pass over each `metrics.jsonl`. The page has 0.1 MB for 600 steps of 8 experts, and at
    most 4 MB for any number of steps of 16 layers of 64 experts.

    Raises:
        ConfigError: a path is not a run directory.
        OSError: `output` cannot be written.
    """
    loaded = load_runs(runs)
    names = [run.name for run in loaded]
    overview = build_overview(loaded, load.load_chart(loaded))
    panels = [panel for build in PANELS if (panel := build(loaded)) is not None]
    panels.insert(1, plan_panel(loaded, grades or {}))
    marks = [summary.event_marks(run) for run in loaded]
    text = render_page(names, overview, panels, marks)
    draft = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        # A text sample may contain half a surrogate pair.
        draft.write_bytes(text.encode("utf-8", errors="replace"))
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)
    return output
