"""Whether a run that writes no line should worry the one who watches it. It says how long, and against what; never that it is dead."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from dmoe.report.metrics import finite
from dmoe.training.display.words import clock_time

__all__ = ["StallDetector"]

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
        return f"last line {clock_time(self.seconds)} ago" + (", if its clock and this one agree" if self._age else "")

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
