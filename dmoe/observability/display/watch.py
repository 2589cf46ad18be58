"""`dmoe watch`: the display of a run that another process trains, and detection of stalls."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.observability.display import Display, create_display
from dmoe.observability.display.layer_table import CharSet
from dmoe.observability.display.live import LiveDisplay
from dmoe.observability.display.panel import panel_lines
from dmoe.observability.display.state import DisplayState, event_text, format_clock, train_text
from dmoe.runs.metrics_follower import MetricsFollower
from dmoe.runs.metrics_log import START_EVENTS, Line, finite

POLL_INTERVAL = 0.5
"""Seconds between reads of the file."""
UNLIMITED_HEIGHT = 1_000_000
"""Height of the panel in lines where it is printed as plain text."""
KEPT_PAUSES = 256


class RunWatcher:
    """Follows the metrics file of a run directory, which may not exist yet."""

    def __init__(self, path: Path, stall: StallDetector | None = None) -> None:
        """Read the existing lines. Raises ConfigError if `path` cannot become a run directory."""
        if path.exists() and not path.is_dir():
            raise ConfigError(
                "RUN", path, "is not a directory", "give a run directory, e.g. runs/latest"
            )
        self.name, self.path = str(path), path
        self.state, self.stall = DisplayState(None), stall or StallDetector()
        self._follower: MetricsFollower | None = None
        self._stall_reported, self._reported_unreadable = False, 0
        for line in self._poll()[0]:
            self._on_line(line, fresh=False)
            self.state.on_event(line["event"], line["step"], line, self.stall.clock())
        self.state.status = self._status()

    def snapshot(self, width: int, charset: CharSet) -> str:
        """Return the panel as plain text of any height."""
        lines = panel_lines(self.state, self.stall.clock(), width, UNLIMITED_HEIGHT, charset)
        return "\n".join(line.plain.rstrip() for line in lines)

    def follow(self) -> None:
        """Show the run until its `end` line: a panel on a terminal, else plain lines."""
        display = create_display(self.state, self.stall.clock)
        try:
            display.print(self.state.status)
            if isinstance(display, LiveDisplay):
                display.refresh()
            elif self.state.values:
                display.print(train_text(self.state, self.stall.clock()))
            while not self.state.ended:
                time.sleep(POLL_INTERVAL)
                self._update(display)
        finally:
            display.close()

    def _update(self, display: Display) -> None:
        lines, replaced = self._poll()
        if replaced:
            display.print(f"{self.name}: metrics.jsonl was replaced; reading it from the beginning")
            self.state.reset()
            self.stall.reset()
        for line in lines:
            self._on_line(line, fresh=True)
            event, step = line["event"], line["step"]
            display.log_event(event, step, line, event_text(event, step, line))
        if self._follower is not None and self._follower.unreadable > self._reported_unreadable:
            self._reported_unreadable = self._follower.unreadable
            display.print(
                f"note: {self._reported_unreadable} lines of metrics.jsonl so far are not a JSON "
                "object with event and step; ignored"
            )
        stalled = bool(self.stall.message)
        if stalled and not self._stall_reported and not self.state.ended:
            display.print(f"note: {self.stall.message}")
        self._stall_reported = stalled
        with self.state.lock:
            self.state.status = self._status()

    def _poll(self) -> tuple[list[Line], bool]:
        """New lines, and True if the file was replaced.

        A link such as `runs/latest` is resolved once, when its directory is first seen, so that
        the watcher does not change over to the next run.
        """
        if self._follower is None and self.path.is_dir():
            self.path = self.path.resolve()
            self._follower = MetricsFollower(self.path / "metrics.jsonl")
        return self._follower.poll() if self._follower is not None else ([], False)

    def _on_line(self, line: Line, *, fresh: bool) -> None:
        # Read again at each start: the run may be resumed with more steps.
        if line["event"] in START_EVENTS:
            self.state.total_steps = self._read_total_steps()
        self.stall.on_line(line, fresh=fresh)

    def _read_total_steps(self) -> int | None:
        """Last step of the run; None if another version of dmoe wrote its config."""
        try:
            return load(self.path / "resolved.yaml").train.steps
        except ConfigError:
            return None

    def _status(self) -> str:
        if self._follower is None:
            return f"{self.name}: the directory does not exist yet; waiting"
        if self.state.ended:
            return f"{self.name}: {event_text('end', self.state.step, {self.state.ended: True})}"
        if not self.state.has_events:
            return f"{self.name}: the run has logged nothing yet; waiting"
        text = self.stall.message or self.stall.age_text
        return f"{self.name}: {text}" if text else self.name


class StallDetector:
    """Compares the time since the last line with the pauses between earlier lines.

    Pauses are differences of the writer's times in the lines. The time since the last line is
    measured by this machine's monotonic clock, which is never adjusted.
    """

    def __init__(
        self,
        minimum: float = 30.0,
        factor: float = 3.0,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Define a stall: no line for `minimum` seconds and `factor` times the longest pause.

        Args:
            minimum: seconds.
            factor: multiple of the longest pause of this attempt.
            monotonic: this machine's monotonic clock.
            wall: this machine's time of day.
        """
        self.minimum, self.factor, self.monotonic, self.wall = minimum, factor, monotonic, wall
        self.reset()

    def reset(self) -> None:
        """Forget all lines."""
        self._pauses: deque[float] = deque(maxlen=KEPT_PAUSES)
        self._written: float | None = None
        """Time of the last line by its writer's clock; None if unknown."""
        self._clock_offset = 0.0
        """Writer's clock minus this machine's monotonic clock."""
        self._approximate = False
        """True if the offset relies on the time of day of two machines."""

    def on_line(self, line: Line, *, fresh: bool) -> None:
        """Record a line; `fresh` if it was written after the last poll.

        A fresh line without a time counts from now. Of an older one nothing is known.
        """
        if line["event"] in START_EVENTS:
            self.reset()
        written = finite(line.get("time"))
        if written is None and fresh:
            written = self.clock() or self.wall()
        if written is not None:
            if self._written is not None:
                self._pauses.append(max(0.0, written - self._written))
            now = written if fresh else max(written, self.wall())
            self._clock_offset, self._approximate = now - self.monotonic(), now > written
        self._written = written

    def clock(self) -> float | None:
        """Return the current time by the writer's clock; None before the first line with a time."""
        return None if self._written is None else self.monotonic() + self._clock_offset

    @property
    def seconds(self) -> float:
        """Seconds since the last line; 0 if its time is unknown."""
        now = self.clock()
        return 0.0 if now is None or self._written is None else now - self._written

    @property
    def age_text(self) -> str:
        """Age of the last line as text; empty if unknown."""
        if self._written is None:
            return ""
        reserve = ", if the clocks of both machines agree" if self._approximate else ""
        return f"last line {format_clock(self.seconds)} ago{reserve}"

    @property
    def message(self) -> str:
        """Sentence on a stall; empty if there is none, or no pause to compare with."""
        longest = max(self._pauses, default=None)
        if longest is None or self.seconds <= max(self.minimum, self.factor * longest):
            return ""
        return (
            f"no line for {format_clock(self.seconds)}; the longest pause before was "
            f"{format_clock(longest)}. The run may have been killed, hang, or be busy"
        )
