"""`metrics.jsonl`: what a run measured, one JSON object a line. The truth that the trackers only repeat.

A run that is resumed after step s does the steps beyond s again: a line with `resumed_from: s` (the `restart` line) says that earlier
lines beyond s are void. One that starts from nothing (step 0) voids step 0 too: its weights need not be those of an earlier start. The
file itself is only appended to, so what happened stays readable; `read_metrics` leaves the void out.
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

__all__ = ["MetricsFile", "read_metrics"]

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
