"""`dmoe compare`"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dmoe.config.errors import ConfigError
from dmoe.report.comparison import comparison_json, comparison_lines, unfinished
from dmoe.report.figures import finished
from dmoe.report.format import one_line
from dmoe.report.results import result_lines
from dmoe.report.run import Run, load_runs

NARROWEST, WIDEST = 80, 120


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN [RUN ...]", help="Run directories, e.g. runs/latest."),
    ],
    full: Annotated[
        bool, typer.Option("--full", help="Each run by itself, as it was told at its end.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The table as JSON on stdout, with every digit.")
    ] = False,
) -> None:
    """One line a run: held-out measure, parameters, FLOPs, tokens, time, drops, balance, ranks; and what makes them no fair comparison.

    Reads metrics.jsonl of each run, never a checkpoint. What was not recorded is a dash, or left out if no run has it.

    Example: dmoe compare runs/latest runs/dense
    """
    if full and as_json:
        raise ConfigError(
            "--json",
            True,
            "has no tables by domain and layer: it does not go with --full",
            "leave one out",
        )
    loaded = load_runs(runs)
    if as_json:
        print(json.dumps(comparison_json(loaded), indent=2))
    else:
        print("\n".join(full_lines(loaded) if full else comparison_lines(loaded, columns())))


def full_lines(runs: Sequence[Run]) -> list[str]:
    """The result of each run; its name above it where there are several, and a remark below if it has not finished."""
    lines: list[str] = []
    for run in runs:
        title = [f"{one_line(run.name)}:"] if len(runs) > 1 else []
        lines += [
            *[""] * bool(lines),
            *title,
            *result_lines(run.metrics),
            *([] if finished(run) else ["", unfinished(run)]),
        ]
    return lines


def columns() -> int:
    """Of the terminal, or COLUMNS; as many as a page has where there is none."""
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))
