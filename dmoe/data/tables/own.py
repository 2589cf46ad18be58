"""A table of the user's own: a CSV, Parquet, Arrow or JSON Lines file with a column of classes.

    dmoe train train.task=classification data.source=my.csv data.label_field=kind

The features are numbers: the columns that `data.columns` names, else every other column, which must
then all be of numbers. The classes are the values of `data.label_field`; sorted, as numbers if all
are whole numbers. A model must have its shape before the data is read, and also where the file is
gone, so `fill_table_shape` writes columns and classes into the config, and the run records them.

Letters: N samples, W columns.
"""

from __future__ import annotations

import array
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from dmoe.config.datasets import DATASETS
from dmoe.config.errors import ConfigError
from dmoe.config.schema import Config, DataConfig
from dmoe.data.formats import Row, Rows, format_of, open_rows
from dmoe.data.formats.csv_rows import number_or_none
from dmoe.data.formats.errors import unreadable
from dmoe.data.formats.records import label_of, missing_column
from dmoe.data.formats.rows import HUB
from dmoe.data.tables.samples import (
    TableDataset,
    TableSplits,
    row_bytes,
    standardized,
    summarize,
    table_hash,
    train_mask,
    unique_indices,
)

MOST_CLASSES = 10_000
"""More different labels are taken for a quantity, which is not a class."""


def fill_table_shape(config: Config) -> Config:
    """Return a config whose `data.columns` and `data.classes` are those of its own table.

    Any other config is returned as it is. Call it where the user's config is loaded: it reads the
    file once, unless both fields are set.

    Raises:
        ConfigError: no label, columns that are not numbers, one class only, an unreadable file.
    """
    data = config.data
    if config.train.task != "classification" or data.source in DATASETS:
        return config
    path = Path(data.source).expanduser()
    if not (data.source.startswith(HUB) or path.exists()) or (data.columns and data.classes):
        return config
    rows = _open(data.source, "data.source")
    columns = _columns(data, rows)
    label = data.label_field
    if label is None:
        raise _no_label(data.source, columns)
    if label not in columns:
        raise missing_column("data.label_field", label, data.source, columns)
    chosen = list(data.columns) or _numbers(data, rows, columns, label)
    for name in chosen:
        if name not in columns or name == label:
            rest = {name: kind for name, kind in columns.items() if name != label}
            raise missing_column("data.columns", name, data.source, rest)
    classes = list(data.classes) or _classes(data.source, rows, label)
    return replace(config, data=replace(data, columns=chosen, classes=classes))


def open_own_table(config: DataConfig, seed: int, description: str) -> TableSplits:
    """Open a table of the user's own: columns standardized by the training samples.

    A column with one value in all of them becomes 0. Samples with equal numbers are in one split,
    whatever their class. `data.validation_source` is the held-out split; a sample that is in it
    too is not trained on.

    Args:
        config: with columns and classes.
        seed: of the order of training samples.
        description: of the source, for the summary.

    Raises:
        ConfigError: see `read_own_table`; on data.validation_source or data.holdout, where a split
            would be empty.
    """
    raw_NW, class_N, notes = _distinct(config, config.source, "data.source")
    if config.validation_source is None:
        train_N = train_mask(raw_NW, config.holdout)
        held_NW, held_class_N = raw_NW[~train_N], class_N[~train_N]
    else:
        source = config.validation_source
        held_NW, held_class_N, more = _distinct(config, source, "data.validation_source")
        known = {row_bytes(row) for row in held_NW}
        train_N = np.array([row_bytes(row) not in known for row in raw_NW])
        if not train_N.any():
            allowed = "holds every sample of data.source, and leaves none for training"
            raise ConfigError("data.validation_source", source, allowed, "name another file")
        notes += [f"held out: {source}", *more]
        if removed := int((~train_N).sum()):
            notes.append(f"samples of data.validation_source left out of training ({removed})")
    raw_NW, class_N = raw_NW[train_N], class_N[train_N]
    trained = {*class_N.tolist()}
    missing = [name for label, name in enumerate(config.classes) if label not in trained]
    if missing:
        notes.append(f"no training sample of {', '.join(missing)}")
    value_NW, held_value_NW = standardized(raw_NW, held_NW, config.columns)
    train = TableDataset(value_NW, class_N, seed)
    held_out = TableDataset(held_value_NW, held_class_N, seed)
    parts = (raw_NW, class_N, held_NW, held_class_N)
    content = [row_bytes(part.astype(np.float64)) for part in parts]
    fingerprint = table_hash("own", config.columns, config.classes, *content)
    widths = {"features": len(config.columns)}
    summary = summarize(description, train, held_out, notes)
    return TableSplits(train, held_out, widths, tuple(config.classes), fingerprint, summary)


def _distinct(
    config: DataConfig, source: str, origin: str
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the distinct samples of a file: float64 [N, W], int64 [N], and notes."""
    raw_NW, class_N = read_own_table(config, source, origin)
    kept_N = unique_indices(np.column_stack([raw_NW, class_N]))
    removed = len(raw_NW) - len(kept_N)
    notes = [f"{removed} exact duplicates removed"] if removed else []
    return raw_NW[kept_N], class_N[kept_N], notes


def read_own_table(data: DataConfig, source: str, origin: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the columns `data.columns` and the classes of a table.

    Args:
        data: with columns, classes and label_field.
        source: the file: data.source, or data.validation_source.
        origin: the field that names the file.

    Returns:
        float64 [N, W], and the index of the class, int64 [N].

    Raises:
        ConfigError: a value that is no number, an unknown class, a column that the file lacks.
    """
    rows, label = _open(source, origin), data.label_field
    if label is None:
        raise _no_label(source, rows.columns or {})
    index_of = {name: index for index, name in enumerate(data.classes)}
    numbers, found = array.array("d"), array.array("q")
    for name in (*data.columns, label):
        if rows.columns is not None and name not in rows.columns:
            field = "data.label_field" if name == label else "data.columns"
            raise missing_column(field, name, source, rows.columns)
    for row in rows([*data.columns, label]):
        numbers.extend(_number(row, name, source, origin) for name in data.columns)
        value = _label(row, label, source, origin)
        if value not in index_of:
            known = ", ".join(data.classes[:20])
            reason = f"{row.place} has the label {value}, and data.classes has {known}"
            raise unreadable(origin, source, reason, "add it to data.classes, or repair it")
        found.append(index_of[value])
    if not found:
        raise unreadable(origin, source, "has a header and no row", "give it samples")
    raw_NW = np.frombuffer(numbers, dtype=np.float64).reshape(len(found), len(data.columns))
    return raw_NW, np.frombuffer(found, dtype=np.int64)


def _open(source: str, origin: str) -> Rows:
    if source.startswith(HUB):
        return open_rows(source, None, origin)
    path = Path(source).expanduser()
    if not path.exists():
        reason = "must be one file of records, and there is no such file"
        raise unreadable(origin, source, reason, "check the path")
    format = format_of(path, origin)
    if format.kind != "records":
        reason = f"must be a table for train.task=classification, and is a {format.name}"
        raise unreadable(origin, source, reason, "name one CSV, Parquet, Arrow or JSON Lines file")
    return open_rows(path, format, origin)


def _columns(data: DataConfig, rows: Rows) -> Mapping[str, str]:
    """Return the columns and their kinds; of JSON Lines those of the first row."""
    if rows.columns is not None:
        return rows.columns
    first = next(rows(), None)
    if first is None:
        raise unreadable("data.source", data.source, "holds no row", "give it samples")
    numeric = {name: isinstance(value, int | float) for name, value in first.values.items()}
    return {name: "number" if is_number else "text" for name, is_number in numeric.items()}


def _numbers(data: DataConfig, rows: Rows, columns: Mapping[str, str], label: str) -> list[str]:
    """Return every column but the label; refuse those that are not of numbers."""
    rest = {name: kind for name, kind in columns.items() if name != label}
    others = [name for name, kind in rest.items() if kind != "number"]
    numbers = [name for name in rest if name not in others]
    if not numbers:
        raise ConfigError(
            "data.columns",
            "[]",
            f"needs a column of numbers, and {data.source} has {', '.join(rest) or 'none'} beside "
            "the label: text is no feature of a classifier",
            "write features as numbers, or train a language model with the labels as domains: "
            "train.task=language_modelling",
        )
    if others:
        where = _first_text(rows, others[0])
        raise ConfigError(
            "data.columns",
            "[]",
            f"must name columns of numbers, and {', '.join(others)} of {data.source} "
            f"{'is' if len(others) == 1 else 'are'} not{where}",
            f"use data.columns=[{','.join(numbers)}], or write it as numbers",
        )
    return numbers


def _first_text(rows: Rows, name: str) -> str:
    """Return where a column has its first value that is no number: one `NA` makes it text."""
    for row in rows([name]):
        value = row.values.get(name)
        if isinstance(value, str) and value.strip() and number_or_none(value) is None:
            return f" ({row.place} has {value[:40]!r})"
    return ""


def _classes(source: str, rows: Rows, label: str) -> list[str]:
    found = set[str]()
    for row in rows([label]):
        found.add(_label(row, label, source, "data.source"))
        if len(found) > MOST_CLASSES:
            allowed = f"has more than {MOST_CLASSES:,} values in {source}, so it is no class"
            raise ConfigError("data.label_field", label, allowed, "name a column of classes")
    if len(found) < 2:
        only = f"only the class {next(iter(found))}" if found else "no row"
        raise ConfigError(
            "data.label_field", label, f"has {only} in {source}", "two classes are needed"
        )
    if all(value.removeprefix("-").isdecimal() for value in found):
        return sorted(found, key=lambda value: (int(value), value))
    return sorted(found)


def _number(row: Row, name: str, source: str, origin: str) -> float:
    value = row.values.get(name)
    if isinstance(value, str):
        value = next(iter(number_or_none(value) or ()), value)
    elif isinstance(value, int | float | Decimal):
        with suppress(OverflowError):  # an integer beyond float64 stays one, and is refused
            value = float(value)
    if not isinstance(value, float) or not math.isfinite(value):
        shown = f"{_short(value)}, which is no number,"
        if value is None or value == "":
            shown = "no value"
        reason = f"{row.place} has {shown} in {name!r}"
        fix = "repair or remove it, or leave the column out of data.columns"
        raise unreadable(origin, source, reason, fix)
    return value


def _short(value: Any) -> str:
    shown = repr(value) if isinstance(value, str | int | float) else str(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."


def _label(row: Row, name: str, source: str, origin: str) -> str:
    label = label_of(row.values.get(name))
    if label is None:
        reason = f"{row.place} has no label in {name!r}"
        raise unreadable(origin, source, reason, "give it one, or remove it")
    return label


def _no_label(source: str, columns: Mapping[str, str]) -> ConfigError:
    names = ", ".join(columns)
    allowed = f"must name the column with the classes of {source}"
    return ConfigError("data.label_field", "null", allowed, f"use one of {names}")
