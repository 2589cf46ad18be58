"""Lines at the foot of a terminal that are drawn again and again, below lines that scroll.

Between two frames the cursor waits on an empty line above the panel, and a frame is drawn from there downwards. So nothing ever has to
be counted upwards: what others write (another rank's error, a key that is pressed) lands above the panel and stays; a terminal that
rewraps its lines when it is made narrower takes the cursor along; and the cursor is never hidden, so that no end of the process, not
even SIGKILL, leaves a terminal without one. `rich.live.Live` waits below its lines and counts them upwards, so it erases what another
process has written in between.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

__all__ = ["BottomLines"]

TO_LINE_END, TO_SCREEN_END = "\x1b[K", "\x1b[J"


class BottomLines:
    """The foot of the terminal that `file` writes to."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.lock = file, threading.Lock()

    def size(self) -> tuple[int, int]:
        """Columns and rows now. Asked for each frame: SIGWINCH reaches neither another thread nor a rank in a session of its own."""
        with suppress(OSError, ValueError):
            columns, rows = os.get_terminal_size(self.file.fileno())
            if columns and rows:
                return columns, rows
        return 80, 24

    def draw(self, lines: Sequence[str]) -> None:
        """Show `lines`, each narrower than the terminal, fewer than it has rows. Does nothing in a background job."""
        with self.lock:
            if self._in_front():
                self._write(_frame(lines))

    def say(self, text: str, lines: Sequence[str]) -> None:
        """`text` above the panel, for good; then the panel again."""
        with self.lock:
            self._write(f"\r{TO_SCREEN_END}{text}\n{_frame(lines) if self._in_front() else ''}")

    def leave(self, lines: Sequence[str]) -> None:
        """Show `lines` a last time; the cursor goes below them."""
        with self.lock:
            self._write("\r" + "".join(f"{line}{TO_LINE_END}\n" for line in lines) + TO_SCREEN_END)

    def _write(self, text: str) -> None:
        self.file.write(text)
        self.file.flush()

    def _in_front(self) -> bool:
        """False after Ctrl-Z and `bg`, when the terminal is another's. A rank has no terminal to ask (its launcher gave it a session
        of its own): then nobody knows, and it draws."""
        try:
            return os.tcgetpgrp(self.file.fileno()) == os.getpgrp()
        except (OSError, ValueError):
            return True


def _frame(lines: Sequence[str]) -> str:
    """Down from the waiting line and back to it."""
    if not lines:
        return ""
    drawn = "".join(f"\n{line}{TO_LINE_END}" for line in lines)
    return f"{drawn}{TO_SCREEN_END}\x1b[{len(lines)}A\r"
