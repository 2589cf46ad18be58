"""Tables of labelled samples for `train.task=classification`.

A sample consists of streams (feature groups, `data.streams`) whose columns are concatenated in that
order. A sample is held out by a hash of its values, never by its position, and exact duplicates are
removed first, as with documents (corpus.py). The training order is that of order.py.

The streams of `sklearn:digits` (8 x 8 pixels, integers from 0 to 16) are fixed features; nothing is
learned:

- pixels   [64]  the pixels, row by row, over 16.
- profiles [16]  the mean pixel of each row, then of each column, over 16.
- strokes  [20]  per quadrant of 4 x 4 pixels (top left, top right, bottom left, bottom right) a
  histogram of gradient directions (after Dalal and Triggs 2005). With gx = right - left neighbour
  and gy = lower - upper neighbour (0 outside the image), and opposite directions being equal, bin
  b = 0..3 sums |gx| + |gy| over the pixels whose gradient direction is between b * 45 and
  (b + 1) * 45 degrees, over 64; the fifth bin counts the pixels without a gradient, over 16.

Every sum is one of integers and every divisor a power of two, so the features have the same bits on
every machine.

Letters: N samples of a split or images, B samples of a batch, W width of all chosen streams (of an
image: its width), H height of an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dmoe.config.datasets import selected_streams, table_spec
from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data.order import sequence_indices
from dmoe.data.splits import holdout_hash
from dmoe.data.synthetic import ClusterDataset


class SampleDataset(Protocol):
    """One split of a table: float features and a class per sample."""

    @property
    def num_sequences(self) -> int | None:
        """Number of samples; None if the dataset is endless."""

    def batch(
        self, step: int, first: int, count: int, global_batch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return consecutive samples of one step, in shuffled order, epoch after epoch.

        A function of its arguments (those of `TokenDataset.batch`) and the seed alone.

        Returns:
            (features, classes): float32 [count, W], int64 [count].
        """

    def samples(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return samples in stored order, for evaluation: float32 [count, W], int64 [count].

        Never wraps: the caller keeps first + count within `num_sequences`.
        """


@dataclass(frozen=True)
class TableDataset:
    """A `SampleDataset` in memory."""

    value_NW: np.ndarray
    class_N: np.ndarray
    seed: int

    @property
    def num_sequences(self) -> int | None:
        return len(self.class_N)

    def batch(
        self, step: int, first: int, count: int, global_batch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        index_B = sequence_indices(step, first, count, global_batch, len(self.class_N), self.seed)
        return self.value_NW[index_B], self.class_N[index_B]

    def samples(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        assert 0 <= first <= first + count <= len(self.class_N), (
            f"samples {first}+{count} of {len(self.class_N)}"
        )
        return self.value_NW[first : first + count], self.class_N[first : first + count]


@dataclass(frozen=True)
class TableSplits:
    """The training and the held-out split of a table."""

    train: SampleDataset
    held_out: SampleDataset
    widths: dict[str, int]
    """Width of each chosen stream, in the order of their columns."""
    domains: tuple[str, ...]
    """Names of the classes: an evaluation reports each class as a domain."""
    fingerprint: str
    """SHA-256 (hex) of the samples, the chosen streams and the hold-out."""
    summary: str

    @property
    def classes(self) -> int:
        return len(self.domains)

    def describe(self) -> str:
        """Return one line: source, streams, samples, fingerprint (12 digits)."""
        return f"{self.summary}; fingerprint {self.fingerprint[:12]}"


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
    raw_NW, class_N, streams = _read(config.source)
    kept_N = _unique_indices(raw_NW)
    removed = len(raw_NW) - len(kept_N)
    raw_NW, class_N = raw_NW[kept_N], class_N[kept_N].astype(np.int64)
    train_N = _train_mask(raw_NW, config.holdout)
    value_NW = np.concatenate(
        [_standardize(streams, name, kept_N, train_N) for name in widths], 1
    ).astype(np.float32)
    train, held_out = (
        TableDataset(value_NW[side], class_N[side], seed) for side in (train_N, ~train_N)
    )
    content = _bytes(raw_NW), _bytes(class_N.astype(np.float64))
    fingerprint = _sha256(config.source, list(widths), config.holdout, *content)
    duplicates = f"; {removed} exact duplicates removed" if removed else ""
    summary = (
        f"{_describe_source(config.source, widths, names)}; {train_N.sum():,} training and "
        f"{(~train_N).sum():,} held-out samples{duplicates}"
    )
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
        train, held_out, widths, names, _sha256(config.source, list(widths), seed), summary
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


def _unique_indices(raw_NW: np.ndarray) -> np.ndarray:
    """Return the index of the first occurrence of each distinct row: int64."""
    first: dict[bytes, int] = {}
    for index, row in enumerate(raw_NW):
        first.setdefault(_bytes(row), index)
    return np.array(list(first.values()), dtype=np.int64)


def _train_mask(raw_NW: np.ndarray, holdout: float) -> np.ndarray:
    """Return True for training samples, False for held-out ones: bool [N]."""
    train_N = np.array([holdout_hash(_bytes(row)) >= holdout for row in raw_NW])
    if train_N.all() or not train_N.any():
        side = "no" if train_N.all() else "every"
        allowed = (
            "must leave samples to both sides, "
            f"but by its hash {side} one of {len(train_N)} is held out"
        )
        raise ConfigError("data.holdout", holdout, allowed, "set data.holdout=0.2")
    return train_N


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


def _bytes(value: np.ndarray) -> bytes:
    """Return little-endian float64 bytes, the same on every machine."""
    content: bytes = value.astype("<f8").tobytes()
    return content


def _sha256(*parts: object) -> str:
    encoded = (part if isinstance(part, bytes) else str(part).encode() for part in parts)
    return hashlib.sha256(b"\0".join([b"dmoe table 1", *encoded])).hexdigest()


SIDE, QUADRANT, BINS = 8, 4, 5
"""Pixels per side of an image and of a quadrant; bins per histogram."""


def pixels(image_NHW: np.ndarray) -> np.ndarray:
    """Return the pixels of images [N, 8, 8]: float64 [N, 64]."""
    return image_NHW.reshape(len(image_NHW), SIDE * SIDE) / 16.0


def profiles(image_NHW: np.ndarray) -> np.ndarray:
    """Return the mean pixel of each row and column: float64 [N, 16]."""
    return np.concatenate([image_NHW.sum(2), image_NHW.sum(1)], 1) / (16.0 * SIDE)


def strokes(image_NHW: np.ndarray) -> np.ndarray:
    """Return histograms of gradient directions by quadrant: float64 [N, 20]."""
    padded_NHW = np.pad(image_NHW.astype(np.int64), ((0, 0), (1, 1), (1, 1)))
    gx_NHW = padded_NHW[:, 1:-1, 2:] - padded_NHW[:, 1:-1, :-2]
    gy_NHW = padded_NHW[:, 2:, 1:-1] - padded_NHW[:, :-2, 1:-1]
    magnitude_NHW = abs(gx_NHW) + abs(gy_NHW)
    bin_NHW = _direction(gx_NHW, gy_NHW)
    histogram = [np.where(bin_NHW == b, magnitude_NHW, 0) / 64.0 for b in range(BINS - 1)]
    histogram.append((magnitude_NHW == 0) / 16.0)
    histogram_NHWB = np.stack(histogram, -1)
    parts = SIDE // QUADRANT
    sum_NQQB = histogram_NHWB.reshape(-1, parts, QUADRANT, parts, QUADRANT, BINS).sum((2, 4))
    return np.asarray(sum_NQQB.reshape(-1, parts * parts * BINS))


def _direction(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return floor(angle / 45 degrees) of integer vectors, 0 to 3; opposite vectors are equal.

    Without arctan2, which rounds.
    """
    opposite = (y < 0) | ((y == 0) & (x < 0))
    x, y = np.where(opposite, -x, x), np.where(opposite, -y, y)
    upper = x <= 0
    x, y = np.where(upper, y, x), np.where(upper, -x, y)
    return np.asarray(2 * upper + (y >= x))


DIGIT_FEATURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "pixels": pixels,
    "profiles": profiles,
    "strokes": strokes,
}
"""Streams of sklearn:digits by name: functions of its images [N, 8, 8]."""
