"""Tables of labelled samples that `data.source` can name: their streams, how wide each is, and their classes. Imports no numpy.

Known without reading anything, so that a model can be built, checked and explained before the data is there; a test holds it against
the data (dmoe/data/tables.py).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig


@dataclass(frozen=True)
class Columns:
    streams: dict[str, int]
    """Numbers a sample has in each stream, by name; without `data.streams` the first is read alone."""
    classes: tuple[str, ...]


CATALOGUE = {
    "sklearn:digits": Columns({"pixels": 64, "profiles": 16, "strokes": 20}, tuple("0123456789")),
    "sklearn:wine": Columns({"features": 13}, ("class_0", "class_1", "class_2")),
    "sklearn:breast_cancer": Columns({"features": 30}, ("malignant", "benign")),
    "synthetic:clusters": Columns({"a": 12, "b": 7, "c": 4}, tuple("01234")),
}


def columns_of(data: DataConfig) -> Columns:
    """Raises ConfigError for a source that is no table."""
    if data.source not in CATALOGUE:
        near = difflib.get_close_matches(data.source, CATALOGUE, n=1) or ["sklearn:digits"]
        allowed = f"must be one of {', '.join(CATALOGUE)} for train.task=classification"
        raise ConfigError("data.source", data.source, allowed, f"use {near[0]}")
    return CATALOGUE[data.source]


def chosen_streams(data: DataConfig) -> dict[str, int]:
    """The width of each stream that is read, by name, in the order they are read. Raises ConfigError for one there is not."""
    there = columns_of(data).streams
    for name in data.streams:
        if name not in there:
            allowed = f"holds {name}, but {data.source} has {', '.join(there)}"
            raise ConfigError("data.streams", data.streams, allowed, "name one of these")
        if data.streams.count(name) > 1:
            raise ConfigError(
                "data.streams", data.streams, f"holds {name} twice", "name each stream once"
            )
    return {name: there[name] for name in data.streams or list(there)[:1]}
