"""`dmoe watch`"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from dmoe.config.errors import ConfigError
from dmoe.observability.display.layer_table import charset_for
from dmoe.observability.display.watch import RunWatcher


def command(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run directory, e.g. runs/latest; it may be one to come."
        ),
    ],
    once: Annotated[
        bool, typer.Option("--once", help="Print the present state as plain text and leave.")
    ] = False,
) -> None:
    """Watch a run that somebody else started, as its own terminal would show it, from its metrics.jsonl.

    Waits for a run that has not begun, goes along with one that is killed and resumed, and leaves with its end or with Ctrl-C. A run
    that is silent for unusually long is said to be; whether it lives cannot be seen from here. Into a pipe, plain lines.

    Example: dmoe watch runs/latest
    """
    watch = RunWatcher(run)
    if once:
        if not run.is_dir():
            raise ConfigError(
                "RUN",
                run,
                "is not a run directory yet",
                "give one, or leave --once out to wait for it",
            )
        print(watch.snapshot(Console().width, charset_for(sys.stdout.encoding, os.environ)))
        return
    signal.signal(signal.SIGTERM, leave)
    watch.follow()


def leave(number: int, frame: FrameType | None) -> None:
    """Through the `finally` that puts the cursor below the panel."""
    raise SystemExit(128 + number)
