"""The report on one or several runs: one HTML file that needs no network.

It reads `metrics.jsonl` and `resolved.yaml` of a run directory, never a checkpoint, and does not
import torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from dmoe.report import (
    panels_experts,
    panels_layers,
    panels_load,
    panels_progress,
    panels_simulation,
    panels_summary,
)
from dmoe.report.overview import build_overview
from dmoe.report.page import Panel
from dmoe.report.render import render_page
from dmoe.report.run import Run, load_runs

__all__ = ["write_report"]

PANELS: tuple[Callable[[Sequence[Run]], Panel | None], ...] = (
    panels_summary.summary_panel,
    panels_progress.domains_panel,
    panels_load.load_panel,
    panels_layers.drops_panel,
    panels_layers.balance_panel,
    panels_layers.router_panel,
    panels_layers.layers_panel,
    panels_experts.specialization_panel,
    panels_experts.traffic_panel,
    panels_simulation.simulation_panel,
    panels_progress.time_panel,
    panels_progress.gradients_panel,
    panels_summary.samples_panel,
    panels_summary.events_panel,
)


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write the report on the run directories `runs` to `output` atomically; return `output`.

    Cost: one pass over each `metrics.jsonl`. The page has 0.1 MB for 600 steps of 8 experts, and at
    most 4 MB for any number of steps of 16 layers of 64 experts.

    Raises:
        ConfigError: a path is not a run directory.
        OSError: `output` cannot be written.
    """
    loaded = load_runs(runs)
    names = [run.name for run in loaded]
    overview = build_overview(loaded, panels_load.load_chart(loaded))
    panels = [panel for build in PANELS if (panel := build(loaded)) is not None]
    marks = [panels_summary.event_marks(run) for run in loaded]
    text = render_page(names, overview, panels, marks)
    draft = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        # A text sample may contain half a surrogate pair.
        draft.write_bytes(text.encode("utf-8", errors="replace"))
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)
    return output
