"""`metrics.jsonl`: what a run measured, one JSON object a line. The truth that the trackers only repeat.

A run that is resumed after step s does the steps beyond s again: a line with `resumed_from: s` (the `restart` line) says that earlier
lines beyond s are void. One that starts from nothing (step 0) voids step 0 too: its weights need not be those of an earlier start. The
file itself is only appended to, so what happened stays readable; `read_metrics` leaves the void out.

`metrics.jsonl` read tolerantly: a report is wanted most for runs that were killed, restarted, or trained by an older version.

A restart goes back to a checkpoint, so steps after it may stand in the file twice. What the earlier process wrote about them is not
part of the run any more and must not be drawn. What was said about them stays: the alerts before a crash are what one looks for.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from dmoe.config.errors import ConfigError
from dmoe.config.secrets import redact_json
from dataclasses import dataclass


MEASURED = ("train", "eval", "checkpoint", "end")
"""Events that a resumed run repeats. What was said (`alert`), and each `start` and `restart`, stays."""
BEGINNINGS = ("start", "restart")
BLOCK = 1 << 16


class MetricsFile:
    """Appended and flushed at once, so that it can be followed and survives a crash. Holds no secret."""

    def __init__(self, path: Path) -> None:
        _cut_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """One line. NaN and infinity become null. Raises OSError, e.g. on a full disk."""
        line = {"event": event, "step": step, "time": round(time.time(), 3)}
        assert not line.keys() & values.keys(), f"values must not overwrite {sorted(line.keys() & values.keys())}"
        line |= values
        self._file.write(json.dumps(redact_json(_plain(line)), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path, *, void: bool = False) -> list[dict[str, Any]]:
    """The lines in force: each step once, however often the run was killed and resumed, in the order they were written.

    A last line without its end is not there yet. `void`: with all that was written and is not in force any more. Raises ConfigError
    for any other line that is no JSON object.
    """
    lines: list[dict[str, Any]] = []
    for line in _lines(path):
        if "resumed_from" in line and not void:
            afresh = line["event"] in BEGINNINGS and line["resumed_from"] == 0
            kept = -1 if afresh else line["resumed_from"]
            lines = [old for old in lines if old["event"] not in MEASURED or old["step"] <= kept]
        lines.append(line)
    return lines


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    *whole, _torn = path.read_bytes().split(b"\n")
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not {"event", "step"} <= line.keys():
            raise ConfigError("metrics", path, f"line {number} is not a JSON object with event and step", "remove that line")
        yield line


def _cut_torn_line(path: Path) -> None:
    """Remove what a writer that was killed left of its last line: it belongs to a step that no checkpoint holds.

    Searched from the end in blocks: the file of a long run is not read whole.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position:
            begin = max(0, position - BLOCK)
            file.seek(begin)
            newline = file.read(position - begin).rfind(b"\n")
            if newline >= 0:
                position = begin + newline + 1
                break
            position = begin
        if position < end:
            file.truncate(position)


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Line = dict[str, Any]


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


def read_metrics_tolerant(path: Path) -> Metrics:
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
