"""Tables of labelled samples that `data.source` can name: streams, their widths, and classes.

Known without reading the data, so that a model can be built, checked and explained before. A test
compares them with the data (`dmoe/data/tables/`). Of a table of the user's own `data.columns` and
`data.classes` say it, which are filled in where a config is loaded (`fill_table_shape` there).
Imports no numpy.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig


@dataclass(frozen=True)
class TableSpec:
    """Shape of the samples of one table."""

    streams: dict[str, int]
    """Width of each stream, by name. Without `data.streams` only the first is read."""
    classes: tuple[str, ...]


DATASETS = {
    "sklearn:digits": TableSpec({"pixels": 64, "profiles": 16, "strokes": 20}, tuple("0123456789")),
    "sklearn:wine": TableSpec({"features": 13}, ("class_0", "class_1", "class_2")),
    "sklearn:breast_cancer": TableSpec({"features": 30}, ("malignant", "benign")),
    "synthetic:clusters": TableSpec({"a": 12, "b": 7, "c": 4}, tuple("01234")),
}


def table_spec(data: DataConfig) -> TableSpec:
    """Return the shape of the table that `data.source` names.

    Raises:
        ConfigError: the source is no table.
    """
    if data.source in DATASETS:
        return DATASETS[data.source]
    if data.columns and data.classes:
        return TableSpec({"features": len(data.columns)}, tuple(data.classes))
    near = difflib.get_close_matches(data.source, DATASETS, n=1) or ["sklearn:digits"]
    allowed = (
        f"must be one of {', '.join(DATASETS)}, or a file of records with data.label_field, for "
        "train.task=classification"
    )
    fix = f"use {near[0]}"
    if data.label_field is not None:
        allowed, fix = f"{allowed}, and there is no such file", "check the path"
    raise ConfigError("data.source", data.source, allowed, fix)


def check_table_fields(data: DataConfig) -> None:
    """Refuse fields of a table of the user's own that do not fit.

    Raises:
        ConfigError: a field that a built-in table does not read, a name given twice, one class.
    """
    if data.source in DATASETS:
        for name in ("label_field", "columns", "classes", "validation_source"):
            if value := getattr(data, name):
                allowed = f"has no meaning for data.source={data.source}"
                raise ConfigError(f"data.{name}", value, allowed, f"leave data.{name} out")
        return
    for field, names in (("data.columns", data.columns), ("data.classes", data.classes)):
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(field, names, f"holds {twice[0]} twice", "name each once")
    if data.label_field in data.columns:
        allowed = f"holds data.label_field={data.label_field}, which is the answer"
        raise ConfigError("data.columns", data.columns, allowed, "leave it out")
    if len(data.classes) == 1:
        raise ConfigError("data.classes", data.classes, "must be two or more", "name the others")


def selected_streams(data: DataConfig) -> dict[str, int]:
    """Return the width of each stream to read, by name, in reading order.

    Raises:
        ConfigError: a stream that the table does not have, or one named twice.
    """
    known = table_spec(data).streams
    for name in data.streams:
        if name not in known:
            allowed = f"holds {name}, but {data.source} has {', '.join(known)}"
            raise ConfigError("data.streams", data.streams, allowed, "name one of these")
        if data.streams.count(name) > 1:
            fix = "name each stream once"
            raise ConfigError("data.streams", data.streams, f"holds {name} twice", fix)
    return {name: known[name] for name in data.streams or list(known)[:1]}
