"""A training stream whose domains are drawn by weight (mixing.py) instead of each sequence once an epoch.

Each domain has epochs of its own: its sequences come in a shuffled order, all of them before any comes again. The small ones of a flat
mixture are read many times while a large one is read in part.

Letters: N samples, U runs of one domain, D domains that have sequences, M sequences of one domain.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.counter import counter_hash
from dmoe.data.labels import Runs
from dmoe.data.mixing import BLOCK, block_counts, drawn, task_weights
from dmoe.data.order import permute, sample_numbers
from dmoe.data.packing import PackedStream

__all__ = ["Domain", "MixedStream", "mixed", "sequences_of_domains"]


@dataclass(frozen=True, eq=False)
class Domain:
    """The sequences that start in one domain: ranges of consecutive indices, one for each run."""

    label: int
    first_U: np.ndarray
    before_U: np.ndarray
    """Sequences in earlier ranges."""
    size: int

    def index(self, place_N: np.ndarray) -> np.ndarray:
        """The index in the stream of the domain's sequences at the given places: int64 [N]."""
        run_N = np.searchsorted(self.before_U, place_N, side="right") - 1
        return np.asarray(self.first_U[run_N] + place_N - self.before_U[run_N])


def sequences_of_domains(runs: Runs, sequences: int, seq_len: int) -> list[Domain]:
    """The domains in which some of `sequences` consecutive sequences starts, by label."""
    edges = [(min(sequences, -(-begin // seq_len)), label) for begin, label in runs]
    ranges: dict[int, list[tuple[int, int]]] = {}
    for (first, label), (end, _) in pairwise((*edges, (sequences, -1))):
        if end > first:  # a run shorter than a sequence may have none
            ranges.setdefault(label, []).append((first, end - first))
    found = []
    for label, parts in sorted(ranges.items()):
        first_U, count_U = np.array(parts, dtype=np.int64).T
        found.append(Domain(label, first_U, np.cumsum(count_U) - count_U, int(count_U.sum())))
    return found


def mixed(text: PackedStream, temperature: float) -> MixedStream:
    """The text with its domains drawn by p ~ n^(1/temperature), n their sequences. ConfigError on data.temperature."""
    domains = sequences_of_domains(text.runs, text.sequences, text.seq_len)
    if len(domains) > BLOCK:
        raise ConfigError(
            "data.temperature", temperature, f"works for up to {BLOCK} domains, not {len(domains)}", "leave it out"
        )
    return MixedStream(text, tuple(domains), block_counts(task_weights([domain.size for domain in domains], temperature)))


@dataclass(frozen=True, eq=False)
class MixedStream:
    """Sequences of a text, drawn by domain; `rows` and `row_labels` are the text's."""

    text: PackedStream
    domains: tuple[Domain, ...]
    count_D: np.ndarray
    """Samples of each domain in a block of mixing.BLOCK."""

    @property
    def sequences(self) -> int:
        """How many different ones there are."""
        return self.text.sequences

    @property
    def seq_len(self) -> int:
        """Targets of one sequence."""
        return self.text.seq_len

    @property
    def shares(self) -> dict[int, float]:
        """The share of all samples that each label has."""
        return {domain.label: int(count) / BLOCK for domain, count in zip(self.domains, self.count_D, strict=True)}

    def batch(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Samples first .. first + count - 1 of a step: int64 [count, seq_len + 1]."""
        return self.text.windows(self.indices(step, first, count, global_batch) * self.seq_len)

    def labels(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """The domain each of them starts in: int64 [count]."""
        domain_N, _ = drawn(sample_numbers(step, first, count, global_batch), self.count_D, self.text.seed)
        label_D = np.array([domain.label for domain in self.domains], dtype=np.int64)
        return np.asarray(label_D[domain_N])

    def indices(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Which stored sequence each of them is: int64 [count]."""
        domain_N, draw_N = drawn(sample_numbers(step, first, count, global_batch), self.count_D, self.text.seed)
        index_N = np.empty_like(draw_N)
        for number, domain in enumerate(self.domains):
            here_N = domain_N == number
            epoch_M, place_M = np.divmod(draw_N[here_N], domain.size)
            # A seed of its own: domains of equal size (translations) must not be shuffled alike.
            seed = int(counter_hash(self.text.seed, domain.label)[0])
            index_N[here_N] = domain.index(permute(place_M, domain.size, seed, epoch_M))
        return index_N

    def rows(self, first: int, count: int) -> np.ndarray:
        """Sequences as they are stored: int64 [count, seq_len + 1]."""
        return self.text.rows(first, count)

    def row_labels(self, first: int, count: int) -> np.ndarray:
        """The domain each of `rows` starts in: int64 [count]."""
        return self.text.row_labels(first, count)
