"""`dmoe COMMAND`. Nothing here imports torch: a typo is answered at once.

Exit codes: 0 done, 2 bad config or usage, 3 checkpoint, 4 numbers, 5 no progress, 1 anything else; 128 + n when stopped by signal n.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from dmoe import __version__
from dmoe.cli import checkpoint, compare, explain, generate, modules, report, train, verify, watch
from dmoe.cli.common import OutputError, guard_output
from dmoe.config.errors import DmoeError
from dmoe.config.secrets import redact

EXIT_CODES = "0 done, 2 bad config, 3 checkpoint, 4 numbers, 5 no progress, 1 anything else; 128 + n when stopped by signal n"


def paragraphs(command: Callable[..., None]) -> str:
    """A docstring for any width of terminal: typer keeps the line breaks of the source."""
    return "\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Exit codes: {EXIT_CODES}.",
)


def show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=show_version, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Distributed mixture-of-experts training: the same run on one process, N gloo ranks or N GPUs."""


COMMANDS = {
    "train": train,
    "watch": watch,
    "report": report,
    "compare": compare,
    "explain": explain,
    "verify": verify,
    "generate": generate,
}
for name, module in COMMANDS.items():
    app.command(name=name, help=paragraphs(module.command))(module.command)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(modules.app, name="modules")


def run() -> NoReturn:
    """The entry point: a user's mistake is one line on stderr and its exit code, never a traceback."""
    guard_output()
    try:
        code = dispatch_command()
        sys.stdout.flush()
    except OutputError as error:
        code = error.leave(print_error)
    except Exception:  # a defect of ours; what it prints must hold no secret either
        print(redact(traceback.format_exc()), file=sys.stderr, end="")
        code = 1
    sys.exit(code)


def dispatch_command() -> int:
    """Run the command; the exit code."""
    try:
        code = app(prog_name="dmoe", standalone_mode=False)
    except DmoeError as error:
        return print_error(str(error), error.exit_code, error.every_rank)
    except KeyboardInterrupt:
        return 130
    except SystemExit as left:
        if isinstance(left.code, str):
            raise
        return left.code or 0
    except Exception as error:
        if not hasattr(
            error, "format_message"
        ):  # click's usage errors have it; typer carries a click of its own
            raise
        context = getattr(error, "ctx", None)
        if (
            type(error).__name__ == "NoArgsIsHelpError"
        ):  # click's message is the help; typer has printed it, and leaves none
            print(error.format_message(), end="")
            return 2
        return print_error(
            f"{error.format_message().rstrip('.')}; see {context.command_path if context else 'dmoe'} --help",
            2,
        )
    return (
        code if isinstance(code, int) else 0
    )  # 130 after Ctrl-C, which typer turns into a return value


def print_error(message: str, code: int, every_rank: bool = False) -> int:
    """One line on stderr. Every rank of a launcher finds the same mistake; one says it, unless each has something of its own to say."""
    rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if every_rank or not (rank.isdecimal() and world.isdecimal() and 0 < int(rank) < int(world)):
        print(f"dmoe: {redact(' '.join(message.splitlines()))}", file=sys.stderr)
    return code
