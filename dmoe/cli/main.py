"""`dmoe COMMAND`. Nothing here imports torch: a typo is answered at once.

Exit codes: 0 done, 2 bad config or usage, 3 checkpoint, 4 numbers, 1 anything else; 128 + n when stopped by signal n.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from dmoe import __version__
from dmoe.cli import explain, generate, train, verify
from dmoe.config.errors import DmoeError

__all__ = ["app", "run"]


def paragraphs(command: Callable[..., None]) -> str:
    """A docstring for any width of terminal: typer keeps the line breaks of the source."""
    return "\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 2 bad config, 3 checkpoint, 4 numbers, 1 anything else; 128 + n when stopped by signal n.",
)


def show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=show_version, help="Print the version and leave.")
    ] = False,
) -> None:
    """Distributed mixture-of-experts training: the same run on one process, N gloo ranks or N GPUs."""


for name, module in {"train": train, "explain": explain, "generate": generate, "verify": verify}.items():
    app.command(name=name, help=paragraphs(module.command))(module.command)


def run() -> None:
    """The entry point: a user's mistake is one line on stderr and its exit code, never a traceback."""
    try:
        code = app(prog_name="dmoe", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)  # 130 after Ctrl-C, which typer turns into a return value
    except DmoeError as error:
        leave(str(error), error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not hasattr(
            error, "format_message"
        ):  # click's usage errors have it; newer versions of typer carry a click of their own
            raise
        context = getattr(error, "ctx", None)
        leave(f"{error.format_message().rstrip('.')}; see {context.command_path if context else 'dmoe'} --help", 2)


def leave(message: str, code: int) -> NoReturn:
    """Every rank of a launcher finds the same mistake; one says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"dmoe: {message}", file=sys.stderr)
    sys.exit(code)
