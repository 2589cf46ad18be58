"""A command in a pseudo-terminal, and what stands on the screen (pyte emulates the terminal)."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pyte

from tests.cli.commands import environment

__all__ = ["Terminal", "rows_of"]


def rows_of(screen: pyte.HistoryScreen) -> list[str]:
    """All lines, those that have scrolled away first."""
    gone = [
        "".join(row[column].data for column in range(screen.columns)) for row in screen.history.top
    ]
    return [line.rstrip() for line in [*gone, *screen.display]]


class Terminal:
    """`python -m dmoe ARGUMENTS` on a terminal of its own, in a session of its own, as a shell starts it."""

    def __init__(
        self, *arguments: str, cwd: Path, columns: int = 100, rows: int = 30, **env: str
    ) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=2000)
        self.stream, self.raw = pyte.ByteStream(self.screen), b""
        self.ours, theirs = os.openpty()
        self._size(columns, rows)
        kept = {
            name: value
            for name, value in environment().items()
            if name not in ("COLUMNS", "NO_COLOR", "LC_ALL")
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dmoe", *arguments],
            cwd=cwd,
            env=kept | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"} | env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
        )
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)

    @property
    def text(self) -> str:
        return "\n".join(rows_of(self.screen))

    def read_until(self, holds: Callable[[str], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not holds(self.text):
            assert time.monotonic() < deadline, f"not seen in {seconds} s:\n{self.text}"
            assert self._read() or self.process.poll() is None, f"not seen to the end:\n{self.text}"

    def finish(self, seconds: float = 60) -> int:
        """Read to the end; the exit code."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"did not end:\n{self.text}"
            self._read()
        while self._read():
            pass
        return self.process.returncode

    def narrow(self, columns: int) -> None:
        """The window gets another width. A terminal that does not rewrap: pyte cuts what is beyond."""
        self._size(columns, self.screen.lines)
        self.screen.resize(self.screen.lines, columns)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def _size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self) -> bool:
        if not select.select([self.ours], [], [], 0.1)[0]:
            return False
        try:
            data = os.read(self.ours, 1 << 16)
        except OSError:  # Linux's word for: the other side is gone
            return False
        self.raw += data
        self.stream.feed(data)
        return bool(data)
