"""Entry point `dmoe COMMAND`. Imports no torch, so that a typing error is reported at once.

Exit codes: 0 done, 2 bad config or usage, 3 checkpoint, 4 non-finite numbers, 5 no progress, 1
anything else; 128 + n when stopped by signal n.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from dmoe import __version__
from dmoe.cli import (
    bench,
    configs,
    data,
    doctor,
    evaluate,
    explain,
    generate,
    modules,
    plan,
    runs,
    simulate,
    sweep,
    train,
    verify,
)
from dmoe.cli.checkpoint import commands as checkpoint
from dmoe.cli.surroundings import (
    OutputError,
    check_surroundings,
    prepare_process,
    surroundings_error,
)
from dmoe.config.errors import DmoeError, LostRankError
from dmoe.config.launch_env import FOREIGN_LAUNCHERS, clear_environment
from dmoe.config.rules.memory import describe_out_of_memory, is_out_of_memory
from dmoe.config.secrets import redact

RANK_0_PRINTS = 5.0
"""Seconds that other ranks leave rank 0 to print the error that all have found."""
EXIT_CODES = (
    "0 done, 2 bad config, 3 checkpoint, 4 non-finite numbers, 5 no progress, 1 anything else; "
    "128 + n when stopped by signal n"
)


def help_text(command: Callable[..., None]) -> str:
    """Join the lines of each paragraph of a docstring: typer would keep the line breaks."""
    return "\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Exit codes: {EXIT_CODES}.",
)


def show_version(requested: bool) -> None:
    """Print the version and exit."""
    if requested:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=show_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Distributed mixture-of-experts training: the same run on one process, N ranks or N GPUs."""


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.command,
    "sweep": sweep.command,
    "watch": runs.watch,
    "report": runs.report,
    "compare": runs.compare,
    "explain": explain.command,
    "plan": plan.command,
    "verify": verify.command,
    "simulate": simulate.command,
    "doctor": doctor.command,
    "evaluate": evaluate.command,
    "generate": generate.command,
}
for name, command in COMMANDS.items():
    app.command(name=name, help=help_text(command))(command)
app.add_typer(configs.app, name="configs")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(modules.app, name="modules")
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")


def run() -> NoReturn:
    """Run a command and exit; a user's error is one line on stderr, never a traceback."""
    prepare_process()
    clear_environment(keep=FOREIGN_LAUNCHERS)
    try:
        code = dispatch_command()
        sys.stdout.flush()
    except OutputError as error:
        code = error.discard_output(print_error)
    except Exception as error:
        if problem := surroundings_error(error):
            sys.exit(print_error(problem, 2, every_rank=True))
        # a bug in dmoe; its traceback must not show secrets either
        print(redact(traceback.format_exc()), file=sys.stderr, end="")
        code = 1
    if code and _has_process_group():
        _exit_at_once(code)
    sys.exit(code)


def _has_process_group() -> bool:
    # without it torch has not been imported
    distributed = sys.modules.get("dmoe.distributed.init")
    return distributed is not None and distributed.has_process_group()


def _exit_at_once(code: int) -> NoReturn:
    """Exit after Python's own handlers, without torch's destructors.

    After an error, threads of the process group may still wait for another rank. Their destructors
    abort the process, SIGABRT in place of the exit code, now and then on a busy machine (torch
    2.13). Remove it when torch joins them.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def dispatch_command() -> int:
    """Run the command and return the exit code."""
    try:
        check_surroundings(sys.argv[1:])
        code = app(prog_name="dmoe", standalone_mode=False)
    except LostRankError as error:
        print_error(str(error), error.exit_code, every_rank=True)
        # Python's handlers could wait for that rank too
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)
    except DmoeError as error:
        return print_error(str(error), error.exit_code, error.every_rank)
    except KeyboardInterrupt:
        return 130
    except SystemExit as ended:
        if isinstance(ended.code, str):
            raise
        return ended.code or 0
    except Exception as error:
        if is_out_of_memory(error):
            fix = "lower train.global_batch, data.seq_len or model.dim, or use a larger machine"
            return print_error(f"{describe_out_of_memory(error)}; {fix}", 1, every_rank=True)
        # click's usage errors have this method; typer includes its own copy of click
        if not hasattr(error, "format_message"):
            raise
        message, context = error.format_message(), getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":
            # the message is the help; typer has printed it and returns an empty one
            print(message, end="")
            return 2
        path = context.command_path if context else "dmoe"
        return print_error(f"{message.rstrip('.')}; see {path} --help", 2)
    # typer returns 130 after Ctrl-C
    return code if isinstance(code, int) else 0


def print_error(message: str, code: int, every_rank: bool = False) -> int:
    """Print one line on stderr and return `code`.

    All ranks of a launcher find the same error, so only rank 0 prints it, unless `every_rank`. The
    others wait: a launcher ends all ranks when one has failed, and would end rank 0 in silence.
    """
    rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if every_rank or not (rank.isdecimal() and world.isdecimal() and 0 < int(rank) < int(world)):
        print(f"dmoe: {redact(' '.join(message.splitlines()))}", file=sys.stderr)
    else:
        time.sleep(RANK_0_PRINTS)  # cut short by the launcher, when rank 0 has exited
    return code
