"""From run directories to one HTML file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dmoe.report import (
    panels_events,
    panels_experts,
    panels_layers,
    panels_matrices,
    panels_progress,
)
from dmoe.report.page import Panel, document
from dmoe.report.run import Run, load_runs

PANELS = (
    panels_progress.summary,
    panels_progress.quality,
    panels_experts.loads,
    panels_layers.drops,
    panels_layers.balance,
    panels_layers.router,
    panels_layers.layers,
    panels_matrices.specialisation,
    panels_matrices.traffic,
    panels_progress.time,
    panels_progress.gradients,
    panels_events.samples,
    panels_events.events,
)


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write the report on `runs` to `output`, whole or not at all, and return `output`.

    Cost: one pass over each `metrics.jsonl`, about 5 MB of which 4.8 are the plotting library; under a second for 600 steps.

    Raises:
        ConfigError: a path that is no run directory.
        OSError: `output` cannot be written.
    """
    loaded = load_runs(runs)
    text = document(
        [run.name for run in loaded],
        panels_of(loaded),
        [panels_events.marks(run) for run in loaded],
    )
    draft = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        draft.write_bytes(
            text.encode("utf-8", errors="replace")
        )  # a sample may hold half a surrogate pair
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)
    return output


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    return [build(runs) for build in PANELS]
