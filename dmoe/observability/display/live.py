"""The panel on a terminal: drawn when something was told, when the terminal has changed its size, and once a second for the clock.

Lines at the foot of a terminal that are drawn again and again, below lines that scroll.

Between two frames the cursor waits on an empty line above the panel, and a frame is drawn from there downwards. So nothing ever has to
be counted upwards: what others write (another rank's error, a key that is pressed) lands above the panel and stays; a terminal that
rewraps its lines when it is made narrower takes the cursor along; and the cursor is never hidden, so that no end of the process, not
even SIGKILL, leaves a terminal without one. `rich.live.Live` waits below its lines and counts them upwards, so it erases what another
process has written in between.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any

from rich.console import Console

from dmoe.observability.display.bars import CharSet
from dmoe.observability.display.panel import panel_lines
from dmoe.observability.display.state import DisplayState

INTERVAL = 0.5
"""Seconds between looks; a frame takes 1 ms, or 5 with 24 layers of 128 experts, and is made only where it would differ."""
CLOCK = 2
"""Looks after which a frame is made anyway."""


class Live:
    """A thread draws; what is told only changes the state, so that a terminal that is held (Ctrl-S) holds no step."""

    def __init__(
        self,
        console: Console,
        state: DisplayState,
        glyphs: CharSet,
        clock: Callable[[], float | None],
    ) -> None:
        self.console, self.state, self.glyphs, self.clock = console, state, glyphs, clock
        self.region = BottomLines(console.file)
        self._ended, self._changed = threading.Event(), False
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def step(self, step: int) -> None:
        self.state.reached(step, self.clock())
        self.refresh()

    def log_event(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None:
        self.state.on_event(event, step, values, self.clock())
        self.refresh()
        if line:
            self.print(line)

    def print(self, text: str) -> None:
        """Above the panel. Control characters, which a model may write as well, do not reach the terminal."""
        lines = "\n".join(self.glyphs.spelled(line) for line in text.split("\n"))
        self.region.say(lines, self._frame() if self._shown else ())

    def refresh(self) -> None:
        """The state has changed: show it soon. The first call brings up the panel. Raises what kept the thread from drawing."""
        self._changed = True
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._thread is None and not self._ended.is_set():
            self._thread = threading.Thread(target=self._draw, name="display", daemon=True)
            self._thread.start()
            atexit.register(self.close)  # where an error finds nobody to close it

    def close(self) -> None:
        shown = self._shown
        self._ended.set()
        atexit.unregister(self.close)
        if shown and self._thread is not None:
            self._thread.join(timeout=2)
            self.region.leave(self._frame())

    @property
    def _shown(self) -> bool:
        return self._thread is not None and not self._ended.is_set()

    def _draw(self) -> None:
        size, looks = (0, 0), 0
        try:
            while True:
                looks += 1
                if self._changed or self.region.size() != size or looks % CLOCK == 0:
                    self._changed, size = False, self.region.size()
                    self.region.draw(self._frame())
                if self._ended.wait(INTERVAL):
                    return
        except Exception as error:  # of the terminal: told to the thread that trains, which knows what to do about it
            self._failure = error

    def _frame(self) -> list[str]:
        """Lines with their colours; narrower than the terminal, and two rows for what is said and for the cursor."""
        columns, rows = self.region.size()
        with self.state.lock:
            lines = panel_lines(
                self.state, self.clock(), columns - 1, max(1, rows - 3), self.glyphs
            )
        with self.console.capture() as captured:
            for line in lines:
                self.console.print(
                    line, width=columns, no_wrap=True, overflow="crop", soft_wrap=False
                )
        return captured.get().splitlines()


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
