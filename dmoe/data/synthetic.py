"""Endless streams whose best possible loss is known, for measuring: `synthetic:uniform`, `synthetic:zipf`, `synthetic:copy`.

Sequence n is a function of (seed, split, n) alone. Tokens are 1 .. 255 of the byte vocabulary (0, the separator, is never
drawn), so a token is a byte and bits per byte are bits per token:
- uniform: every token equally likely; the best loss is ln 255 nats.
- zipf: token t with probability proportional to 1/t, the law of word frequencies; the best loss is the entropy, 4.31 nats.
- copy: the second half repeats the first (uniform) half; the best loss is ln 255 on the first half and 0 on the second.

`synthetic:clusters`: endless labelled samples around fixed centres, of three streams, for tests and measurements.

    class c of sample n, uniform over the classes;      x_n = SPREAD * centre_c + noise_n

Centres and noise are sums of twelve uniform numbers minus six (Irwin and Hall), near enough to N(0, 1), and a function of (seed, split,
n) alone: of whole numbers, so they are the same bits on every machine. Clusters overlap: with the parts of all streams a class
is told better than with one alone.

Letters: B samples, W width of all chosen streams.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.order import counter_hash, global_sample_indices

KINDS = ("uniform", "zipf", "copy")
_TOKENS = 255
_SPLIT = {"train": 0, "held_out": 1}


def zipf_probability() -> np.ndarray:
    """Probability of tokens 1 .. 255 in synthetic:zipf: float64 [255]."""
    weight = 1.0 / np.arange(1, _TOKENS + 1)
    return np.asarray(weight / weight.sum())


@dataclass(frozen=True)
class SyntheticDataset:
    """An endless stream of one kind; `split` is train or held_out, which share no sequence."""

    kind: str
    seq_len: int
    seed: int
    split: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            allowed = "must be one of " + ", ".join(f"synthetic:{kind}" for kind in KINDS)
            raise ConfigError("data.source", f"synthetic:{self.kind}", allowed, "name one of these")
        assert self.seq_len >= 1

    @property
    def num_sequences(self) -> int | None:
        """None: there is no end."""
        return None

    def batch(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Samples first .. first + count - 1 of a step: int64 [count, seq_len + 1]."""
        return self._draw(global_sample_indices(step, first, count, global_batch))

    def samples(self, first: int, count: int) -> np.ndarray:
        """Sequences first .. first + count - 1: int64 [count, seq_len + 1]."""
        assert min(first, count) >= 0, f"rows {first}+{count}"
        return self._draw(np.arange(first, first + count, dtype=np.int64))

    def labels(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """int64 [count]: one domain, 0."""
        return np.zeros(count, dtype=np.int64)

    def sample_labels(self, first: int, count: int) -> np.ndarray:
        """int64 [count]: one domain, 0."""
        return np.zeros(count, dtype=np.int64)

    def _draw(self, number_B: np.ndarray) -> np.ndarray:
        position_S = np.arange(self.seq_len + 1)
        if self.kind == "copy":
            position_S = position_S % ((self.seq_len + 2) // 2)
        word_BS = counter_hash(
            self.seed, _SPLIT[self.split], number_B[:, None], position_S[None, :]
        )
        # The upper 53 bits are a float64 in [0, 1) with nothing rounded.
        uniform_BS = (word_BS >> np.uint64(11)).astype(np.float64) / 2**53
        if self.kind == "zipf":
            upper = np.cumsum(zipf_probability())[:-1]
            return 1 + np.searchsorted(upper, uniform_BS, side="right").astype(np.int64)
        return 1 + np.floor(uniform_BS * _TOKENS).astype(np.int64)


SPREAD = 0.6
_CLUSTER_SPLIT = {"train": 0, "held_out": 1}
_CENTRE, _CLASS, _NOISE = 0, 1, 2


@dataclass(frozen=True)
class ClusterDataset:
    """An endless stream; train and held_out share their centres and no sample. `columns`: which numbers of a sample are wanted."""

    columns: tuple[int, ...]
    classes: int
    seed: int
    split: str

    @property
    def num_sequences(self) -> int | None:
        """None: there is no end."""
        return None

    def batch(
        self, step: int, first: int, count: int, global_batch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples first .. first + count - 1 of a step: float32 [count, W], int64 [count]."""
        return self._draw(global_sample_indices(step, first, count, global_batch))

    def samples(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples first .. first + count - 1: float32 [count, W], int64 [count]."""
        assert min(first, count) >= 0, f"rows {first}+{count}"
        return self._draw(np.arange(first, first + count, dtype=np.int64))

    def _draw(self, number_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        column_W, split = np.array(self.columns, dtype=np.int64), _CLUSTER_SPLIT[self.split]
        centre_CW = _normal(self.seed, _CENTRE, np.arange(self.classes)[:, None], column_W)
        class_B = (
            counter_hash(self.seed, _CLASS, split, number_B) % np.uint64(self.classes)
        ).astype(np.int64)
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
