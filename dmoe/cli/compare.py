"""Command `dmoe compare`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dmoe.config.errors import ConfigError
from dmoe.report.comparison import comparison_json, comparison_lines, unfinished_remark
from dmoe.report.format import single_line
from dmoe.report.results import result_lines
from dmoe.report.run import Run, is_finished, load_runs

MIN_WIDTH, MAX_WIDTH = 80, 120


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN [RUN ...]", help="Run directories, e.g. runs/latest."),
    ],
    full: Annotated[
        bool, typer.Option("--full", help="Print the results of each run, as at its end.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the table as JSON on stdout, with all digits.")
    ] = False,
) -> None:
    """Compare runs in a table: held-out metric, parameters, FLOPs, tokens, time, drops, balance.

    Below the table are the reasons why runs may not be comparable. Reads metrics.jsonl of each
    run, never a checkpoint. A quantity that was not recorded is a dash; if no run has it, it is
    left out.

    Example: dmoe compare runs/latest runs/dense
    """
    if full and as_json:
        raise ConfigError(
            "--json",
            True,
            "has no tables by domain and layer, so it does not go with --full",
            "leave one out",
        )
    loaded = load_runs(runs)
    if as_json:
        print(json.dumps(comparison_json(loaded), indent=2))
    else:
        lines = full_lines(loaded) if full else comparison_lines(loaded, terminal_width())
        print("\n".join(lines))


def full_lines(runs: Sequence[Run]) -> list[str]:
    """Return the results of each run, with its name if there are several, and if unfinished."""
    lines: list[str] = []
    for run in runs:
        if lines:
            lines.append("")
        if len(runs) > 1:
            lines.append(f"{single_line(run.name)}:")
        lines += result_lines(run.metrics)
        if not is_finished(run):
            lines += ["", unfinished_remark(run)]
    return lines


def terminal_width() -> int:
    """Return the width of the terminal or COLUMNS, within limits; the maximum without one."""
    return max(MIN_WIDTH, min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns))
