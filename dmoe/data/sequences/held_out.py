"""The order in which held-out sequences are evaluated: the domains alternate.

Letters: N sequences, U runs of one domain, D domains, S stretches of the order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.order import sequence_indices
from dmoe.data.packing import DomainRuns, PackedDataset
from dmoe.data.sequences.token_masks import TokenMasks


class EvaluationOrder:
    """The place of each sequence in the order of evaluation, by arithmetic.

    Sequence k of every domain comes before sequence k + 1 of any domain. So in a stretch of the
    order in which the same m domains have sequences left, index i is of domain i mod m. Memory: a
    few numbers per run of one domain, none per sequence.
    """

    def __init__(self, runs: DomainRuns, num_tokens: int, seq_len: int) -> None:
        """Order the sequences of a stream of `num_tokens` tokens, cut in each run on its own."""
        start_U, label_U = np.array(runs, dtype=np.int64).reshape(-1, 2).T
        # The token at an end is the separator that closes the run: the last one's last target.
        end_U = np.append(start_U[1:], num_tokens - 1)
        count_U = np.maximum(0, (end_U - start_U) // seq_len)
        by_label_U = np.argsort(label_U, kind="stable")
        self._start_U, count_U = start_U[by_label_U], count_U[by_label_U]
        self.label_D, first_D = np.unique(label_U[by_label_U], return_index=True)
        self._before_U = np.cumsum(count_U) - count_U
        """Sequences of earlier runs, of any domain, in the order of labels."""
        self._before_D = self._before_U[first_D]
        self._count_D = np.add.reduceat(count_U, first_D)
        self._seq_len = seq_len
        # A stretch ends where a domain has no more; `rank` counts the sequences of each before it.
        self._rank_S = np.unique(np.append(0, self._count_D))[:-1]
        active_S = np.array([(self._count_D > rank).sum() for rank in self._rank_S.tolist()])
        length_S = np.diff(np.append(self._rank_S, self._count_D.max())) * active_S
        self._offset_S = np.cumsum(length_S) - length_S
        self.num_sequences = int(self._count_D.sum())
        self.label_D = self.label_D[self._count_D > 0]
        self._before_D = self._before_D[self._count_D > 0]
        self._count_D = self._count_D[self._count_D > 0]

    def sequences_at(self, index_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (start, label) of sequences by their index in the order: int64 [N] each."""
        stretch_N = np.searchsorted(self._offset_S, index_N, side="right") - 1
        domain_N, rank_N = np.empty_like(index_N), np.empty_like(index_N)
        for stretch in np.unique(stretch_N).tolist():
            here_N = stretch_N == stretch
            active = np.flatnonzero(self._count_D > self._rank_S[stretch])
            row_N, turn_N = np.divmod(index_N[here_N] - self._offset_S[stretch], len(active))
            domain_N[here_N], rank_N[here_N] = active[turn_N], self._rank_S[stretch] + row_N
        number_N = self._before_D[domain_N] + rank_N
        run_N = np.searchsorted(self._before_U, number_N, side="right") - 1
        start_N = self._start_U[run_N] + (number_N - self._before_U[run_N]) * self._seq_len
        return start_N, self.label_D[domain_N]


@dataclass(frozen=True, eq=False)
class HeldOutDataset:
    """Held-out sequences in evaluation order: the domains alternate.

    A corpus is ordered by domain, so its first N stored sequences are often of one domain. Here the
    first N hold equally many of each domain (until one has no more), and N = number of domains
    reaches all of them. The order depends on the text alone, not on the seed or the ranks.

    Each domain is cut into sequences separately, so a metric of a domain contains no other text.
    The tail of a domain (less than seq_len tokens) is not evaluated. With one domain, the order is
    the stored one. Methods and their arguments are those of `TokenDataset`.
    """

    packed: PackedDataset
    order: EvaluationOrder = field(init=False)

    def __post_init__(self) -> None:
        packed = self.packed
        order = EvaluationOrder(packed.runs, packed.num_tokens, packed.seq_len)
        if not order.num_sequences:
            raise ConfigError(
                "data.seq_len",
                self.seq_len,
                f"must be less than the tokens of some domain of the {packed.split} split",
                "use a smaller one, or more text",
            )
        object.__setattr__(self, "order", order)

    @property
    def labels_present(self) -> frozenset[int]:
        """Labels of the domains that have a sequence."""
        return frozenset(self.order.label_D.tolist())

    @property
    def num_sequences(self) -> int:
        """Sequences of all domains."""
        return self.order.num_sequences

    @property
    def seq_len(self) -> int:
        """Targets per sequence."""
        return self.packed.seq_len

    def samples(self, first: int, count: int) -> np.ndarray:
        """Return consecutive sequences in evaluation order: int64 [count, seq_len + 1]."""
        return self.packed.read_sequences(self.order.sequences_at(self._indices(first, count))[0])

    def sample_labels(self, first: int, count: int) -> np.ndarray:
        """Return the label of each sequence of `samples`: int64 [count]."""
        return self.order.sequences_at(self._indices(first, count))[1]

    def batch(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Return samples of one step in shuffled order: int64 [count, seq_len + 1]."""
        index_B = self._shuffled_indices(step, first, count, global_batch)
        return self.packed.read_sequences(self.order.sequences_at(index_B)[0])

    def labels(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Return the label of each sample of `batch`: int64 [count]."""
        index_B = self._shuffled_indices(step, first, count, global_batch)
        return self.order.sequences_at(index_B)[1]

    def masks(self, step: int, first: int, count: int, global_batch: int) -> TokenMasks:
        """Return positions and masks of the samples of `batch`."""
        index_B = self._shuffled_indices(step, first, count, global_batch)
        return self.packed.read_masks(self.order.sequences_at(index_B)[0])

    def sample_masks(self, first: int, count: int) -> TokenMasks:
        """Return positions and masks of the sequences of `samples`."""
        return self.packed.read_masks(self.order.sequences_at(self._indices(first, count))[0])

    def _shuffled_indices(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        seed = self.packed.seed
        return sequence_indices(step, first, count, global_batch, self.num_sequences, seed)

    def _indices(self, first: int, count: int) -> np.ndarray:
        assert 0 <= first <= first + count <= self.num_sequences, (
            f"samples {first}+{count} of {self.num_sequences}"
        )
        return np.arange(first, first + count, dtype=np.int64)
