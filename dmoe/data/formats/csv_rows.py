"""CSV and TSV, as RFC 4180 has them: a header, quoted values that may hold line breaks.

The separator of TSV is a tab. That of CSV is a comma if the header has one, else a semicolon (as
spreadsheets of many countries write), else a tab. A quote that is not closed, a row with more or
fewer values than the header, and bytes that are not UTF-8 are errors with their line.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from dmoe.data.formats.compression import inner_name, open_stream
from dmoe.data.formats.errors import unreadable
from dmoe.data.formats.rows import Row

PROBED_ROWS = 100
"""Rows that decide whether a column is of numbers."""
_LARGEST = 2**31 - 1
"""Characters of a value; the limit of the csv module, 131,072, is less than a book."""


class CsvRows:
    """`Rows` of a file of separated values."""

    def __init__(self, path: Path, compression: str | None, origin: str) -> None:
        self._path, self._compression, self._origin = path, compression, origin
        inside = inner_name(path, compression)
        self._separator = "\t" if inside.suffix.lower() in (".tsv", ".tab") else ""
        with open_stream(path, compression, origin) as file:
            header = next(self._cells(file), None)
        if header is None:
            raise self._error("is empty: its first line must name the columns", "write its header")
        self._header = header[1]
        twice = [name for name in self._header if self._header.count(name) > 1]
        if twice:
            raise self._error(f"has two columns named {twice[0]!r}", "rename one of them")
        probed = list(islice(self(), PROBED_ROWS))
        self.columns = {
            name: "number" if _is_number([row.values[name] for row in probed]) else "text"
            for name in self._header
        }

    def __call__(self, names: Sequence[str] | None = None) -> Iterator[Row]:
        with open_stream(self._path, self._compression, self._origin) as file:
            cells = self._cells(file)
            next(cells, None)
            for place, row in cells:
                if len(row) != len(self._header):
                    reason = (
                        f"{place} has {len(row)} values, and the header has {len(self._header)}"
                    )
                    raise self._error(reason, "repair it; a value with a separator needs quotes")
                yield Row(dict(zip(self._header, row, strict=True)), place)

    def _cells(self, file: BinaryIO) -> Iterator[tuple[str, list[str]]]:
        """Yield the place and the values of each row, the header first; blank lines are no rows."""
        lines = self._lines(file)
        first = next(lines, None)
        if first is None:
            return
        separator = self._separator or next((c for c in ",;\t" if c in first), ",")
        reader = csv.reader(_joined(first, lines), delimiter=separator, strict=True)
        while True:
            place = f"line {reader.line_num + 1}"
            try:
                with _long_values():
                    row = next(reader, None)
            except csv.Error as error:
                fix = "repair it; quotes inside a quoted value are doubled"
                raise self._error(f"{place} is no row of CSV ({error})", fix) from error
            if row is None:
                return
            if row:
                yield place, row

    def _lines(self, file: BinaryIO) -> Iterator[str]:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                found = f"byte 0x{line[error.start]:02x} after {error.start}"
                fix = "convert the file with iconv -t UTF-8"
                raise self._error(f"line {number} is not UTF-8 ({found})", fix) from error

    def _error(self, reason: str, fix: str) -> Exception:
        return unreadable(self._origin, self._path, reason, fix)


@contextmanager
def _long_values() -> Iterator[None]:
    """Lift the limit of the csv module, which is one per process, while a row is read."""
    before = csv.field_size_limit(_LARGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _joined(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _is_number(values: list[str]) -> bool:
    given = [value for value in values if value.strip()]
    return bool(given) and all(map(number_or_none, given))


def number_or_none(value: str) -> tuple[float] | None:
    """Return the number that a value of CSV is, in a tuple, or None.

    Python's `1_000` is none: elsewhere `1_2` is a name.
    """
    if "_" in value:
        return None
    try:
        return (float(value),)
    except ValueError:
        return None
