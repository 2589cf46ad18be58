"""Commands on existing runs: `dmoe watch`, `dmoe report`, `dmoe compare`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from dmoe.config.errors import ConfigError
from dmoe.observability.display.layer_table import charset_for
from dmoe.observability.display.watch import RunWatcher
from dmoe.report import write_report
from dmoe.report.comparison import comparison_json, comparison_lines, unfinished_remark
from dmoe.report.format import single_line
from dmoe.report.lost import problems
from dmoe.report.results import result_lines
from dmoe.report.run import Run, is_finished, load_runs

REPORT_NAME = "report.html"
MIN_WIDTH, MAX_WIDTH = 80, 120


def watch(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run directory, e.g. runs/latest; it need not exist yet."
        ),
    ],
    once: Annotated[
        bool, typer.Option("--once", help="Print the current state as plain text and exit.")
    ] = False,
) -> None:
    """Watch a run in another process, as its own terminal would show it, from its metrics.jsonl.

    Waits for a run that has not started, follows one that is killed and resumed, and exits at its
    end or on Ctrl-C. Reports a run that writes nothing for unusually long; watch cannot see whether
    its processes are alive. If the output is a pipe, prints plain lines.

    Example: dmoe watch runs/latest
    """
    watcher = RunWatcher(run)
    if once:
        if not run.is_dir():
            raise ConfigError(
                "RUN",
                run,
                "is not a run directory yet",
                "give one, or leave --once out to wait for it",
            )
        print(watcher.snapshot(Console().width, charset_for(sys.stdout.encoding, os.environ)))
        return
    signal.signal(signal.SIGTERM, _exit)
    watcher.follow()


def _exit(number: int, frame: FrameType | None) -> None:
    """Exit through the `finally` that puts the cursor below the panel."""
    raise SystemExit(128 + number)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN [RUN ...]", help="Run directories, e.g. runs/latest."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="File to write. Default: report.html in RUN; for several runs, in the current "
            "directory.",
            dir_okay=False,
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The machine of the runs, as dmoe plan --calibrate wrote it, or a shipped name: "
            "then the time of a step is predicted too.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print predicted against measured as JSON on stdout.")
    ] = False,
) -> None:
    """Write a report on one or several runs as one HTML file that needs no network.

    Reads metrics.jsonl and resolved.yaml of each run, never a checkpoint. The runs may be running,
    killed, or of an older version of dmoe: what was not recorded is left out and reported.

    Each run is compared with the plan of its config: memory, time of a step, drops.

    Example: dmoe report runs/latest
    """
    from dmoe.simulation.cluster import load_cluster
    from dmoe.simulation.grade import grade_runs

    known = None if cluster is None else load_cluster(cluster)
    grades = grade_runs(load_runs(runs), known)
    target = output or (runs[0] / REPORT_NAME if len(runs) == 1 else Path(REPORT_NAME))
    try:
        write_report(runs, target, grades)
    except OSError as error:
        raise ConfigError(
            "--output", target, f"cannot be written ({error.strerror})", "choose another file"
        ) from None
    if as_json:
        plans = {name: asdict(found) for name, found in grades.items()}
        print(json.dumps({"report": str(target), "plans": plans}, indent=2))
        return
    print(f"report: {target}")


def compare(
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
    """Compare runs in a table: validation metric, parameters, FLOPs, tokens, time, drops, balance.

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
        remarks = [] if is_finished(run) else [unfinished_remark(run)]
        for remark in [*remarks, *problems(run)]:
            lines += ["", remark]
    return lines


def terminal_width() -> int:
    """Return the width of the terminal or COLUMNS, within limits; the maximum without one."""
    return max(MIN_WIDTH, min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns))
