"""The order in which held-out sequences are evaluated: the domains alternate.

Letters: N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.order import sequence_indices
from dmoe.data.packing import DomainRuns, PackedDataset
from dmoe.data.sequences.token_masks import TokenMasks


def interleave_domains(
    runs: DomainRuns, num_tokens: int, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (start, label) of each sequence in evaluation order: int64 [N] each.

    Sequence k of every domain comes before sequence k + 1 of any domain. `start` is a position in
    the token stream of `num_tokens` tokens.
    """
    starts, labels = [], []
    for (start, label), (end, _) in pairwise((*runs, (num_tokens - 1, -1))):
        # The token at `end` is the separator that closes the run: the last sequence's last target.
        starts.append(np.arange(start, end - seq_len + 1, seq_len, dtype=np.int64))
        labels.append(np.full(len(starts[-1]), label, dtype=np.int64))
    start_N, label_N = np.concatenate(starts), np.concatenate(labels)
    rank_in_domain_N = np.empty_like(label_N)
    for label in np.unique(label_N):
        rank_in_domain_N[label_N == label] = np.arange((label_N == label).sum())
    order_N = np.lexsort((label_N, rank_in_domain_N))
    return start_N[order_N], label_N[order_N]


@dataclass(frozen=True, eq=False)
class HeldOutDataset:
    """Held-out sequences in evaluation order: the domains alternate.

    A corpus is ordered by domain, so its first N stored sequences are often of one domain. Here the
    first N hold equally many of each domain (until one has no more), and N = number of domains
    reaches all of them. The order depends on the text alone, not on the seed or the ranks.

    Each domain is cut into sequences separately, so a metric of a domain contains no other text.
    The tail of a domain (less than seq_len tokens) is not evaluated. With one domain, the order is
    the stored one. Memory: 16 bytes per sequence. Methods and their arguments are those of
    `TokenDataset`.
    """

    packed: PackedDataset
    start_N: np.ndarray = field(init=False)
    label_N: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        packed = self.packed
        start_N, label_N = interleave_domains(packed.runs, packed.num_tokens, packed.seq_len)
        if not len(start_N):
            raise ConfigError(
                "data.seq_len",
                self.seq_len,
                f"must be less than the tokens of some domain of the {packed.split} split",
                "use a smaller one, or more text",
            )
        object.__setattr__(self, "start_N", start_N)
        object.__setattr__(self, "label_N", label_N)

    @property
    def num_sequences(self) -> int:
        """Sequences of all domains."""
        return len(self.start_N)

    @property
    def seq_len(self) -> int:
        """Targets per sequence."""
        return self.packed.seq_len

    def samples(self, first: int, count: int) -> np.ndarray:
        """Return consecutive sequences in evaluation order: int64 [count, seq_len + 1]."""
        return self.packed.read_sequences(self.start_N[self._slice(first, count)])

    def sample_labels(self, first: int, count: int) -> np.ndarray:
        """Return the label of each sequence of `samples`: int64 [count]."""
        return np.asarray(self.label_N[self._slice(first, count)])

    def batch(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Return samples of one step in shuffled order: int64 [count, seq_len + 1]."""
        index_B = self._shuffled_indices(step, first, count, global_batch)
        return self.packed.read_sequences(self.start_N[index_B])

    def labels(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Return the label of each sample of `batch`: int64 [count]."""
        return np.asarray(self.label_N[self._shuffled_indices(step, first, count, global_batch)])

    def masks(self, step: int, first: int, count: int, global_batch: int) -> TokenMasks:
        """Return positions and masks of the samples of `batch`."""
        index_B = self._shuffled_indices(step, first, count, global_batch)
        return self.packed.read_masks(self.start_N[index_B])

    def sample_masks(self, first: int, count: int) -> TokenMasks:
        """Return positions and masks of the sequences of `samples`."""
        return self.packed.read_masks(self.start_N[self._slice(first, count)])

    def _shuffled_indices(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        seed = self.packed.seed
        return sequence_indices(step, first, count, global_batch, self.num_sequences, seed)

    def _slice(self, first: int, count: int) -> slice:
        assert 0 <= first <= first + count <= self.num_sequences, (
            f"samples {first}+{count} of {self.num_sequences}"
        )
        return slice(first, first + count)
