"""Command `dmoe report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dmoe.config.errors import ConfigError
from dmoe.report import write_report

FILE_NAME = "report.html"


def command(
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
) -> None:
    """Write a report on one or several runs as one HTML file that needs no network.

    Reads metrics.jsonl and resolved.yaml of each run, never a checkpoint. The runs may be running,
    killed, or of an older version of dmoe: what was not recorded is left out and reported.

    Example: dmoe report runs/latest
    """
    target = output or (runs[0] / FILE_NAME if len(runs) == 1 else Path(FILE_NAME))
    try:
        write_report(runs, target)
    except OSError as error:
        raise ConfigError(
            "--output", target, f"cannot be written ({error.strerror})", "choose another file"
        ) from None
    print(f"report: {target}")
