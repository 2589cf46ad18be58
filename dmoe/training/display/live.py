"""The panel on a terminal: drawn when something was told, when the terminal has changed its size, and once a second for the clock."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from typing import Any

from rich.console import Console

from dmoe.training.display.glyphs import CharSet
from dmoe.training.display.panel import panel_lines
from dmoe.training.display.region import BottomLines
from dmoe.training.display.state import DisplayState

__all__ = ["Live"]

INTERVAL = 0.5
"""Seconds between looks; a frame takes 1 ms, or 5 with 24 layers of 128 experts, and is made only where it would differ."""
CLOCK = 2
"""Looks after which a frame is made anyway."""


class Live:
    """A thread draws; what is told only changes the state, so that a terminal that is held (Ctrl-S) holds no step."""

    def __init__(self, console: Console, state: DisplayState, glyphs: CharSet, clock: Callable[[], float | None]) -> None:
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
            lines = panel_lines(self.state, self.clock(), columns - 1, max(1, rows - 3), self.glyphs)
        with self.console.capture() as captured:
            for line in lines:
                self.console.print(line, width=columns, no_wrap=True, overflow="crop", soft_wrap=False)
        return captured.get().splitlines()
