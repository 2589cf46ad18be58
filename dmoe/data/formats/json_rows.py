"""JSON Lines, and arrays of objects in one JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from dmoe.data.formats.compression import open_stream
from dmoe.data.formats.detect import Format
from dmoe.data.formats.errors import unreadable
from dmoe.data.formats.rows import Row

LARGEST_ARRAY = 256 << 20
"""Bytes of an array, which is read whole."""
_NAMES = {list: "a list", str: "a string", int: "a number", float: "a number"}


class JsonRows:
    """`Rows` of a file of JSON."""

    columns = None

    def __init__(self, path: Path, format: Format, origin: str) -> None:
        self._path, self._format, self._origin = path, format, origin

    def __call__(self, names: Sequence[str] | None = None) -> Iterator[Row]:
        if self._format.name == "JSON array":
            yield from self._items()
            return
        with open_stream(self._path, self._format.compression, self._origin) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.isspace():
                    yield self._row(self._parse(line, f"line {number}"), f"line {number}")

    def _items(self) -> Iterator[Row]:
        with open_stream(self._path, self._format.compression, self._origin) as file:
            content = file.read(LARGEST_ARRAY + 1)
        if len(content) > LARGEST_ARRAY:
            reason = (
                f"is one JSON array of more than {LARGEST_ARRAY >> 20} MiB, which is read whole"
            )
            fix = f"write it as JSON Lines: jq -c '.[]' {self._path} > {self._path.stem}.jsonl"
            raise unreadable(self._origin, self._path, reason, fix)
        items = self._parse(content.removeprefix(b"\xef\xbb\xbf"), "its array")
        if not isinstance(items, list):
            reason = f"must be one array of objects, and is {_kind(items)}"
            raise unreadable(self._origin, self._path, reason, "write one object per line")
        for number, item in enumerate(items, 1):
            yield self._row(item, f"item {number}")

    def _parse(self, content: bytes, place: str) -> object:
        try:
            return json.loads(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            reason = f"{place} is not UTF-8 (byte 0x{content[error.start]:02x} after {error.start})"
            fix = "convert the file with iconv -t UTF-8"
            raise unreadable(self._origin, self._path, reason, fix) from error
        except (ValueError, RecursionError) as error:
            reason = f"{place} is no JSON ({error})"
            fix = "repair it, or name the file .txt to train on its bytes as they are"
            raise unreadable(self._origin, self._path, reason, fix) from error

    def _row(self, value: object, place: str) -> Row:
        if not isinstance(value, dict):
            reason = f"{place} is {_kind(value)}, not an object"
            fix = 'write objects, such as {"text": "..."}'
            raise unreadable(self._origin, self._path, reason, fix)
        return Row(value, place)


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return "an object" if isinstance(value, dict) else _NAMES[type(value)]
