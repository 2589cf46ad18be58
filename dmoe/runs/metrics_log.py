"""Writer and readers of `metrics.jsonl`: one JSON object per line, the source of the trackers.

The file is append-only. A run resumed after step s repeats the later steps: a line with
`resumed_from: s` (event `restart`, `rollback` or `start`) makes earlier measurements beyond s void.
A process that starts without a checkpoint voids step 0 too, because its initial weights may
differ. Alerts stay: they say why a run crashed. `last_valid_step` is the only place of this rule.

Three readers share one parser (`parse_line`): `read_metrics` (strict), `read_metrics_tolerant`
(for reports of killed, resumed or damaged runs) and `MetricsFollower` (a file that grows).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.secrets import redact_json

Line = dict[str, Any]
REPEATED_EVENTS = ("train", "eval", "checkpoint", "end")
"""Events that a resumed run writes again; others (`alert`, `start`, `restart`) stay in force."""
START_EVENTS = ("start", "restart")
BLOCK_BYTES = 1 << 16
"""Block size of reads from the end of a file."""


class MetricsFile:
    """Append-only writer. Each line is flushed, so that it survives a crash and can be followed.

    Secrets are redacted. Opening the file removes an incomplete last line.
    """

    def __init__(self, path: Path) -> None:
        _truncate_incomplete_line(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, step: int, values: Line) -> None:
        """Write one line. NaN and infinity become null. Raises OSError, e.g. on a full disk."""
        line = {"event": event, "step": step, "time": round(time.time(), 3)}
        overwritten = sorted(line.keys() & values.keys())
        assert not overwritten, f"values must not overwrite {overwritten}"
        line |= values
        self._file.write(json.dumps(redact_json(_without_nan(line)), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Metrics:
    """Content of a metrics file, split by the resume rule."""

    lines: list[Line]
    """Lines in force, in the order they were written."""
    void: list[Line]
    """Measurements that a later resume or rollback made void."""
    unreadable: int
    """Number of lines that are not valid: an incomplete last line, or damage."""

    def of(self, event: str) -> list[Line]:
        """Return the lines in force with this event."""
        return [line for line in self.lines if line["event"] == event]


def read_metrics(path: Path, *, include_void: bool = False) -> list[Line]:
    """Read the lines in force: each step once, however often the run was killed and resumed.

    An incomplete last line is ignored. `include_void` also returns the void lines. Raises
    ConfigError for any other line that is not valid.
    """
    lines: list[Line] = []
    *complete, _incomplete = path.read_bytes().split(b"\n")
    for number, text in enumerate(complete, 1):
        line = parse_line(text)
        if line is None:
            raise ConfigError(
                "metrics",
                path,
                f"line {number} is not a JSON object with event and step",
                "remove that line",
            )
        lines.append(line)
    return lines if include_void else _split_void(lines)[0]


def read_metrics_tolerant(path: Path) -> Metrics:
    """Read all valid lines; none for a missing file. Costs one pass and memory for all lines."""
    texts = path.read_bytes().split(b"\n") if path.is_file() else []
    parsed = [parse_line(text) for text in texts if text.strip()]
    lines, void = _split_void(line for line in parsed if line is not None)
    return Metrics(lines, void, unreadable=parsed.count(None))


def last_logged_step(path: Path) -> int:
    """Return the step of the last valid line, 0 if there is none. Reads the end of the file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - BLOCK_BYTES))
            texts = file.read(BLOCK_BYTES).split(b"\n")
    except OSError:
        return 0
    # The first text may begin in the middle of a line, the last one may be incomplete.
    lines = (parse_line(text) for text in reversed(texts))
    return next((line["step"] for line in lines if line is not None), 0)


class MetricsFollower:
    """Incremental reader of a metrics file that another process appends to.

    Returns only complete lines: the writer may be in the middle of the last one, or was killed
    there, and then the next writer removes it. So no line ever has to be taken back, unless the
    file is replaced, or is shorter than what was read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unreadable = 0
        """Number of lines that were not valid."""
        self._offset = 0
        self._file_id = (0, 0)

    def poll(self) -> tuple[list[Line], bool]:
        """Return the lines since the last call, and True if the file was replaced and read again.

        Returns no lines as long as there is no file.
        """
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                file_id = (status.st_dev, status.st_ino)
                replaced = self._offset > 0 and (
                    file_id != self._file_id or status.st_size < self._offset
                )
                self._offset, self._file_id = 0 if replaced else self._offset, file_id
                file.seek(self._offset)
                text = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return [], False
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        lines = [parse_line(line) for line in complete.splitlines()]
        self.unreadable += lines.count(None)
        return [line for line in lines if line is not None], replaced


def parse_line(text: bytes) -> Line | None:
    """Parse one line. None unless it is a JSON object with a text `event` and an integer `step`."""
    try:
        line = json.loads(text.decode("utf-8", errors="replace"))
    # A long run of brackets exceeds the recursion limit.
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("event"), str):
        return None
    return line if type(line.get("step")) is int else None


def last_valid_step(event: str, step: int, values: Line) -> int | None:
    """Return the last step that stays in force after this line; None if it makes nothing void.

    -1 for a process that starts without a checkpoint: step 0 was measured with other weights.
    Versions before `resumed_from` gave the step in the `restart` line itself.
    """
    resumed_from = values.get("resumed_from", step if event == "restart" else None)
    if not isinstance(resumed_from, int):
        return None
    return -1 if resumed_from == 0 and event in START_EVENTS else resumed_from


def finite(value: Any) -> float | None:
    """Return `value` if it is a finite number; None for null, NaN, infinity, text and the rest."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def number(line: Line, *path: str) -> float | None:
    """Return the finite number at the nested keys `path`; None if there is none."""
    value: Any = line
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return finite(value)


def numbers(value: Any) -> list[float]:
    """Return `value` if it is a list of finite numbers, else an empty list."""
    if not isinstance(value, list):
        return []
    found = [finite(item) for item in value]
    return [item for item in found if item is not None] if None not in found else []


def matrix(value: Any) -> list[list[float]]:
    """Return `value` if it is a list of equally long, non-empty lists of numbers, else []."""
    if not isinstance(value, list) or not value:
        return []
    rows = [numbers(row) for row in value]
    return rows if rows[0] and len({len(row) for row in rows}) == 1 else []


def _split_void(lines: Iterable[Line]) -> tuple[list[Line], list[Line]]:
    """Apply the resume rule: lines in force, and lines that a later one made void."""
    valid: list[Line] = []
    void: list[Line] = []
    for line in lines:
        last = last_valid_step(line["event"], line["step"], line)
        if last is not None:
            void += [old for old in valid if _is_void(old, last)]
            valid = [old for old in valid if not _is_void(old, last)]
        valid.append(line)
    return valid, void


def _is_void(line: Line, last: int) -> bool:
    return line["event"] in REPEATED_EVENTS and line["step"] > last


def _truncate_incomplete_line(path: Path) -> None:
    """Remove an incomplete last line: it belongs to a step that no checkpoint holds.

    Searched from the end in blocks: the file of a long run is not read whole.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position:
            begin = max(0, position - BLOCK_BYTES)
            file.seek(begin)
            newline = file.read(position - begin).rfind(b"\n")
            if newline >= 0:
                position = begin + newline + 1
                break
            position = begin
        if position < end:
            file.truncate(position)


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity by None: JSON has neither."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
