"""What the commands share: `[CONFIG] [section.field=value ...]`.

stdout that may be a full disk, a pipe whose reader has left, or a terminal of few letters. None of them is a traceback.
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
    """The config file, if the first argument is one, and the overrides. A first argument that is a file's path may hold `=`."""
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
    """The config, and what the user gave as text: the file, and the overrides as comments."""
    path, overrides = split(arguments)
    text = DEFAULTS if path is None else read_text(path)
    config = load_text(text, str(path), overrides)
    end = "" if not text or text.endswith("\n") else "\n"
    return config, text + end + "".join(
        f"# override: {_one_line(override)}\n" for override in overrides
    )


def _one_line(override: str) -> str:
    """A line break in a prompt would end the comment, and what follows would be read as config."""
    return override if override.isprintable() else json.dumps(override)


class Complain(Protocol):
    def __call__(self, message: str, code: int) -> int: ...


class OutputError(Exception):
    """stdout could not be written, for the reason in `__cause__`.

    No OSError: that may as well be of a file that the command writes, and typer ends a program on a broken pipe with code 1.
    """

    def leave(self, complain: Complain) -> int:
        """Give up stdout; the exit code. Quiet where the reader of a pipe has left (`| head`), as the signal of that name is."""
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the interpreter flushes once more as it ends
        if isinstance(self.__cause__, BrokenPipeError):
            return 128 + signal.SIGPIPE
        return complain(
            f"stdout: cannot be written ({getattr(self.__cause__, 'strerror', None)}); choose another place for the output",
            1,
        )


class _Raw(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError from error


def guard_output() -> None:
    """Have every failure to write to stdout raise OutputError, and letters that it does not know be written as `?`."""
    old = sys.stdout
    if not isinstance(old, io.TextIOWrapper):  # closed, or a test's
        return
    old.flush()
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Raw(old.fileno(), "w", closefd=False)),
        encoding=old.encoding,
        errors="replace",
        line_buffering=old.line_buffering,
        write_through=old.write_through,
    )
