"""Writer and readers of `metrics.jsonl`: one JSON object per line, the source of the trackers.

The file is append-only. A run resumed after step s repeats the later steps: a line with
`resumed_from: s` (event `restart`, `rollback` or `start`) makes earlier measurements beyond s void.
A process that starts without a checkpoint voids step 0 too, because its initial weights may
differ. Alerts stay: they say why a run crashed. `last_valid_step` is the only place of this rule.

The numbers per MoE layer (`layers` of a line) are in a compact file beside it (`layer_file.py`). A
line and its record have at most `LINE_BYTES`, and one byte per number: they are exact where that
is enough for exact numbers, and rounded otherwise. The readers put `layers` back into the lines; in
old files they are there.

Three readers share one parser (`parse_line`): `read_metrics` (strict), `read_metrics_tolerant`
(for reports of killed, resumed or damaged runs) and `MetricsFollower` (`metrics_follower.py`, for
a file that grows).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dmoe.config.errors import ConfigError
from dmoe.config.secrets import redact_json
from dmoe.runs.layer_file import LayerReader, LayerWriter, layer_path

Line = dict[str, Any]
REPEATED_EVENTS = ("train", "eval", "checkpoint", "end")
"""Events that a resumed run writes again; others (`alert`, `start`, `restart`) stay in force."""
START_EVENTS = ("start", "restart")
PLAIN_NUMBERS = {int, float}
BLOCK_BYTES = 1 << 16
"""Block size of reads from the end of a file."""
LINE_BYTES = 2000
"""Limit of a line and its record in `metrics.layers.bin`, without one byte per number of it."""
PLACE = "layers_at"
"""Key of a line with the place of its layers: [offset, size]."""
PLACE_BYTES = 40
"""That key and its value, with offsets up to 10 TB."""


class MetricsFile:
    """Append-only writer. Each line is flushed, so that it survives a crash and can be followed.

    Secrets are redacted. Opening the file removes an incomplete last line.
    """

    def __init__(self, path: Path) -> None:
        _truncate_incomplete_lines(path)
        self._file = path.open("a", encoding="utf-8")
        self._layers = LayerWriter(layer_path(path))

    def write(self, event: str, step: int, values: Line) -> None:
        """Write one line. NaN and infinity become null. Raises OSError, e.g. on a full disk."""
        line = {"event": event, "step": step, "time": round(time.time(), 3)}
        overwritten = sorted(line.keys() & values.keys())
        assert not overwritten, f"values must not overwrite {overwritten}"
        line = redact_json(_without_nan(line | values))
        layers = line.get("layers")
        if isinstance(layers, list) and layers:
            # The record first: a line never names one that is not there.
            del line["layers"]
            used = len(json.dumps(line, allow_nan=False)) + PLACE_BYTES
            line[PLACE] = self._layers.append(layers, LINE_BYTES - used)
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close both files."""
        self._layers.close()
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
    without_layers: int = 0
    """Lines whose record in `metrics.layers.bin` is missing or damaged; their rest is kept."""
    skipped_layers: int = 0
    """Lines whose layers were not read, since the run has more than `max_layers`."""

    def of(self, event: str) -> list[Line]:
        """Return the lines in force with this event."""
        return [line for line in self.lines if line["event"] == event]


def read_metrics(path: Path, *, include_void: bool = False, layers: bool = True) -> list[Line]:
    """Read the lines in force: each step once, however often the run was killed and resumed.

    An incomplete last line is ignored. `include_void` also returns the void lines; without
    `layers`, what is in `metrics.layers.bin` is not read. Raises ConfigError for any other line
    that is not valid, or whose layers cannot be read.
    """
    lines: list[Line] = []
    damaged: list[int] = []
    *complete, _incomplete = path.read_bytes().split(b"\n")
    with LayerReader(layer_path(path)) as reader:
        for number, text in enumerate(complete, 1):
            line = parse_line(text)
            if line is None:
                problem = f"line {number} is not a JSON object with event and step"
                raise ConfigError("metrics", path, problem, "remove that line")
            if not layers:
                line.pop(PLACE, None)
            elif not read_layers(line, reader):
                damaged.append(number)
            lines.append(line)
    # The last lines before a crash of the machine may name records that did not reach the disk.
    while damaged and damaged[-1] == len(lines):
        damaged.pop()
        lines.pop()
    if damaged:
        name = layer_path(path).name
        problem = f"line {damaged[0]} has layers in {name} that are missing or damaged"
        raise ConfigError("metrics", path, problem, f"copy {name} too, or remove that line")
    return lines if include_void else _split_void(lines)[0]


def read_metrics_tolerant(path: Path, max_layers: int | None = None) -> Metrics:
    """Read all valid lines; none for a missing file. Costs one pass and memory for all lines.

    `max_layers`: of a longer run, the layers of about as many `train` lines are read, evenly spaced
    and with the last one.
    """
    texts = path.read_bytes().split(b"\n") if path.is_file() else []
    parsed = [parse_line(text) for text in texts if text.strip()]
    valid = [line for line in parsed if line is not None]
    skipped = _skip_layers([line for line in valid if line["event"] == "train"], max_layers)
    with LayerReader(layer_path(path)) as reader:
        without = sum(not read_layers(line, reader) for line in valid)
    lines, void = _split_void(valid)
    return Metrics(lines, void, parsed.count(None), without, skipped)


def _skip_layers(lines: list[Line], max_layers: int | None) -> int:
    """Remove the places of layers that are not to be read; return their number."""
    named = [line for line in lines if PLACE in line]
    stride = 1 if max_layers is None else math.ceil(len(named) / max_layers)
    skipped = [line for index, line in enumerate(reversed(named)) if index % max(1, stride)]
    for line in skipped:
        del line[PLACE]
    return len(skipped)


def read_layers(line: Line, reader: LayerReader) -> bool:
    """Put the layers of a line in the place of their address; False where that is not possible."""
    if PLACE not in line:
        return True
    layers = reader.read(line.pop(PLACE))
    if layers is not None:
        line["layers"] = layers
    return layers is not None


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
    # Thousands of lists per report: those of plain numbers, the rule, take no loop. A sum is finite
    # only if all of its terms are.
    if PLAIN_NUMBERS.issuperset(map(type, value)) and math.isfinite(sum(value)):
        return value
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


def _truncate_incomplete_lines(path: Path) -> None:
    """Remove an incomplete last line, and last lines without their layers.

    They belong to steps that no checkpoint holds. The file of a long run is not read whole.
    """
    if not path.exists():
        return
    with path.open("r+b") as file, LayerReader(layer_path(path)) as reader:
        size = file.seek(0, os.SEEK_END)
        end = _line_start(file, size)
        while end:
            begin = _line_start(file, end - 1)
            file.seek(begin)
            line = parse_line(file.read(end - begin))
            if line is None or read_layers(line, reader):
                break
            end = begin
        if end < size:
            file.truncate(end)


def _line_start(file: BinaryIO, position: int) -> int:
    """Return where the line begins that has the byte before `position`, searched in blocks."""
    while position:
        begin = max(0, position - BLOCK_BYTES)
        file.seek(begin)
        newline = file.read(position - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        position = begin
    return 0


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity by None: JSON has neither."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
