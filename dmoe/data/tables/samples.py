"""One split of a table, in memory; which samples are equal, which are held out; their scale.

A sample is held out by a hash of its values, never by its position.

Letters: N samples of a split, B samples of a batch, W width of all chosen streams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.order import sequence_indices
from dmoe.data.splits import holdout_hash


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


def unique_indices(raw_NW: np.ndarray) -> np.ndarray:
    """Return the index of the first occurrence of each distinct row: int64."""
    first: dict[bytes, int] = {}
    for index, row in enumerate(raw_NW):
        first.setdefault(row_bytes(row), index)
    return np.array(list(first.values()), dtype=np.int64)


def train_mask(raw_NW: np.ndarray, holdout: float) -> np.ndarray:
    """Return True for training samples, False for held-out ones: bool [N]."""
    train_N = np.array([holdout_hash(row_bytes(row)) >= holdout for row in raw_NW])
    if train_N.all() or not train_N.any():
        side = "no" if train_N.all() else "every"
        allowed = (
            "must leave samples to both sides, "
            f"but by its hash {side} one of {len(train_N)} is held out"
        )
        raise ConfigError("data.holdout", holdout, allowed, "set data.holdout=0.2")
    return train_N


def standardized(
    train_NW: np.ndarray, held_NW: np.ndarray, columns: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return (x - mean) / deviation of both splits, with both from the training samples.

    A column with one value in all training samples becomes 0 there. Its computed deviation need not
    be 0 (1000 times 0.1 has one of 1e-17, and would become 1), so the values are compared.

    Args:
        train_NW: float64, finite, at least one sample.
        held_NW: float64, finite.
        columns: names, for the error.

    Returns:
        float32 [N, W] of the training and of the held-out samples.

    Raises:
        ConfigError: on data.columns: a column whose numbers are too large or too close together for
            their deviation to be computed in float64, or the result in float32.
    """
    low_W = train_NW.min(0)
    is_constant_W = low_W == train_NW.max(0)
    with np.errstate(over="ignore", invalid="ignore"):
        mean_W = np.where(is_constant_W, low_W, train_NW.mean(0))
        deviation_W = np.where(is_constant_W, 1.0, train_NW.std(0))
        is_wrong_W = ~np.isfinite(mean_W) | ~np.isfinite(deviation_W) | (deviation_W == 0)
        deviation_W[is_wrong_W] = 1.0
        train, held_out = (
            ((value_NW - mean_W) / deviation_W).astype(np.float32)
            for value_NW in (train_NW, held_NW)
        )
    for value_NW in (train, held_out):
        is_wrong_W |= ~np.isfinite(value_NW).all(0)
    if is_wrong_W.any():
        wrong = int(np.flatnonzero(is_wrong_W)[0])
        largest = max(float(np.abs(part_NW[:, wrong]).max()) for part_NW in (train_NW, held_NW))
        raise ConfigError(
            "data.columns",
            columns[wrong],
            f"cannot be standardized: its largest number is {largest:g}, and the deviation in "
            "training is too large or too small for floating-point numbers",
            "write it in another unit, or leave it out",
        )
    return train, held_out


def summarize(source: str, train: TableDataset, held_out: TableDataset, notes: list[str]) -> str:
    counts = f"{len(train.class_N):,} training and {len(held_out.class_N):,} held-out samples"
    return "; ".join([source, counts, *notes])


def row_bytes(value: np.ndarray) -> bytes:
    """Return little-endian float64 bytes, the same on every machine."""
    content: bytes = value.astype("<f8").tobytes()
    return content


def table_hash(*parts: object) -> str:
    encoded = (part if isinstance(part, bytes) else str(part).encode() for part in parts)
    return hashlib.sha256(b"\0".join([b"dmoe table 1", *encoded])).hexdigest()
