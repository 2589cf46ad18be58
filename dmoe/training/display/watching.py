"""`dmoe watch`: a run that another process trains, as its own terminal would show it."""

from __future__ import annotations

import time
from pathlib import Path

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.report.metrics import Line
from dmoe.training.display.base import Display
from dmoe.training.display.choice import display_of
from dmoe.training.display.follow import Follower
from dmoe.training.display.glyphs import CharSet
from dmoe.training.display.live import Live
from dmoe.training.display.panel import panel_lines
from dmoe.training.display.silence import StallDetector
from dmoe.training.display.state import DisplayState
from dmoe.training.display.words import event_words, train_words

__all__ = ["RunWatcher"]

LOOK = 0.5
"""Seconds between looks at the file."""
ENDLESS = 1_000_000
"""Lines of a terminal that is no terminal."""


class RunWatcher:
    """What a run directory, which may not be there yet, has told so far, and goes on to tell."""

    def __init__(self, path: Path, silence: StallDetector | None = None) -> None:
        """Reads what is there. Raises ConfigError if `path` can never become a run directory."""
        if path.exists() and not path.is_dir():
            raise ConfigError("RUN", path, "is not a directory", "give a run directory, e.g. runs/latest")
        self.name, self.path = str(path), path
        self.state, self.silence = DisplayState(None), silence or StallDetector()
        self._follower: Follower | None = None
        self._worried, self._unreadable = False, 0
        for line in self._poll()[0]:
            self._hear(line, fresh=False)
            self.state.on_event(line["event"], line["step"], line, self.silence.clock())
        self.state.status = self._status()

    def once(self, width: int, glyphs: CharSet) -> str:
        """The state as plain text, whatever the height of the terminal."""
        lines = panel_lines(self.state, self.silence.clock(), width, ENDLESS, glyphs)
        return "\n".join(line.plain.rstrip() for line in lines)

    def follow(self) -> None:
        """Until the run says that it has ended. On a terminal a panel, else lines."""
        display = display_of(self.state, self.silence.clock)
        try:
            display.print(self.state.status)
            if isinstance(display, Live):
                display.refresh()
            elif self.state.values:
                display.print(train_words(self.state, self.silence.clock()))
            while not self.state.ended:
                time.sleep(LOOK)
                self._look(display)
        finally:
            display.close()

    def _look(self, display: Display) -> None:
        lines, again = self._poll()
        if again:
            display.print(f"{self.name}: its metrics.jsonl is another one now, and is read from the beginning")
            self.state.clear()
            self.silence.clear()
        for line in lines:
            self._hear(line, fresh=True)
            display.log_event(line["event"], line["step"], line, event_words(line["event"], line["step"], line))
        if self._follower is not None and self._follower.unreadable > self._unreadable:
            self._unreadable = self._follower.unreadable
            display.print(
                f"note: {self._unreadable} lines of metrics.jsonl so far are no JSON object with event and step; left out"
            )
        worries = bool(self.silence.message)
        if worries and not self._worried and not self.state.ended:
            display.print(f"note: {self.silence.message}")
        self._worried = worries
        with self.state.lock:
            self.state.status = self._status()

    def _poll(self) -> tuple[list[Line], bool]:
        """`runs/latest` is what it points to when it is first seen, and does not become the next run while we look."""
        if self._follower is None and self.path.is_dir():
            self.path = self.path.resolve()
            self._follower = Follower(self.path / "metrics.jsonl")
        return self._follower.poll() if self._follower is not None else ([], False)

    def _hear(self, line: Line, *, fresh: bool) -> None:
        if line["event"] in ("start", "restart"):
            self.state.steps = self._planned()
        self.silence.heard(line, fresh=fresh)

    def _planned(self) -> int | None:
        """The run's last step, read again at each start: it may be taken up with more. None where another version wrote the file."""
        try:
            return load(self.path / "resolved.yaml").train.steps
        except ConfigError:
            return None

    def _status(self) -> str:
        if self._follower is None:
            return f"{self.name}: there is no such directory yet; waiting"
        if self.state.ended:
            return f"{self.name}: {event_words('end', self.state.step, {self.state.ended: True})}"
        if not self.state.told_anything:
            return f"{self.name}: the run has told nothing yet; waiting"
        return ": ".join([self.name, *([words] if (words := self.silence.message or self.silence.words) else [])])
