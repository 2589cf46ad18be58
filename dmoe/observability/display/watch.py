"""`dmoe watch`: a run that another process trains, as its own terminal would show it.

Whether a run that writes no line should worry the one who watches it. It says how long, and against what; never that it is dead.

A metrics file that another process appends to: its whole lines, each once, as they come.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.observability.display.bars import CharSet
from dmoe.observability.display.choice import display_of
from dmoe.observability.display.format import clock_time, event_words, train_words
from dmoe.observability.display.live import Live
from dmoe.observability.display.panel import panel_lines
from dmoe.observability.display.plain import Display
from dmoe.observability.display.state import DisplayState
from dmoe.runs.metrics_log import Line, MetricsFollower, finite

LOOK = 0.5
"""Seconds between looks at the file."""
ENDLESS = 1_000_000
"""Lines of a terminal that is no terminal."""


class RunWatcher:
    """What a run directory, which may not be there yet, has told so far, and goes on to tell."""

    def __init__(self, path: Path, silence: StallDetector | None = None) -> None:
        """Reads what is there. Raises ConfigError if `path` can never become a run directory."""
        if path.exists() and not path.is_dir():
            raise ConfigError(
                "RUN", path, "is not a directory", "give a run directory, e.g. runs/latest"
            )
        self.name, self.path = str(path), path
        self.state, self.silence = DisplayState(None), silence or StallDetector()
        self._follower: MetricsFollower | None = None
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
            display.print(
                f"{self.name}: its metrics.jsonl is another one now, and is read from the beginning"
            )
            self.state.clear()
            self.silence.clear()
        for line in lines:
            self._hear(line, fresh=True)
            display.log_event(
                line["event"], line["step"], line, event_words(line["event"], line["step"], line)
            )
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
            self._follower = MetricsFollower(self.path / "metrics.jsonl")
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
        return ": ".join(
            [self.name, *([words] if (words := self.silence.message or self.silence.words) else [])]
        )


REMEMBERED = 256


class StallDetector:
    """The pauses between a run's lines, by the times in the lines; the wait since the last one, by a clock that nobody sets.

    It counts as the writer's clock too (`clock`): the last line's time, and what has passed here since it was seen.
    """

    def __init__(
        self,
        minimum: float = 30.0,
        factor: float = 3.0,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Long is what is longer than `minimum` seconds and than `factor` times the longest pause of this attempt so far."""
        self.minimum, self.factor, self.monotonic, self.wall = minimum, factor, monotonic, wall
        self.clear()

    def clear(self) -> None:
        self._pauses: deque[float] = deque(maxlen=REMEMBERED)
        self._stamp: float | None = None
        """When the last line was written, by its writer."""
        self._seen: float | None = None
        """When it was seen, by this machine's monotonic clock."""
        self._age = 0.0
        """How old it was then."""

    def heard(self, line: dict[str, Any], *, fresh: bool) -> None:
        """A line; `fresh` if it was written while we looked. Then one without a time counts from when it was seen; else nothing is
        known of when it was written."""
        if line["event"] in ("start", "restart"):
            self.clear()
        stamp = finite(line.get("time"))
        if stamp is None and fresh:
            stamp = self.clock() or self.wall()
        if stamp is None:
            self._stamp = self._seen = None
            return
        if self._stamp is not None:
            self._pauses.append(max(0.0, stamp - self._stamp))
        self._stamp, self._seen = stamp, self.monotonic()
        self._age = 0.0 if fresh else max(0.0, self.wall() - stamp)

    def clock(self) -> float | None:
        """Now, as the writer's clock would show it; None before the first line with a time."""
        return None if self._stamp is None else self._stamp + self.seconds

    @property
    def seconds(self) -> float:
        """Since the last line, 0 if its time is not known. For one that was there before we looked, by the difference of two machines'
        clocks."""
        return 0.0 if self._seen is None else self._age + self.monotonic() - self._seen

    @property
    def words(self) -> str:
        """How long ago the last line was written; empty where that is not known."""
        if self._stamp is None:
            return ""
        return f"last line {clock_time(self.seconds)} ago" + (
            ", if its clock and this one agree" if self._age else ""
        )

    @property
    def message(self) -> str:
        """A sentence where the silence is long, else empty. Without a pause to compare with, none is long."""
        longest = max(self._pauses, default=None)
        if longest is None or self.seconds <= max(self.minimum, self.factor * longest):
            return ""
        return (
            f"no line for {clock_time(self.seconds)}, and the longest pause before was {clock_time(longest)}: it may have been killed, "
            "hang, or be at something long"
        )
