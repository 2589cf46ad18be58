"""Synthetic datasets: endless, and a function of (seed, split, index) alone.

Text, whose best possible loss is known: `synthetic:uniform`, `synthetic:zipf`, `synthetic:copy`.
Tokens are 1 .. 255 of the byte vocabulary (0, the separator, is never drawn), so a token is a byte,
and bits per byte are bits per token.

- uniform: all tokens equally likely; the best loss is ln 255 nats.
- zipf: token t with probability proportional to 1/t (Zipf's law); the best loss is the entropy,
  4.31 nats.
- copy: the second half repeats the (uniform) first half; the best loss is ln 255 in the first half
  and 0 in the second.

With `data.document_mask=true` a sequence is cut into documents of random lengths, a mean of
DOCUMENT_LENGTH tokens, which do not see each other. With `data.format=instruct` half of the tokens
at random are answers, and a sequence may end in padding.

Labelled samples: `synthetic:clusters`, three streams per sample, Gaussian clusters:

    x_n = SPREAD * centre_c + noise_n        class c of sample n is uniform over the classes

Centres and noise are sums of twelve uniform numbers minus six (Irwin-Hall), close to N(0, 1). They
are computed from integers, so they have the same bits on every machine. The clusters overlap:
all streams together predict the class better than one.

Letters: B samples, S tokens per sequence, C classes, W width of all chosen streams.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.order import counter_hash, global_sample_indices
from dmoe.data.sequences.token_masks import NO_MASKS, TokenMasks, positions_after

KINDS = ("uniform", "zipf", "copy")
_NUM_TOKENS = 255
_SPLIT_KEY = {"train": 0, "held_out": 1}
_DOCUMENT, _PADDING = 1, 2
"""Counters that separate the draws of documents and of padding from those of tokens."""
DOCUMENT_LENGTH = 8


def zipf_probability() -> np.ndarray:
    """Return the probabilities of tokens 1 .. 255 in synthetic:zipf: float64 [255]."""
    weight = 1.0 / np.arange(1, _NUM_TOKENS + 1)
    return np.asarray(weight / weight.sum())


@dataclass(frozen=True)
class SyntheticDataset:
    """Endless sequences of one kind; `split` is train or held_out, which share no sequence.

    Methods and their arguments are those of `TokenDataset`.
    """

    kind: str
    seq_len: int
    seed: int
    split: str
    document_mask: bool = False
    instruct: bool = False
    """Predict some of the tokens only, and let sequences end in padding."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            allowed = "must be one of " + ", ".join(f"synthetic:{kind}" for kind in KINDS)
            raise ConfigError("data.source", f"synthetic:{self.kind}", allowed, "name one of these")
        assert self.seq_len >= 1

    @property
    def num_sequences(self) -> int | None:
        """None: the dataset is endless."""
        return None

    def batch(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Return consecutive samples of one step: int64 [count, seq_len + 1]."""
        return self._draw(global_sample_indices(step, first, count, global_batch))

    def samples(self, first: int, count: int) -> np.ndarray:
        """Return sequences first .. first + count - 1: int64 [count, seq_len + 1]."""
        assert min(first, count) >= 0, f"samples {first}+{count}"
        return self._draw(np.arange(first, first + count, dtype=np.int64))

    def labels(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Return the label of each sample, always 0: int64 [count]."""
        return np.zeros(count, dtype=np.int64)

    def sample_labels(self, first: int, count: int) -> np.ndarray:
        """Return the label of each sample, always 0: int64 [count]."""
        return np.zeros(count, dtype=np.int64)

    def masks(self, step: int, first: int, count: int, global_batch: int) -> TokenMasks:
        """Return positions of the samples of `batch`."""
        return self._masks(global_sample_indices(step, first, count, global_batch))

    def sample_masks(self, first: int, count: int) -> TokenMasks:
        """Return positions of the sequences of `samples`."""
        return self._masks(np.arange(first, first + count, dtype=np.int64))

    def _masks(self, index_B: np.ndarray) -> TokenMasks:
        if not (self.document_mask or self.instruct):
            return NO_MASKS
        place_S, split = np.arange(self.seq_len + 1), _SPLIT_KEY[self.split]
        word_BS = counter_hash(self.seed, split, index_B[:, None], place_S, _DOCUMENT)
        starts_BS = word_BS % np.uint64(DOCUMENT_LENGTH) == 0
        positions = positions_after(starts_BS[:, :-1]) if self.document_mask else None
        if not self.instruct:
            return TokenMasks(positions)
        # The first token of the padding is at 1 at least, so each sequence has a real token.
        end_B1 = 1 + counter_hash(self.seed, split, index_B, _PADDING)[:, None] % np.uint64(
            2 * self.seq_len
        )
        valid_BS = place_S < end_B1.astype(np.int64)
        answer_BS = (word_BS % np.uint64(2) == 0) & ~starts_BS & valid_BS
        return TokenMasks(positions, answer_BS[:, 1:], valid_BS[:, :-1])

    def _draw(self, index_B: np.ndarray) -> np.ndarray:
        position_S = np.arange(self.seq_len + 1)
        if self.kind == "copy":
            position_S = position_S % ((self.seq_len + 2) // 2)
        word_BS = counter_hash(
            self.seed, _SPLIT_KEY[self.split], index_B[:, None], position_S[None, :]
        )
        # The upper 53 bits give a float64 in [0, 1) without rounding.
        uniform_BS = (word_BS >> np.uint64(11)).astype(np.float64) / 2**53
        if self.kind == "zipf":
            cumulative = np.cumsum(zipf_probability())[:-1]
            return 1 + np.searchsorted(cumulative, uniform_BS, side="right").astype(np.int64)
        return 1 + np.floor(uniform_BS * _NUM_TOKENS).astype(np.int64)


SPREAD = 0.6
_CENTRE, _CLASS, _NOISE = 0, 1, 2
"""Counters that separate the random numbers of a cluster dataset by purpose."""


@dataclass(frozen=True)
class ClusterDataset:
    """Endless labelled samples; train and held_out share the cluster centres and no sample.

    Methods and their arguments are those of `SampleDataset`.
    """

    columns: tuple[int, ...]
    """Columns of a full sample that are returned."""
    classes: int
    seed: int
    split: str

    @property
    def num_sequences(self) -> int | None:
        """None: the dataset is endless."""
        return None

    def batch(
        self, step: int, first: int, count: int, global_batch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (features, classes) of one step: float32 [count, W], int64 [count]."""
        return self._draw(global_sample_indices(step, first, count, global_batch))

    def samples(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (features, classes) of consecutive samples: float32 [count, W], int64 [count]."""
        assert min(first, count) >= 0, f"samples {first}+{count}"
        return self._draw(np.arange(first, first + count, dtype=np.int64))

    def _draw(self, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        column_W, split = np.array(self.columns, dtype=np.int64), _SPLIT_KEY[self.split]
        centre_CW = _normal(self.seed, _CENTRE, np.arange(self.classes)[:, None], column_W)
        class_B = (
            counter_hash(self.seed, _CLASS, split, index_B) % np.uint64(self.classes)
        ).astype(np.int64)
        noise_BW = _normal(self.seed, _NOISE, split, index_B[:, None], column_W)
        return (SPREAD * centre_CW[class_B] + noise_BW).astype(np.float32), class_B


def _normal(seed: int, *counters: np.ndarray | int) -> np.ndarray:
    """Draw approximately N(0, 1), of the counters' broadcast shape.

    Each value is a sum of twelve uniform numbers of 16 bits, from three 64-bit words.
    """
    total: np.ndarray | int = 0
    for word in range(3):
        bits = counter_hash(seed, *counters, word)
        for quarter in range(4):
            total = total + ((bits >> np.uint64(16 * quarter)) & np.uint64(0xFFFF)).astype(np.int64)
    return np.asarray((total - 6 * 0xFFFF) / 2.0**16)
