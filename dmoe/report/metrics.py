"""`metrics.jsonl` read tolerantly: a report is wanted most for runs that were killed, restarted, or trained by an older version.

A restart goes back to a checkpoint, so steps after it may stand in the file twice. What the earlier process wrote about them is not
part of the run any more and must not be drawn. What was said about them stays: the alerts before a crash are what one looks for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Line", "Metrics", "finite", "matrix", "number", "numbers", "read_metrics"]

Line = dict[str, Any]
MEASURED = ("train", "eval", "checkpoint", "end")
"""Events that a resumed run repeats."""
BEGINNINGS = ("start", "restart")


@dataclass(frozen=True)
class Metrics:
    lines: list[Line]
    """What is in force, in the order it was written."""
    undone: list[Line]
    """What was measured or saved, and a later restart or rollback went back behind."""
    unreadable: int
    """Lines that are no JSON object with an event and a step: the last one of a killed run, or damage."""

    def of(self, event: str) -> list[Line]:
        return [line for line in self.lines if line["event"] == event]


def read_metrics(path: Path) -> Metrics:
    """The lines of a metrics file; empty where there is none. Costs one pass, and memory for all lines."""
    lines: list[Line] = []
    undone: list[Line] = []
    unreadable = 0
    for line in _parsed(path):
        if line is None:
            unreadable += 1
            continue
        back = _goes_back_to(line)
        if back is not None:
            undone += [earlier for earlier in lines if _is_behind(earlier, back)]
            lines = [earlier for earlier in lines if not _is_behind(earlier, back)]
        lines.append(line)
    return Metrics(lines, undone, unreadable)


def finite(value: Any) -> float | None:
    """`value` if it is a number one can draw; None for null (JSON has no NaN), NaN, text and the rest."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def number(line: Line, *path: str) -> float | None:
    """The number at `path`; None where there is none."""
    value: Any = line
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return finite(value)


def numbers(value: Any) -> list[float]:
    """A list of numbers; empty where `value` is not exactly that."""
    if not isinstance(value, list):
        return []
    found = [finite(item) for item in value]
    return [item for item in found if item is not None] if None not in found else []


def matrix(value: Any) -> list[list[float]]:
    """A list of equally long, non-empty lists of numbers; empty where `value` is not exactly that."""
    if not isinstance(value, list) or not value:
        return []
    rows = [numbers(row) for row in value]
    return rows if rows[0] and len({len(row) for row in rows}) == 1 else []


def _is_behind(line: Line, back: int) -> bool:
    return line["event"] in MEASURED and line["step"] > back


def _goes_back_to(line: Line) -> int | None:
    """The last step that stays in force. Versions before `resumed_from` gave it as the step of the restart itself.

    -1 for a process that starts from nothing: what was measured at step 0 may have been of other weights.
    """
    back = line.get("resumed_from", line["step"] if line["event"] == "restart" else None)
    if back == 0 and line["event"] in BEGINNINGS:
        return -1
    return back if isinstance(back, int) else None


def _parsed(path: Path) -> Iterator[Line | None]:
    """Each line as an object, None for one that is not; blank ones are passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            if text.strip():
                yield _parse(text)


def _parse(text: str) -> Line | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("event"), str):
        return None
    step = line.get("step")
    return line if isinstance(step, int) and not isinstance(step, bool) else None
