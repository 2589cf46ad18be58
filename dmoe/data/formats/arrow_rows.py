"""Parquet, Arrow (the file and the stream format), and directories of `save_to_disk`.

Read with pyarrow, without `datasets`, whose import takes seconds: a saved dataset is Arrow files
and a list of them. Memory: one batch of `BATCH` rows of the columns that are asked for; Arrow files
are memory-mapped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmoe.data.formats.detect import SAVED_SPLITS
from dmoe.data.formats.errors import optional_library, unreadable
from dmoe.data.formats.rows import Row, Rows

BATCH = 64
"""Rows that are decoded together."""


class ArrowRows:
    """`Rows` of tables that Arrow can read.

    Args:
        path: for messages.
        origin: the config field that names it.
        schema: of all batches, a pyarrow.Schema.
        batches: a function from column names (None: all) to record batches, from the first.
    """

    def __init__(
        self,
        path: Path | str,
        origin: str,
        schema: Any,
        batches: Callable[[Sequence[str] | None], Iterator[Any]],
    ) -> None:
        self._path, self._origin, self._batches = path, origin, batches
        self.columns: Mapping[str, str] = {field.name: _kind(field.type) for field in schema}
        if len(self.columns) < len(schema):
            names = [field.name for field in schema]
            twice = next(name for name in names if names.count(name) > 1)
            raise unreadable(origin, path, f"has two columns named {twice!r}", "rename one of them")

    def __call__(self, names: Sequence[str] | None = None) -> Iterator[Row]:
        number = 0
        for batch in self._batches(names):
            columns = [batch.schema.field(i).name for i in range(batch.num_columns)]
            for start in range(0, batch.num_rows, BATCH):
                part = batch.slice(start, BATCH)
                lists = [self._values(column, number) for column in part.columns]
                for values in zip(*lists, strict=True):
                    number += 1
                    yield Row(dict(zip(columns, values, strict=True)), f"row {number}")

    def _values(self, column: Any, first: int) -> list[Any]:
        try:
            return list(column.to_pylist())
        except UnicodeDecodeError:
            return [self._value(scalar, first + 1 + i) for i, scalar in enumerate(column)]

    def _value(self, scalar: Any, number: int) -> Any:
        try:
            return scalar.as_py()
        except UnicodeDecodeError as error:
            fix = "write the file again from UTF-8 text"
            raise unreadable(
                self._origin, self._path, f"row {number} is not UTF-8 ({error.reason})", fix
            ) from error


def open_arrow(path: Path, name: str, origin: str) -> Rows:
    """Open the rows of a `Parquet`, `Arrow` or `saved dataset` file or directory.

    Raises:
        ConfigError: pyarrow is missing, or the file is not what it is named.
    """
    pyarrow = optional_library("pyarrow", origin, path, f"a {name} file")
    with _named(pyarrow, name, path, origin):
        if name == "Parquet":
            return _parquet(path, origin)
        files = _saved_files(path, origin) if name == "saved dataset" else [path]
        schemas = [_schema(pyarrow, file) for file in files]
        for file, schema in zip(files, schemas, strict=True):
            if not schema.equals(schemas[0]):
                reason = f"{file.name} has other columns than {files[0].name}"
                raise unreadable(origin, path, reason, "save it again")

    def batches(names: Sequence[str] | None) -> Iterator[Any]:
        for file in files:
            with _named(pyarrow, name, file, origin):
                for batch in _read(pyarrow, file):
                    yield batch if names is None else batch.select(list(names))

    return ArrowRows(path, origin, schemas[0], batches)


def _parquet(path: Path, origin: str) -> Rows:
    parquet = optional_library("pyarrow.parquet", origin, path, "a Parquet file")
    pyarrow = optional_library("pyarrow", origin, path, "a Parquet file")
    with parquet.ParquetFile(path) as file:
        schema = file.schema_arrow

    def batches(names: Sequence[str] | None) -> Iterator[Any]:
        with (
            _named(pyarrow, "Parquet", path, origin),
            parquet.ParquetFile(path, pre_buffer=False) as file,
        ):
            columns = None if names is None else list(names)
            # Threads read ahead of what is used, and hold it.
            yield from file.iter_batches(BATCH, columns=columns, use_threads=False)

    return ArrowRows(path, origin, schema, batches)


@contextmanager
def _named(pyarrow: Any, name: str, path: Path, origin: str) -> Iterator[None]:
    """Turn the errors of pyarrow about a file into one sentence with its name."""
    try:
        yield
    except pyarrow.ArrowException as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        reason = f"is damaged or no {name} file ({lines[0].rstrip('.')})"
        raise unreadable(origin, path, reason, "download or write it again") from error
    except OSError as error:
        reason = f"is damaged or cannot be read ({error.strerror or str(error).splitlines()[0]})"
        raise unreadable(origin, path, reason, "download or write it again") from error


def _open(pyarrow: Any, path: Path) -> Any:
    """Open an Arrow file; one without the magic bytes of the file format is a stream."""
    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
    source = pyarrow.memory_map(str(path))
    return pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)


def _schema(pyarrow: Any, path: Path) -> Any:
    return _open(pyarrow, path).schema


def _read(pyarrow: Any, path: Path) -> Iterator[Any]:
    reader = _open(pyarrow, path)
    if isinstance(reader, pyarrow.ipc.RecordBatchFileReader):
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
    else:
        yield from reader


def _saved_files(directory: Path, origin: str) -> list[Path]:
    """List the Arrow files of a saved dataset, in the order of its rows."""
    if (directory / SAVED_SPLITS).is_file():
        splits = sorted(path.name for path in directory.iterdir() if path.is_dir())
        reason = f"is a saved dataset of several splits ({', '.join(splits)})"
        example = f"{directory}/{'train' if 'train' in splits else next(iter(splits), 'train')}"
        raise unreadable(origin, directory, reason, f"name one of them: {example}")
    try:
        state = json.loads((directory / "state.json").read_text("utf-8"))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"has a state.json that cannot be read ({error})"
        raise unreadable(origin, directory, reason, "save it again") from error
    files = [directory / name for name in names]
    missing = [file.name for file in files if file.parent != directory or not file.is_file()]
    if missing or not files:
        reason = f"lacks {missing[0] if missing else 'Arrow files'}, which its state.json names"
        raise unreadable(origin, directory, reason, "save it again")
    return files


def _kind(kind: Any) -> str:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        return "number"
    return "number" if types.is_decimal(kind) else "other"
