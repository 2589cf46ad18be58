"""Terminal displays of a run: a live panel, plain lines in a pipe, few lines with `--quiet`.

Used by the run itself and, without torch, by `dmoe watch`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from rich.console import Console

from dmoe.observability.display.layer_table import charset_for
from dmoe.observability.display.live import LiveDisplay
from dmoe.observability.display.state import DisplayState, train_text

QUIET_EVENTS = ("alert", "rollback", "end")
"""Events that `--quiet` prints; the line of `end` names the run directory."""


class Display(Protocol):
    """Terminal output of a run."""

    def step(self, step: int) -> None:
        """Record that `step` steps are done; nothing was measured."""

    def log_event(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None:
        """Show one line of `metrics.jsonl`.

        Args:
            event: kind of the line, e.g. `train`.
            step: its step.
            values: its other values.
            line: the same as text; empty if nothing is to be printed.
        """

    def print(self, text: str) -> None:
        """Print a line that stays."""

    def close(self) -> None:
        """Restore the terminal. Lines may still be printed. May be called again."""


class NullDisplay:
    """No output: the display of all ranks except rank 0."""

    def step(self, step: int) -> None: ...

    def log_event(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None: ...

    def print(self, text: str) -> None: ...

    def close(self) -> None: ...


class PlainDisplay(NullDisplay):
    """Lines without control codes, for a pipe or a file: one per logged step."""

    def __init__(self, state: DisplayState, clock: Callable[[], float | None]) -> None:
        self.state, self.clock = state, clock

    def step(self, step: int) -> None:
        self.state.on_step(step, self.clock())

    def log_event(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None:
        self.state.on_event(event, step, values, self.clock())
        text = line or (train_text(self.state, self.clock()) if event == "train" else "")
        if text:
            self.print(text)

    def print(self, text: str) -> None:
        print(text, flush=True)


class QuietDisplay(NullDisplay):
    """`--quiet`: alerts, rollbacks, and the run directory at the end."""

    def log_event(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None:
        if line and event in QUIET_EVENTS:
            print(line, flush=True)


def open_display(total_steps: int, start: int, is_main: bool, quiet: bool = False) -> Display:
    """Open the display of a training process.

    Args:
        total_steps: last step of the run.
        start: steps that are already done.
        is_main: True on rank 0; the other ranks print nothing.
        quiet: print only `QUIET_EVENTS`.
    """
    if not is_main:
        return NullDisplay()
    if quiet:
        return QuietDisplay()
    return create_display(DisplayState(total_steps, start), time.monotonic)


def create_display(
    state: DisplayState, clock: Callable[[], float | None]
) -> LiveDisplay | PlainDisplay:
    """Create a panel if stdout is a terminal that can move its cursor, else plain lines."""
    console = Console(highlight=False, emoji=False, markup=False)
    # Not rich's own test: with FORCE_COLOR, as often in CI, it takes a file for a terminal.
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        return PlainDisplay(state, clock)
    return LiveDisplay(console, state, charset_for(sys.stdout.encoding, os.environ), clock)
