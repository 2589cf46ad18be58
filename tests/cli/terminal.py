"""A command in a pseudo-terminal emulated by pyte."""

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


def screen_lines(screen: pyte.HistoryScreen) -> list[str]:
    """Return all lines, first those that have scrolled out of the screen."""
    gone = [
        "".join(row[column].data for column in range(screen.columns)) for row in screen.history.top
    ]
    return [line.rstrip() for line in [*gone, *screen.display]]


class Terminal:
    """`python -m dmoe ARGUMENTS` on its own terminal and session, as a shell starts it."""

    def __init__(
        self, *arguments: str, cwd: Path, columns: int = 100, rows: int = 30, **env: str
    ) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=2000)
        self.stream, self.raw = pyte.ByteStream(self.screen), b""
        self.master, slave = os.openpty()
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
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
        )
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)

    @property
    def text(self) -> str:
        return "\n".join(screen_lines(self.screen))

    def read_until(self, holds: Callable[[str], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not holds(self.text):
            assert time.monotonic() < deadline, f"not seen in {seconds} s:\n{self.text}"
            assert self._read() or self.process.poll() is None, f"not seen to the end:\n{self.text}"

    def finish(self, seconds: float = 60) -> int:
        """Read to the end; return the exit code."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"did not end:\n{self.text}"
            self._read()
        while self._read():
            pass
        return self.process.returncode

    def narrow(self, columns: int) -> None:
        """Change the width. pyte does not rewrap: it cuts longer lines."""
        self._size(columns, self.screen.lines)
        self.screen.resize(self.screen.lines, columns)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def _size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self) -> bool:
        if not select.select([self.master], [], [], 0.1)[0]:
            return False
        try:
            data = os.read(self.master, 1 << 16)
        except OSError:  # EIO on Linux: the other side is closed
            return False
        self.raw += data
        self.stream.feed(data)
        return bool(data)
