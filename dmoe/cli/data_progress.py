"""Progress of `dmoe data prepare`: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from dmoe.data.prepare import Progress

INTERVAL = 10.0
"""Seconds between two plain lines."""


class ProgressDisplay:
    """Shows the parts that are done, MB/s and the time left."""

    def __init__(self, bar: Bar | None) -> None:
        """`bar`: on a terminal; None prints lines."""
        self._bar = bar
        self._task: TaskID | None = None
        self._began = self._counted_from = self._printed = time.monotonic()
        self._base = 0
        """Bytes that an earlier run had done."""
        self._last = Progress(0, None, 0, 0)

    def update(self, progress: Progress) -> None:
        """Show the state after another part."""
        if progress.kept > self._last.kept:
            # Only this run's own work has a speed.
            self._base, self._counted_from = progress.done, time.monotonic()
        self._last = progress
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("", total=progress.total)
            done = progress.done
            if progress.finished:
                self._bar.update(self._task, total=done)
            self._bar.update(self._task, completed=done, description=self._line())
        elif time.monotonic() - self._printed >= INTERVAL:
            self._printed = time.monotonic()
            print(self._line(), flush=True)

    def summary(self) -> str:
        """Return one line about the whole preparation."""
        kept = f", {self._last.kept} of them by an earlier run" if self._last.kept else ""
        seconds = time.monotonic() - self._began
        size = f"{self._last.done / 1e6:,.1f} MB in {self._last.parts} parts{kept}"
        return f"prepared {size}, {seconds:,.1f} s, {self._speed() / 1e6:,.1f} MB/s"

    def _speed(self) -> float:
        seconds = time.monotonic() - self._counted_from
        return (self._last.done - self._base) / seconds if seconds > 0 else 0.0

    def _line(self) -> str:
        done, total, speed = self._last.done, self._last.total, self._speed()
        line = f"{done / 1e6:,.0f} MB, {speed / 1e6:,.1f} MB/s"
        if total is None or self._last.finished:
            return line
        share = min(1.0, done / total)
        left = max(0, total - done) / speed if speed > 0 else 0.0
        return f"{share:.0%}, {line}, {_duration(left)} left"


@contextmanager
def progress_display(source: str, workers: int) -> Iterator[ProgressDisplay]:
    """Show the progress of a preparation while the block runs."""
    processes = "1 process" if workers == 1 else f"{workers} processes"
    if not sys.stdout.isatty():
        print(f"preparing {source} with {processes}", flush=True)
        yield ProgressDisplay(None)
        return
    columns = (BarColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(), transient=True) as bar:
        yield ProgressDisplay(bar)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
