"""`synthetic:clusters`: endless labelled samples around fixed centres, of three streams, for tests and measurements.

    class c of sample n, uniform over the classes;      x_n = SPREAD * centre_c + noise_n

Centres and noise are sums of twelve uniform numbers minus six (Irwin and Hall), near enough to N(0, 1), and a function of (seed, split,
n) alone: of whole numbers, so they are the same bits on every machine. Clusters overlap: with the parts of all streams a class
is told better than with one alone.

Letters: B samples, W width of all chosen streams.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dmoe.data.counter import counter_hash
from dmoe.data.order import sample_numbers

__all__ = ["ClusterStream"]

SPREAD = 0.6
_SPLIT = {"train": 0, "held_out": 1}
_CENTRE, _CLASS, _NOISE = 0, 1, 2


@dataclass(frozen=True)
class ClusterStream:
    """An endless stream; train and held_out share their centres and no sample. `columns`: which numbers of a sample are wanted."""

    columns: tuple[int, ...]
    classes: int
    seed: int
    split: str

    @property
    def sequences(self) -> int | None:
        """None: there is no end."""
        return None

    def batch(self, step: int, first: int, count: int, global_batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples first .. first + count - 1 of a step: float32 [count, W], int64 [count]."""
        return self._draw(sample_numbers(step, first, count, global_batch))

    def rows(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples first .. first + count - 1: float32 [count, W], int64 [count]."""
        assert min(first, count) >= 0, f"rows {first}+{count}"
        return self._draw(np.arange(first, first + count, dtype=np.int64))

    def _draw(self, number_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        column_W, split = np.array(self.columns, dtype=np.int64), _SPLIT[self.split]
        centre_CW = _normal(self.seed, _CENTRE, np.arange(self.classes)[:, None], column_W)
        class_B = (counter_hash(self.seed, _CLASS, split, number_B) % np.uint64(self.classes)).astype(np.int64)
        noise_BW = _normal(self.seed, _NOISE, split, number_B[:, None], column_W)
        return (SPREAD * centre_CW[class_B] + noise_BW).astype(np.float32), class_B


def _normal(seed: int, *counters: np.ndarray | int) -> np.ndarray:
    """About N(0, 1), of a broadcast shape: twelve uniform numbers of 16 bits each, from three words."""
    total: np.ndarray | int = 0
    for word in range(3):
        bits = counter_hash(seed, *counters, word)
        for quarter in range(4):
            total = total + ((bits >> np.uint64(16 * quarter)) & np.uint64(0xFFFF)).astype(np.int64)
    return np.asarray((total - 6 * 0xFFFF) / 2.0**16)
