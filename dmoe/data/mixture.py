"""A training stream whose domains are drawn by weight (mixing.py) instead of each sequence once an epoch.

Each domain has epochs of its own: its sequences come in a shuffled order, all of them before any comes again. The small ones of a flat
mixture are read many times while a large one is read in part.

Letters: N samples, U runs of one domain, D domains that have sequences, M sequences of one domain.

Which domain a sample is taken from, and which sample of that domain it is, where domains differ in size.

    p_i = n_i^(1/t) / sum_j n_j^(1/t)        t = 1: in proportion to size;  t -> infinity: all alike

The temperature is that of multilingual models (Devlin 2018; Arivazhagan et al. 2019). Sample i of step s is number
n = s * global_batch + i, and what it is, is a function of (seed, n) alone, as the data order is: a resumed run and a run on another
number of ranks draw the same.

"The next sample of domain i" needs the number of its earlier draws, which independent draws would have to count from the start of
the run. So numbers are dealt in blocks of 4096, as from a shuffled deck: each block holds domain i the same c_i times, c_i the whole
number nearest to 4096 p_i (by largest remainders, at least 1), in an order of its own. Before block b there were then b * c_i draws of
it, and only the block is counted through. Within a block this is sampling without replacement: batches vary less than they would with
independent draws.

Cost: one permutation of 4096 numbers for each block a call touches, about a millisecond. Letters: N samples, D domains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.order import counter_hash, permute, sample_numbers
from dmoe.data.packing import PackedStream, Runs


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
            "data.temperature",
            temperature,
            f"works for up to {BLOCK} domains, not {len(domains)}",
            "leave it out",
        )
    return MixedStream(
        text,
        tuple(domains),
        block_counts(task_weights([domain.size for domain in domains], temperature)),
    )


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
        return {
            domain.label: int(count) / BLOCK
            for domain, count in zip(self.domains, self.count_D, strict=True)
        }

    def batch(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Samples first .. first + count - 1 of a step: int64 [count, seq_len + 1]."""
        return self.text.windows(self.indices(step, first, count, global_batch) * self.seq_len)

    def labels(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """The domain each of them starts in: int64 [count]."""
        domain_N, _ = drawn(
            sample_numbers(step, first, count, global_batch), self.count_D, self.text.seed
        )
        label_D = np.array([domain.label for domain in self.domains], dtype=np.int64)
        return np.asarray(label_D[domain_N])

    def indices(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Which stored sequence each of them is: int64 [count]."""
        domain_N, draw_N = drawn(
            sample_numbers(step, first, count, global_batch), self.count_D, self.text.seed
        )
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


BLOCK = 4096
_DECK = 0x6D69786564
"""Mixed into the seed, so that a block is not shuffled as the sequences of a domain are."""


def task_weights(sizes: Sequence[float], temperature: float = 1.0) -> list[float]:
    """The probability of each task; they sum to 1. `temperature=math.inf` gives each the same.

    Raises: ConfigError for a size that is not positive, or a temperature below or at 0.
    """
    if not sizes or not all(0 < size < math.inf for size in sizes):
        raise ConfigError(
            "sizes", list(sizes), "must be positive numbers, at least one", "leave empty tasks out"
        )
    if not temperature > 0:
        raise ConfigError(
            "data.temperature",
            temperature,
            "must be above 0",
            "use 1 for proportional, 5 for a flatter choice",
        )
    largest = max(sizes)
    raised = [(size / largest) ** (1 / temperature) for size in sizes]
    return [value / sum(raised) for value in raised]


def block_counts(weights: Sequence[float]) -> np.ndarray:
    """How often each task comes in a block: int64 [D], at least 1 each, together BLOCK."""
    assert 1 <= len(weights) <= BLOCK, f"{len(weights)} tasks do not fit into a block of {BLOCK}"
    exact_D = np.asarray(weights, dtype=np.float64) / math.fsum(weights) * BLOCK
    count_D = np.maximum(1, np.floor(exact_D)).astype(np.int64)
    while (missing := BLOCK - int(count_D.sum())) != 0:
        behind_D = exact_D - count_D
        # argmax and argmin take the first of equals. What is taken back, because rare tasks were raised to 1, leaves 1 everywhere.
        if missing > 0:
            count_D[behind_D.argmax()] += 1
        else:
            count_D[np.where(count_D > 1, behind_D, np.inf).argmin()] -= 1
    return count_D


def drawn(number_N: np.ndarray, count_D: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The task of each sample number, and how many samples of that task came before it in the run: int64 [N] each."""
    task_N, draw_N = np.empty_like(number_N), np.empty_like(number_N)
    for block in np.unique(number_N // BLOCK).tolist():
        task_B, earlier_B = _dealt(block, count_D, seed)
        here_N = number_N // BLOCK == block
        place_N = number_N[here_N] % BLOCK
        task_N[here_N] = task_B[place_N]
        draw_N[here_N] = block * count_D[task_B[place_N]] + earlier_B[place_N]
    return task_N, draw_N


def _dealt(block: int, count_D: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The task at each place of a block, and how often it stood at an earlier place: int64 [BLOCK] each."""
    deck_B = np.repeat(np.arange(len(count_D)), count_D)
    task_B = deck_B[permute(np.arange(BLOCK), BLOCK, seed ^ _DECK, block)]
    earlier_B = np.empty(BLOCK, dtype=np.int64)
    # A stable sort keeps the places of one task in order: its k-th place is its k-th draw in the block.
    earlier_B[np.argsort(task_B, kind="stable")] = np.concatenate(
        [np.arange(count) for count in count_D]
    )
    return task_B, earlier_B


def tasks_of_step(
    step: int, first: int, count: int, global_batch: int, weights: Sequence[float], seed: int
) -> list[int]:
    """The tasks of samples `first .. first+count-1` of a step."""
    task_N, _ = drawn(sample_numbers(step, first, count, global_batch), block_counts(weights), seed)
    found: list[int] = task_N.tolist()
    return found
