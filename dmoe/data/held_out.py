"""The order in which held-out sequences are evaluated: one of each domain in turn.

Text comes domain by domain, so the first N sequences as they are stored would often be of one domain alone. Here sequence k of each
domain comes before sequence k + 1 of any; a domain that has run out is passed over. So the first N sequences hold equally many of
each domain as far as each has so many, and N = D reaches all D. The order depends on the text alone: not on the seed, nor on ranks.

Each domain is cut into sequences by itself, so that a figure by domain is of that domain alone (a training sequence may run over into
the next domain). What a domain has left at its end, under seq_len tokens, is not evaluated. For one domain this is the text's order.

Letters: N sequences, U runs of one domain, B sequences asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.order import sequence_indices
from dmoe.data.packing import PackedStream, Runs


def interleaved(runs: Runs, tokens: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(begin, label): where in a stream of `tokens` tokens each sequence begins, and its domain, in the order above: int64 [N] each."""
    begins, labels = [], []
    for (begin, label), (end, _) in pairwise((*runs, (tokens - 1, -1))):
        # The token at `end` is the separator that closes the run: the last sequence's last target.
        begins.append(np.arange(begin, end - seq_len + 1, seq_len, dtype=np.int64))
        labels.append(np.full(len(begins[-1]), label, dtype=np.int64))
    begin_N, label_N = np.concatenate(begins), np.concatenate(labels)
    turn_N = np.empty_like(label_N)
    for label in np.unique(label_N):
        turn_N[label_N == label] = np.arange((label_N == label).sum())
    order_N = np.lexsort((label_N, turn_N))
    return begin_N[order_N], label_N[order_N]


@dataclass(frozen=True, eq=False)
class HeldOutStream:
    """The sequences of a held-out text, interleaved. Memory: 16 bytes a sequence."""

    text: PackedStream
    begin_N: np.ndarray = field(init=False)
    label_N: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        begin_N, label_N = interleaved(self.text.runs, self.text.tokens, self.text.seq_len)
        if not len(begin_N):
            raise ConfigError(
                "data.seq_len", self.seq_len, f"must be less than the tokens of some domain of the {self.text.split} split",
                "use a smaller one, or more text",
            )  # fmt: skip
        object.__setattr__(self, "begin_N", begin_N)
        object.__setattr__(self, "label_N", label_N)

    @property
    def sequences(self) -> int:
        """Sequences of all domains."""
        return len(self.begin_N)

    @property
    def seq_len(self) -> int:
        """Targets of one sequence."""
        return self.text.seq_len

    def rows(self, first: int, count: int) -> np.ndarray:
        """Sequences first .. first + count - 1 of the order above: int64 [count, seq_len + 1]."""
        return self.text.windows(self.begin_N[self._slice(first, count)])

    def row_labels(self, first: int, count: int) -> np.ndarray:
        """The domain of each: int64 [count]."""
        return np.asarray(self.label_N[self._slice(first, count)])

    def batch(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """As for training, shuffled: int64 [count, seq_len + 1]."""
        return self.text.windows(self.begin_N[self._indices(step, first, count, global_batch)])

    def labels(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """The domain of each sequence of `batch`: int64 [count]."""
        return np.asarray(self.label_N[self._indices(step, first, count, global_batch)])

    def _indices(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        return sequence_indices(step, first, count, global_batch, self.sequences, self.text.seed)

    def _slice(self, first: int, count: int) -> slice:
        assert 0 <= first <= first + count <= self.sequences, (
            f"rows {first}+{count} of {self.sequences}"
        )
        return slice(first, first + count)
