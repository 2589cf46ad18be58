"""The rows of a file of records: named values, one row at a time.

    JSON Lines  one object per line; blank lines hold no row
    JSON array  one object per item; read whole, so up to 256 MB
    CSV, TSV    the first line names the columns; every value is a string
    Parquet, Arrow, saved datasets, hf:NAME     columns with types

`open_rows` gives the columns where the format knows them before the rows are read, so that a field
that does not exist is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dmoe.data.formats.detect import Format

HUB = "hf:"
"""Prefix of the name of a Hugging Face dataset."""


class Row(NamedTuple):
    """One row."""

    values: Mapping[str, Any]
    """By column."""
    place: str
    """Where it stands: `line 3` of text, `row 3` of a table; both count from 1."""


class Rows(Protocol):
    """The rows of one file."""

    @property
    def columns(self) -> Mapping[str, str] | None:
        """Column names with `text`, `number` or `other`; None where each row has its own."""

    def __call__(self, names: Sequence[str] | None = None) -> Iterator[Row]:
        """Read the rows in order, in constant memory, each time from the first.

        Args:
            names: the columns to read, which exist; None: all.

        Raises:
            ConfigError: a row that cannot be read, with its place.
        """


def open_rows(path: Path | str, format: Format | None, origin: str) -> Rows:
    """Open the rows of a file.

    Args:
        path: a file or directory whose format is of kind `records`, or `hf:NAME`.
        format: from `format_of`; None for `hf:NAME`.
        origin: the config field that names it.

    Raises:
        ConfigError: a missing library, no header, a file that is not what it is named.
    """
    if format is None:
        from dmoe.data.formats.hub import HubRows

        return HubRows(str(path), origin)
    path = Path(path)
    assert format.kind == "records", f"{path} is {format.name}"
    if format.name == "CSV":
        from dmoe.data.formats.csv_rows import CsvRows

        return CsvRows(path, format.compression, origin)
    if format.name.startswith("JSON"):
        from dmoe.data.formats.json_rows import JsonRows

        return JsonRows(path, format, origin)
    from dmoe.data.formats.arrow_rows import open_arrow

    return open_arrow(path, format.name, origin)
