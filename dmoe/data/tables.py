"""Tables of labelled samples in streams of their own width: what `train.task=classification` reads.

A sample is held out by a hash of its numbers, never by its place, and exact duplicates are removed first, as with documents
(corpus.py). Its streams stand side by side in the order of `data.streams`. Order of training: order.py.

Letters: N samples of a split, B of a batch, W width of all chosen streams.

Hand-made features of the digits of scikit-learn (8 x 8 pixels, whole numbers from 0 to 16): fixed formulas, nothing learned.

pixels   [64]  the pixels, row by row, over 16.
profiles [16]  the mean pixel of each row, then of each column, over 16.
strokes  [20]  for each quadrant of 4 x 4 pixels (top left, top right, bottom left, bottom right) a histogram of gradient directions,
               after Dalal and Triggs 2005. With gx = right - left neighbour and gy = lower - upper neighbour, 0 outside the image, and
               a direction and its opposite being the same, bin b = 0..3 sums |gx| + |gy| over the quadrant's pixels whose gradient
               points between b * 45 degrees and (b + 1) * 45, over 64; the fifth bin counts those without a gradient, over 16.

Every sum is one of whole numbers and every divisor a power of two, so the features are the same bits on every machine.

Letters: N samples, H height, W width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dmoe.config.datasets import selected_streams, table_spec
from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data.corpus import holdout_hash
from dmoe.data.order import sequence_indices
from dmoe.data.synthetic import ClusterDataset


class SampleDataset(Protocol):
    """One split of a table."""

    @property
    def num_sequences(self) -> int | None:
        """How many samples there are; None if the stream is endless."""

    def batch(
        self, step: int, first: int, count: int, global_batch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples first .. first + count - 1 of a step, in the shuffled order, epoch after epoch: float32 [count, W], int64 [count].

        A function of its arguments and the seed alone: ranks ask for disjoint ranges of the same global batch.
        """

    def samples(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples first .. first + count - 1 as stored, for evaluation: float32 [count, W], int64 [count]. Never wraps."""


@dataclass(frozen=True)
class TableDataset:
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
            f"rows {first}+{count} of {len(self.class_N)}"
        )
        return self.value_NW[first : first + count], self.class_N[first : first + count]


@dataclass(frozen=True)
class TableSplits:
    """Both splits, and a SHA-256 (hex) over the samples, the chosen streams and the hold-out."""

    train: SampleDataset
    held_out: SampleDataset
    widths: dict[str, int]
    """Of the chosen streams, in the order in which they stand side by side."""
    domains: tuple[str, ...]
    """Names of the classes."""
    fingerprint: str
    summary: str

    @property
    def classes(self) -> int:
        return len(self.domains)

    def describe(self) -> str:
        """One line: where the samples are from, how many, their streams, the fingerprint's first 12 digits."""
        return f"{self.summary}; fingerprint {self.fingerprint[:12]}"


def stream_widths(config: DataConfig) -> dict[str, int]:
    """The width of each chosen stream, without reading data. Raises ConfigError on data.source and data.streams."""
    return selected_streams(config)


def num_classes(config: DataConfig) -> int:
    """The number of classes, without reading data. Raises ConfigError on data.source."""
    return len(table_spec(config).classes)


def open_table(config: DataConfig, seed: int) -> TableSplits:
    """Read the table that `data.source` names. `seed` decides the order of training samples (and what synthetic ones are).

    Raises ConfigError on the field of data.* that cannot work; for sklearn:NAME also where scikit-learn is not installed.
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
    fingerprint = _sha256(
        config.source,
        list(widths),
        config.holdout,
        _bytes(raw_NW),
        _bytes(class_N.astype(np.float64)),
    )
    duplicates = f"; {removed} exact duplicates removed" if removed else ""
    summary = f"{_describe_source(config.source, widths, names)}; {train_N.sum():,} training and {(~train_N).sum():,} held-out samples{duplicates}"
    return TableSplits(train, held_out, widths, names, fingerprint, summary)


def _open_clusters(
    config: DataConfig, seed: int, widths: dict[str, int], names: tuple[str, ...]
) -> TableSplits:
    there = [name for name, width in table_spec(config).streams.items() for _ in range(width)]
    columns = tuple(
        column for name in widths for column, owner in enumerate(there) if owner == name
    )
    train, held_out = (
        ClusterDataset(columns, len(names), seed, split) for split in ("train", "held_out")
    )
    summary = f"{_describe_source(config.source, widths, names)}, endless"
    return TableSplits(
        train, held_out, widths, names, _sha256(config.source, list(widths), seed), summary
    )


def _read(source: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Numbers as they are [N, X], which say what is a duplicate and who is held out; classes [N]; and each stream [N, its width]."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ConfigError(
            "data.source",
            source,
            "needs scikit-learn, which is not installed",
            "pip install scikit-learn",
        ) from error
    found = getattr(datasets, f"load_{source.removeprefix('sklearn:')}")()
    raw_NW = np.asarray(found.data, dtype=np.float64)
    if source == "sklearn:digits":
        streams = {name: feature(found.images) for name, feature in DIGIT_FEATURES.items()}
    else:
        streams = {"features": raw_NW}
    return raw_NW, found.target, streams


def _unique_indices(raw_NW: np.ndarray) -> np.ndarray:
    """int64: the places of the first of each content."""
    first: dict[bytes, int] = {}
    for place, row in enumerate(raw_NW):
        first.setdefault(_bytes(row), place)
    return np.array(list(first.values()), dtype=np.int64)


def _train_mask(raw_NW: np.ndarray, holdout: float) -> np.ndarray:
    """bool [N]: which samples are not held out."""
    train_N = np.array([holdout_hash(_bytes(row)) >= holdout for row in raw_NW])
    if train_N.all() or not train_N.any():
        side = "no" if train_N.all() else "every"
        allowed = f"must leave samples to both sides, but by its hash {side} one of {len(train_N)} is held out"
        raise ConfigError("data.holdout", holdout, allowed, "set data.holdout=0.2")
    return train_N


def _standardize(
    streams: dict[str, np.ndarray], name: str, kept_N: np.ndarray, train_N: np.ndarray
) -> np.ndarray:
    """The stream, `features` with the mean and the deviation of the training split taken out; the others have a scale of their own."""
    value_NW: np.ndarray = streams[name][kept_N]
    if name != "features":
        return value_NW
    mean_W, deviation_W = value_NW[train_N].mean(0), value_NW[train_N].std(0)
    return np.asarray((value_NW - mean_W) / deviation_W)


def _describe_source(source: str, widths: dict[str, int], names: tuple[str, ...]) -> str:
    streams = " + ".join(f"{name} ({width})" for name, width in widths.items())
    return f"{source}: {streams}, {len(names)} classes"


def _bytes(value: np.ndarray) -> bytes:
    """The same on every machine, whatever its byte order."""
    content: bytes = value.astype("<f8").tobytes()
    return content


def _sha256(*parts: object) -> str:
    whole: Iterable[bytes] = (
        part if isinstance(part, bytes) else str(part).encode() for part in parts
    )
    return hashlib.sha256(b"\0".join([b"dmoe table 1", *whole])).hexdigest()


SIDE, QUADRANT, BINS = 8, 4, 5


def pixels(image_NHW: np.ndarray) -> np.ndarray:
    """float64 [N, 64]."""
    return image_NHW.reshape(len(image_NHW), SIDE * SIDE) / 16.0


def profiles(image_NHW: np.ndarray) -> np.ndarray:
    """float64 [N, 16]."""
    return np.concatenate([image_NHW.sum(2), image_NHW.sum(1)], 1) / (16.0 * SIDE)


def strokes(image_NHW: np.ndarray) -> np.ndarray:
    """float64 [N, 20]."""
    edge_NHW = np.pad(image_NHW.astype(np.int64), ((0, 0), (1, 1), (1, 1)))
    right_NHW = edge_NHW[:, 1:-1, 2:] - edge_NHW[:, 1:-1, :-2]
    down_NHW = edge_NHW[:, 2:, 1:-1] - edge_NHW[:, :-2, 1:-1]
    size_NHW = abs(right_NHW) + abs(down_NHW)
    bin_NHW = _direction(right_NHW, down_NHW)
    histogram = [np.where(bin_NHW == b, size_NHW, 0) / 64.0 for b in range(BINS - 1)]
    histogram.append((size_NHW == 0) / 16.0)
    each_NHWB = np.stack(histogram, -1)
    parts = SIDE // QUADRANT
    quadrant_NABB = each_NHWB.reshape(-1, parts, QUADRANT, parts, QUADRANT, BINS).sum((2, 4))
    return np.asarray(quadrant_NABB.reshape(-1, parts * parts * BINS))


def _direction(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """floor(angle / 45 degrees) of vectors of whole numbers, 0 to 3 after opposite ones are made one. No arctan2: it rounds."""
    turned = (y < 0) | ((y == 0) & (x < 0))
    x, y = np.where(turned, -x, x), np.where(turned, -y, y)
    upper = x <= 0
    x, y = np.where(upper, y, x), np.where(upper, -x, y)
    return np.asarray(2 * upper + (y >= x))


DIGIT_FEATURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "pixels": pixels,
    "profiles": profiles,
    "strokes": strokes,
}
"""Each stream of sklearn:digits, from its images [N, 8, 8]."""
