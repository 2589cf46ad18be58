"""Tables of labelled samples that `data.source` can name: streams, their widths, and classes.

Known without reading the data, so that a model can be built, checked and explained before. A test
compares them with the data (`dmoe/data/tables.py`). Imports no numpy.
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
    if data.source not in DATASETS:
        near = difflib.get_close_matches(data.source, DATASETS, n=1) or ["sklearn:digits"]
        allowed = f"must be one of {', '.join(DATASETS)} for train.task=classification"
        raise ConfigError("data.source", data.source, allowed, f"use {near[0]}")
    return DATASETS[data.source]


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
