"""What the run tells its display."""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["Display"]


class Display(Protocol):
    def step(self, step: int) -> None:
        """`step` steps are done, and nothing was measured."""

    def log_event(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None:
        """What goes into `metrics.jsonl`; `line` says the same to a person, and is empty where nothing needs to be said."""

    def print(self, text: str) -> None:
        """A line that stays."""

    def close(self) -> None:
        """Leave the terminal as it was found; lines may still be said. May be called again."""
