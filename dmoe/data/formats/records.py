"""One document per record: its text, where it stands, and its label.

Which field is the text: `RecordFields.text`, else `text` where there is one, else the only column
of strings of a table. Anything else is refused with the names that there are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dmoe.config.errors import ConfigError
from dmoe.data.formats.compression import open_stream
from dmoe.data.formats.detect import Format, format_of
from dmoe.data.formats.errors import unreadable
from dmoe.data.formats.rows import HUB, Row, Rows, open_rows

_LONGEST_NAME = 64
"""Characters of a header that is taken for a name where no field is given."""


# A line break would end a line of the terminal, and half of a surrogate pair cannot be printed.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Record(NamedTuple):
    """One document."""

    content: bytes
    """UTF-8 of a record's text; of plain text the bytes as they are."""
    place: str
    """The path, and for a record its line or row: `docs.jsonl line 3`."""
    label: str | None = None
    """The value of `RecordFields.label`; None without one, and for plain text."""


@dataclass(frozen=True)
class RecordFields:
    """Which fields of a record are read."""

    text: str | None = None
    """data.text_field; None: the default of the module docstring."""
    label: str | None = None
    """data.label_field; None: no label is read."""
    origin: str = "data.source"
    """The config field that names the files, for error messages."""
    alone: bool = True
    """Whether no other config field names further files: then a field that none has is refused."""


def read_records(
    path: Path | str, fields: RecordFields, format: Format | None = None
) -> Iterator[Record]:
    """Read the documents of one file, in order and in constant memory.

    Args:
        path: a file of text or records, a directory of `save_to_disk`, or `hf:NAME`.
        fields: which fields are the text and the label.
        format: from `format_of`, if known; else the file is looked at.

    Yields:
        One record for plain text; for records one per line or row. Empty texts too.

    Raises:
        ConfigError: on `fields.origin`, with the file and its line or row: what cannot be read; on
            data.text_field or data.label_field: a field that does not exist.

    Memory: one document; of tables 64 rows of the two columns.
    """
    if str(path).startswith(HUB):
        yield from _read_rows(path, open_rows(str(path), None, fields.origin), fields)
        return
    path = Path(path)
    format = format or format_of(path, fields.origin)
    if format.kind == "records":
        yield from _read_rows(path, open_rows(path, format, fields.origin), fields)
    elif format.kind == "text":
        with open_stream(path, format.compression, fields.origin) as file:
            yield Record(file.read(), str(path))
    else:
        reason = f"is a {format.name} file, which cannot be read as text"
        raise unreadable(fields.origin, path, reason, format.fix or "name text or records")


def _read_rows(path: Path | str, rows: Rows, fields: RecordFields) -> Iterator[Record]:
    text = _text_field(path, rows.columns, fields)
    if fields.label is not None and rows.columns is not None:
        if fields.label not in rows.columns:
            raise missing_column("data.label_field", fields.label, path, rows.columns)
        if fields.label == text:
            reason = f"is the text of {path} too"
            raise ConfigError("data.label_field", fields.label, reason, "name two fields")
    names = [text] if fields.label is None else [text, fields.label]
    for row in rows(names):
        label = None if fields.label is None else _label(path, row, fields)
        yield Record(_text(path, row, text, fields), f"{path} {row.place}", label)


def _text_field(path: Path | str, columns: Mapping[str, str] | None, fields: RecordFields) -> str:
    if columns is None:
        return fields.text or "text"
    if fields.text is not None:
        if fields.text not in columns:
            raise missing_column("data.text_field", fields.text, path, columns)
        if columns[fields.text] == "other":
            raise ConfigError(
                "data.text_field",
                fields.text,
                f"is a column of {path} that holds no strings",
                f"name another one of {', '.join(columns)}",
            )
        return fields.text
    if "text" in columns and columns["text"] != "other":
        return "text"
    strings = [name for name, kind in columns.items() if kind == "text" and name != fields.label]
    if len(strings) == 1:
        if len(strings[0]) > _LONGEST_NAME:
            allowed = f"must name the text of {path}, whose first line, the header, reads as text"
            shown = f"{strings[0][:_LONGEST_NAME]}..."
            fix = f"begin the file with a line of names, or use {shown!r} in full"
            raise ConfigError("data.text_field", "null", allowed, fix)
        return strings[0]
    few = "no column" if not strings else f"{len(strings)} columns"
    raise ConfigError(
        "data.text_field",
        "null",
        f"must name the text of {path}, which has {few} of strings and none named text",
        f"use one of {', '.join(columns)}",
    )


def missing_column(field: str, name: str, path: Path | str, columns: Iterable[str]) -> ConfigError:
    """Return the error of a field that a table does not have."""
    return ConfigError(field, name, f"is no column of {path}", f"use one of {', '.join(columns)}")


def _text(path: Path | str, row: Row, name: str, fields: RecordFields) -> bytes:
    value = _value(path, row, name, "data.text_field", fields)
    if not isinstance(value, str):
        reason = f"{row.place} has no string in {name!r} but {_shown(value)}"
        raise unreadable(fields.origin, path, reason, "repair or remove it, or set data.text_field")
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"{row.place} has half of a surrogate pair in {name!r}, which is no character"
        raise unreadable(fields.origin, path, reason, "repair or remove it") from error


def label_of(value: Any) -> str | None:
    """Return the label that a value of a record is: a string or a number, as text.

    None for anything else: null, an empty string, NaN, an object, a text with control characters or
    with half of a surrogate pair.
    """
    if not isinstance(value, str | int | float) or value != value:
        return None
    text = str(value)
    return text if text and not _UNPRINTABLE.search(text) else None


def _label(path: Path | str, row: Row, fields: RecordFields) -> str:
    assert fields.label is not None
    value = _value(path, row, fields.label, "data.label_field", fields)
    label = label_of(value)
    if label is None:
        reason = f"{row.place} has no label in {fields.label!r} but {_shown(value)}"
        raise unreadable(fields.origin, path, reason, "give it one, or remove it")
    return label


def _value(path: Path | str, row: Row, name: str, field: str, fields: RecordFields) -> Any:
    if name in row.values:
        return row.values[name]
    known = ", ".join(map(repr, row.values)) or "nothing"
    reason = f"{row.place} has no {name!r}, but {known}"
    raise unreadable(fields.origin, path, reason, f"repair it, or set {field}")


def _shown(value: object) -> str:
    """Return a value for a message: null and numbers as they are, else what it is."""
    if value is None or isinstance(value, int | float):
        return json.dumps(value)
    names: dict[type, str] = {str: "an empty string", dict: "an object", list: "a list"}
    return names.get(type(value), type(value).__name__)
