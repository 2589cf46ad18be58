"""The displays without a terminal: one line a logged step, only what matters, or nothing.

What the run tells its display.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from dmoe.observability.display.format import train_words
from dmoe.observability.display.state import DisplayState

MATTERS = ("alert", "rollback", "end")
"""Events that `--quiet` lets through: notes and alerts, a run that went back, and where everything is at the end."""


class Silent:
    """All ranks but the main one."""

    def step(self, step: int) -> None: ...

    def log_event(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None: ...

    def print(self, text: str) -> None: ...

    def close(self) -> None: ...


class Plain(Silent):
    """A pipe or a file: lines that `grep` finds."""

    def __init__(self, state: DisplayState, clock: Callable[[], float | None]) -> None:
        self.state, self.clock = state, clock

    def step(self, step: int) -> None:
        self.state.reached(step, self.clock())

    def log_event(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None:
        self.state.on_event(event, step, values, self.clock())
        text = line or (train_words(self.state, self.clock()) if event == "train" else "")
        if text:
            self.print(text)

    def print(self, text: str) -> None:
        print(text, flush=True)


class Quiet(Silent):
    """`--quiet`: what a person would want to be woken for, and the run directory at the end."""

    def log_event(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None:
        if line and event in MATTERS:
            print(line, flush=True)


class Display(Protocol):
    def step(self, step: int) -> None:
        """`step` steps are done, and nothing was measured."""

    def log_event(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None:
        """What goes into `metrics.jsonl`; `line` says the same to a person, and is empty where nothing needs to be said."""

    def print(self, text: str) -> None:
        """A line that stays."""

    def close(self) -> None:
        """Leave the terminal as it was found; lines may still be said. May be called again."""
