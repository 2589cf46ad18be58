"""`dmoe COMMAND`. Nothing here imports torch: a typo is answered at once.

Exit codes: 0 done, 2 bad config or usage, 3 checkpoint, 4 numbers, 5 no progress, 1 anything else.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from dmoe import __version__
from dmoe.cli import train
from dmoe.config.errors import DmoeError

__all__ = ["app", "run"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 2 bad config, 3 checkpoint, 4 numbers, 5 no progress, 1 anything else.",
)


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    """Distributed mixture-of-experts training: the same run on one process, N gloo ranks or N GPUs."""
    if version:
        print(__version__)
        raise typer.Exit


app.command(name="train")(train.command)


def run() -> None:
    """The entry point: a user's mistake is one line on stderr and its exit code, never a traceback."""
    try:
        app()
    except DmoeError as error:
        if os.environ.get("RANK", "0") == "0":  # every rank finds the same mistake; one says it
            print(f"dmoe: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
