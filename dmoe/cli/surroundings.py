"""What a process finds around it: descriptors, output, arguments, directory, limits.

A shell, a scheduler or a terminal can close a descriptor, leave while it reads, or take the
terminal away. None of that ends a training run (`keep_running_without_output`); a command whose
output is its purpose ends with one sentence, or silently if the reader has left (`| head`).
"""

from __future__ import annotations

import errno
import gc
import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from dmoe.config.errors import ConfigError
from dmoe.config.launch_env import check_environment
from dmoe.config.yaml_guard import not_utf8

MAX_OPEN_FILES = 1 << 16
"""Each shard of a corpus is an open file while it is mapped; a shell's usual limit is 1024."""


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
        _redirect_to_null(sys.stdout.fileno())
        if isinstance(self.__cause__, BrokenPipeError):
            return 128 + signal.SIGPIPE
        reason = getattr(self.__cause__, "strerror", None)
        return print_error(
            f"stdout: cannot be written ({reason}); choose another place for the output", 1
        )


class _OutputFile(io.FileIO):
    """File of stdout or stderr: waits where it would block, and raises OutputError or goes on."""

    def __init__(self, descriptor: int, required: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.required = required

    def write(self, data: Any, /) -> int:
        try:
            # None: another program that shares the descriptor (ssh, node) made it non-blocking
            while (written := super().write(data)) is None:
                select.select([], [self], [])
        except OSError as error:
            if self.required:
                raise OutputError from error
            _redirect_to_null(self.fileno())
            if self.fileno() != 2:
                reason = error.strerror or type(error).__name__
                print(
                    f"dmoe: stdout can no longer be written ({reason}); the run goes on, see"
                    " metrics.jsonl in its directory, or dmoe watch",
                    file=sys.stderr,
                )
            return len(data)
        return written


@contextmanager
def large_imports() -> Iterator[None]:
    """Import without garbage collection, a quarter of the time that torch and accelerate need.

    What they create lives to the end, and is left out of later collections too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def prepare_process() -> None:
    """Reserve closed descriptors, guard the output, reset signals, raise the limit of open files.

    Blocked signals are inherited, and a blocked TERM would never stop a run. With CHLD ignored
    (a daemon's way to have no zombies) no exit code reaches the launcher: failed ranks were 0.
    """
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # else the next file opened, perhaps a checkpoint, would get what libraries print
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    sys.stdout = _guarded(sys.stdout, required=True)
    sys.stderr = _guarded(sys.stderr, required=False)
    with suppress(ImportError, OSError, ValueError):  # not on Windows
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = min(hard, MAX_OPEN_FILES) if hard != resource.RLIM_INFINITY else MAX_OPEN_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def keep_running_without_output() -> None:
    """Let stdout fail without an OutputError from now on: one line on stderr says so."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _OutputFile):
        raw.required = False


def check_surroundings(arguments: list[str]) -> None:
    """Refuse arguments that are not UTF-8, a working directory that is gone, what torch refuses.

    Raises:
        ConfigError: what is wrong.
    """
    for argument in arguments:
        if shown := not_utf8(argument):
            fix = "type it again, or rename the file"
            raise ConfigError("argument", shown[:200], "is not UTF-8 text", fix)
    try:
        os.getcwd()
    except OSError as error:
        allowed = f"the working directory cannot be used ({error.strerror})"
        raise ConfigError("PWD", os.environ.get("PWD", ""), allowed, "cd to another") from None
    check_environment()


def surroundings_error(error: Exception) -> str | None:
    """Return a sentence if the error is one of the process's surroundings, else None."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "ulimit -n: too many files are open; raise the limit, e.g. ulimit -n 4096"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        start = str(error.filename)[:60]
        return f"path={start}...: is longer than a path may be; give a shorter one"
    # Path.expanduser: a container's user without an entry in /etc/passwd
    if isinstance(error, RuntimeError) and "determine home directory" in str(error):
        return "HOME=: must be set, since a path begins with ~; set it to a directory"
    if isinstance(error, FileNotFoundError) and "usable temporary directory" in str(error):
        return "TMPDIR: no directory for temporary files can be written; set it to one that can"
    return None


def _redirect_to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _guarded(old: Any, required: bool) -> Any:
    """Return a stream for the same descriptor that writes unknown characters as `?`."""
    # it may have been replaced by a test
    if not isinstance(old, io.TextIOWrapper):
        return old
    old.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_OutputFile(old.fileno(), required)),
        encoding=old.encoding,
        errors="replace" if required else "backslashreplace",
        line_buffering=old.line_buffering or not required,
        write_through=old.write_through,
    )
