"""Status panel at the bottom of a terminal, redrawn on events, on resize, and every second.

Between two frames the cursor waits on an empty line above the panel, and a frame is drawn from
there downwards. So no line has to be counted upwards: output of other processes (another rank's
error, an echoed key) lands above the panel and stays, and a terminal that rewraps its lines when
it becomes narrower takes the cursor along. The cursor is never hidden: no end of the process, not
even SIGKILL, leaves a terminal without one. `rich.live.Live` waits below its lines, counts them
upwards and so erases what another process has written in between; and it hides the cursor.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any

from rich.console import Console

from dmoe.observability.display.layer_table import CharSet
from dmoe.observability.display.panel import panel_lines
from dmoe.observability.display.state import DisplayState

INTERVAL = 0.5
"""Seconds between checks. A frame takes 1 ms, or 5 ms with 24 layers of 128 experts."""
CLOCK_INTERVALS = 2
"""Checks after which a frame is drawn even without a change, for the clock."""
TO_LINE_END, TO_SCREEN_END = "\x1b[K", "\x1b[J"
"""Terminal codes that erase from the cursor on."""


class LiveDisplay:
    """Panel drawn by its own thread.

    Events only change the state, so a terminal that is paused (Ctrl-S) blocks no training step.
    """

    def __init__(
        self,
        console: Console,
        state: DisplayState,
        charset: CharSet,
        clock: Callable[[], float | None],
    ) -> None:
        """Create the display; nothing is drawn before the first event.

        Args:
            console: renders styles, and has the file to write to.
            state: the run.
            charset: characters of the terminal.
            clock: current time in seconds by the clock of the events; None if unknown.
        """
        self.console, self.state, self.charset, self.clock = console, state, charset, clock
        self.bottom = BottomLines(console.file)
        self._closed, self._changed = threading.Event(), False
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def step(self, step: int) -> None:
        self.state.on_step(step, self.clock())
        self.refresh()

    def log_event(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None:
        self.state.on_event(event, step, values, self.clock())
        self.refresh()
        if line:
            self.print(line)

    def print(self, text: str) -> None:
        """Print above the panel, without control characters, which a model may write too."""
        lines = "\n".join(self.charset.printable(line) for line in text.split("\n"))
        self.bottom.print_above(lines, self._frame() if self._shown else ())

    def refresh(self) -> None:
        """Request a new frame. The first call shows the panel.

        Raises the exception that stopped the drawing thread, once.
        """
        self._changed = True
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._thread is None and not self._closed.is_set():
            self._thread = threading.Thread(target=self._draw, name="display", daemon=True)
            self._thread.start()
            # For an exception that reaches no caller of `close`.
            atexit.register(self.close)

    def close(self) -> None:
        """Draw the last frame and leave the cursor below it. May be called again."""
        shown = self._shown
        self._closed.set()
        atexit.unregister(self.close)
        if shown and self._thread is not None:
            self._thread.join(timeout=2)
            self.bottom.finish(self._frame())

    @property
    def _shown(self) -> bool:
        return self._thread is not None and not self._closed.is_set()

    def _draw(self) -> None:
        size, checks = (0, 0), 0
        try:
            while True:
                checks += 1
                resized = self.bottom.terminal_size() != size
                if self._changed or resized or checks % CLOCK_INTERVALS == 0:
                    self._changed, size = False, self.bottom.terminal_size()
                    self.bottom.draw(self._frame())
                if self._closed.wait(INTERVAL):
                    return
        # A failure of the terminal. The training thread raises it in `refresh`.
        except Exception as error:
            self._failure = error

    def _frame(self) -> list[str]:
        """Lines with colour codes, narrower than the terminal.

        Two rows of the terminal stay free: for printed text and for the cursor.
        """
        columns, rows = self.bottom.terminal_size()
        height = max(1, rows - 3)
        with self.state.lock:
            lines = panel_lines(self.state, self.clock(), columns - 1, height, self.charset)
        with self.console.capture() as captured:
            for line in lines:
                self.console.print(
                    line, width=columns, no_wrap=True, overflow="crop", soft_wrap=False
                )
        return captured.get().splitlines()


class BottomLines:
    """Lines at the bottom of the terminal that `file` writes to, below lines that scroll."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.lock = file, threading.Lock()

    def terminal_size(self) -> tuple[int, int]:
        """Return columns and rows.

        Read for each frame: SIGWINCH reaches neither another thread nor a rank in its own session.
        """
        with suppress(OSError, ValueError):
            columns, rows = os.get_terminal_size(self.file.fileno())
            if columns and rows:
                return columns, rows
        return 80, 24

    def draw(self, lines: Sequence[str]) -> None:
        """Show `lines`, each narrower than the terminal, fewer than its rows.

        Does nothing in a background job.
        """
        with self.lock:
            if self._in_foreground():
                self._write(_frame_codes(lines))

    def print_above(self, text: str, lines: Sequence[str]) -> None:
        """Print `text` permanently above the panel, then redraw the panel as `lines`."""
        with self.lock:
            frame = _frame_codes(lines) if self._in_foreground() else ""
            self._write(f"\r{TO_SCREEN_END}{text}\n{frame}")

    def finish(self, lines: Sequence[str]) -> None:
        """Show `lines` a last time and put the cursor below them."""
        with self.lock:
            self._write("\r" + "".join(f"{line}{TO_LINE_END}\n" for line in lines) + TO_SCREEN_END)

    def _write(self, text: str) -> None:
        self.file.write(text)
        self.file.flush()

    def _in_foreground(self) -> bool:
        """False after Ctrl-Z and `bg`, when the terminal belongs to another job.

        True where this cannot be asked: a launcher gives each rank a session of its own.
        """
        try:
            return os.tcgetpgrp(self.file.fileno()) == os.getpgrp()
        except (OSError, ValueError):
            return True


def _frame_codes(lines: Sequence[str]) -> str:
    """Text that draws `lines` below the waiting cursor and moves the cursor back."""
    if not lines:
        return ""
    drawn = "".join(f"\n{line}{TO_LINE_END}" for line in lines)
    return f"{drawn}{TO_SCREEN_END}\x1b[{len(lines)}A\r"
