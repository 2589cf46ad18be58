"""Tables of labelled samples for `train.task=classification`.

A sample consists of streams (feature groups, `data.streams`) whose columns are concatenated in that
order. A sample is held out by a hash of its values, never by its position, and exact duplicates are
removed first, as with documents (corpus.py). The training order is that of order.py.

digits.py  the streams of sklearn:digits        own.py  a CSV, Parquet, ... of the user's own

Letters: N samples of a split, B samples of a batch, W width of all chosen streams.
"""

from __future__ import annotations

import numpy as np

from dmoe.config.datasets import DATASETS, selected_streams, table_spec
from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data.synthetic import ClusterDataset
from dmoe.data.tables.digits import DIGIT_FEATURES
from dmoe.data.tables.own import fill_table_shape, open_own_table
from dmoe.data.tables.samples import (
    SampleDataset,
    TableDataset,
    TableSplits,
    row_bytes,
    summarize,
    table_hash,
    train_mask,
    unique_indices,
)

__all__ = [
    "SampleDataset",
    "TableDataset",
    "TableSplits",
    "fill_table_shape",
    "num_classes",
    "open_table",
    "stream_widths",
]


def stream_widths(config: DataConfig) -> dict[str, int]:
    """Return the widths of the chosen streams by name; ConfigError on data.source, data.streams."""
    return selected_streams(config)


def num_classes(config: DataConfig) -> int:
    """Return the number of classes, without reading data; ConfigError on data.source."""
    return len(table_spec(config).classes)


def open_table(config: DataConfig, seed: int) -> TableSplits:
    """Read the table that `data.source` names.

    `seed` decides the order of training samples, and the content of synthetic ones. Raises
    ConfigError on the field of data.* that cannot work, and if scikit-learn is needed but missing.
    """
    widths, names = selected_streams(config), table_spec(config).classes
    if config.source == "synthetic:clusters":
        return _open_clusters(config, seed, widths, names)
    if config.source not in DATASETS:
        return open_own_table(config, seed, _describe_source(config.source, widths, names))
    raw_NW, class_N, streams = _read(config.source)
    kept_N = unique_indices(raw_NW)
    removed = len(raw_NW) - len(kept_N)
    raw_NW, class_N = raw_NW[kept_N], class_N[kept_N].astype(np.int64)
    train_N = train_mask(raw_NW, config.holdout)
    value_NW = np.concatenate(
        [_standardize(streams, name, kept_N, train_N) for name in widths], 1
    ).astype(np.float32)
    train, held_out = (
        TableDataset(value_NW[side], class_N[side], seed) for side in (train_N, ~train_N)
    )
    content = row_bytes(raw_NW), row_bytes(class_N.astype(np.float64))
    fingerprint = table_hash(config.source, list(widths), config.holdout, *content)
    notes = [f"{removed} exact duplicates removed"] if removed else []
    summary = summarize(_describe_source(config.source, widths, names), train, held_out, notes)
    return TableSplits(train, held_out, widths, names, fingerprint, summary)


def _open_clusters(
    config: DataConfig, seed: int, widths: dict[str, int], names: tuple[str, ...]
) -> TableSplits:
    stream_of_column = [
        name for name, width in table_spec(config).streams.items() for _ in range(width)
    ]
    columns = tuple(
        column
        for name in widths
        for column, stream in enumerate(stream_of_column)
        if stream == name
    )
    train, held_out = (
        ClusterDataset(columns, len(names), seed, split) for split in ("train", "held_out")
    )
    summary = f"{_describe_source(config.source, widths, names)}, endless"
    return TableSplits(
        train, held_out, widths, names, table_hash(config.source, list(widths), seed), summary
    )


def _read(source: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Load a scikit-learn data set.

    Returns the raw values [N, X], which decide duplicates and the split; the classes [N]; and each
    stream by name [N, its width].
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ConfigError(
            "data.source",
            source,
            "needs scikit-learn, which is not installed",
            "pip install scikit-learn",
        ) from error
    loaded = getattr(datasets, f"load_{source.removeprefix('sklearn:')}")()
    raw_NW = np.asarray(loaded.data, dtype=np.float64)
    if source == "sklearn:digits":
        streams = {name: feature(loaded.images) for name, feature in DIGIT_FEATURES.items()}
    else:
        streams = {"features": raw_NW}
    return raw_NW, loaded.target, streams


def _standardize(
    streams: dict[str, np.ndarray], name: str, kept_N: np.ndarray, train_N: np.ndarray
) -> np.ndarray:
    """Return a stream's values; `features` are standardized by the training split.

    The features of digits have a fixed scale and are returned unchanged.
    """
    value_NW: np.ndarray = streams[name][kept_N]
    if name != "features":
        return value_NW
    mean_W, deviation_W = value_NW[train_N].mean(0), value_NW[train_N].std(0)
    return np.asarray((value_NW - mean_W) / deviation_W)


def _describe_source(source: str, widths: dict[str, int], names: tuple[str, ...]) -> str:
    streams = " + ".join(f"{name} ({width})" for name, width in widths.items())
    return f"{source}: {streams}, {len(names)} classes"
