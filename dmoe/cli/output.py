"""stdout that may be a full disk, a pipe whose reader has left, or a terminal of few letters. None of them is a traceback."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any, Protocol

__all__ = ["OutputError", "guard_output"]


class Complain(Protocol):
    def __call__(self, message: str, code: int) -> int: ...


class OutputError(Exception):
    """stdout could not be written, for the reason in `__cause__`.

    No OSError: that may as well be of a file that the command writes, and typer ends a program on a broken pipe with code 1.
    """

    def leave(self, complain: Complain) -> int:
        """Give up stdout; the exit code. Quiet where the reader of a pipe has left (`| head`), as the signal of that name is."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more as it ends
        if isinstance(self.__cause__, BrokenPipeError):
            return 128 + signal.SIGPIPE
        return complain(
            f"stdout: cannot be written ({getattr(self.__cause__, 'strerror', None)}); choose another place for the output", 1
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
