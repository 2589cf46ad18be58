"""Arguments and output that the commands share.

Arguments are `[CONFIG] [section.field=value ...]`. A stdout that is a full disk, a closed pipe or
has a limited encoding causes no traceback.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from typing import Any, Protocol

from dmoe.config.errors import ConfigError
from dmoe.config.load import load_text
from dmoe.config.schema import Config
from dmoe.config.yaml_guard import read_text

ARGUMENTS_HELP = "A YAML file (default: the quickstart), then overrides like moe.top_k=1."
DEFAULTS = "# no file given: the defaults\n{}\n"


def split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Separate the path of the config file, if the first argument is one, from the overrides.

    The path of an existing file may contain `=`.
    """
    first = [
        argument for argument in arguments[:1] if "=" not in argument or os.path.isfile(argument)
    ]
    overrides = arguments[len(first) :]
    wrong = next((argument for argument in overrides if "=" not in argument), None)
    if wrong is not None:
        raise ConfigError(
            "argument",
            wrong,
            "is neither the first argument (CONFIG) nor section.field=value",
            "put CONFIG first",
        )
    return (first[0] if first else None), overrides


def load_arguments(arguments: list[str]) -> tuple[Config, str]:
    """Return the config, and the user's input as text: the file, with overrides as comments."""
    path, overrides = split(arguments)
    text = DEFAULTS if path is None else read_text(path)
    config = load_text(text, str(path), overrides)
    end = "" if not text or text.endswith("\n") else "\n"
    return config, text + end + "".join(
        f"# override: {_one_line(override)}\n" for override in overrides
    )


def _one_line(override: str) -> str:
    """Quote an override with a line break, which would end the comment in the config."""
    return override if override.isprintable() else json.dumps(override)


class PrintError(Protocol):
    """Function that prints an error message and returns its exit code."""

    def __call__(self, message: str, code: int) -> int: ...


class OutputError(Exception):
    """Failure to write to stdout, for the reason in `__cause__`.

    Not an OSError: a command raises that for its own files too, and typer would exit with code 1
    on a broken pipe.
    """

    def discard_output(self, print_error: PrintError) -> int:
        """Redirect stdout to /dev/null and return the exit code.

        Prints nothing if the reader of a pipe has exited (`| head`), like SIGPIPE.
        """
        # the interpreter flushes stdout once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(self.__cause__, BrokenPipeError):
            return 128 + signal.SIGPIPE
        reason = getattr(self.__cause__, "strerror", None)
        return print_error(
            f"stdout: cannot be written ({reason}); choose another place for the output", 1
        )


class _StdoutFile(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError from error


def guard_output() -> None:
    """Make stdout raise OutputError on failure and write unknown characters as `?`."""
    old = sys.stdout
    # stdout may be closed, or replaced by a test
    if not isinstance(old, io.TextIOWrapper):
        return
    old.flush()
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_StdoutFile(old.fileno(), "w", closefd=False)),
        encoding=old.encoding,
        errors="replace",
        line_buffering=old.line_buffering,
        write_through=old.write_through,
    )
