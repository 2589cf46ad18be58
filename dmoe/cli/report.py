"""`dmoe report`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dmoe.config.errors import ConfigError
from dmoe.report import write_report

NAME = "report.html"


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN [RUN ...]", help="Run directories, e.g. runs/latest."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The file to write. Default: report.html in RUN; for several runs, here.",
            dir_okay=False,
        ),
    ] = None,
) -> None:
    """Write what a run did as one HTML file that needs no network; several runs are drawn over each other.

    Reads metrics.jsonl and resolved.yaml of each run, never a checkpoint. Runs that are still going, were killed or are of an older
    version will do: what was not recorded is left out, and said to be.

    Example: dmoe report runs/latest
    """
    target = output or (runs[0] / NAME if len(runs) == 1 else Path(NAME))
    try:
        write_report(runs, target)
    except OSError as error:
        raise ConfigError(
            "--output", target, f"cannot be written ({error.strerror})", "give another file"
        ) from None
    print(f"report: {target}")
