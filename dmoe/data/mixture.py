"""Mixture of domains: training samples are drawn by domain, with a temperature.

    p_i = n_i^(1/t) / sum_j n_j^(1/t)     t = 1: proportional to size;  t -> infinity: uniform

Or the p_i are given by name (domain_weights.py). The temperature is the one of multilingual models
(Devlin 2018; Arivazhagan et al. 2019). Each domain has its own epochs: all of its sequences are
read in a shuffled order before any is repeated. With a flat mixture, small domains are repeated
many times while a large one is read in part.

Sample i of step s has the run-wide index n = s * global_batch + i, and its domain is a function of
(seed, n) alone, as in order.py: a resumed run, or a run on another number of ranks, draws the same.

"The next sequence of domain i" needs the number of its earlier draws. With independent draws it
would have to be counted from the start of the run. Therefore samples are assigned in blocks of
4096: each block holds domain i exactly c_i times, c_i being 4096 p_i rounded to a whole number (by
largest remainders, at least 1), in a shuffled order. Before block b, domain i was then drawn
b * c_i times, and only the block itself has to be counted. Within a block this is sampling without
replacement, so batches vary less than with independent draws.

Cost: one permutation of 4096 numbers per block that a call touches, about a millisecond.

Letters: N samples, U runs of one domain, D domains that have sequences, M samples of one domain,
B samples of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.order import counter_hash, global_sample_indices, permute
from dmoe.data.packing import DomainRuns, PackedDataset
from dmoe.data.sequences.token_masks import TokenMasks

BLOCK_SIZE = 4096
_BLOCK_SALT = 0x6D69786564
"""Mixed into the seed, so that blocks and the sequences of a domain are shuffled differently."""


@dataclass(frozen=True, eq=False)
class DomainSequences:
    """Sequences that start in one domain: ranges of consecutive indices, one per run."""

    label: int
    start_U: np.ndarray
    """First sequence index of each range."""
    offset_U: np.ndarray
    """Sequences in earlier ranges."""
    size: int

    def sequence_index(self, position_N: np.ndarray) -> np.ndarray:
        """Map positions within the domain to sequence indices of the dataset: int64 [N]."""
        run_N = np.searchsorted(self.offset_U, position_N, side="right") - 1
        return np.asarray(self.start_U[run_N] + position_N - self.offset_U[run_N])


def sequences_of_domains(
    runs: DomainRuns, num_sequences: int, seq_len: int
) -> list[DomainSequences]:
    """Return the domains in which at least one sequence starts, sorted by label."""
    # -(-a // b) is a / b, rounded up.
    edges = [(min(num_sequences, -(-start // seq_len)), label) for start, label in runs]
    ranges: dict[int, list[tuple[int, int]]] = {}
    for (first, label), (end, _) in pairwise((*edges, (num_sequences, -1))):
        # No sequence may start in a run that is shorter than a sequence.
        if end > first:
            ranges.setdefault(label, []).append((first, end - first))
    domains = []
    for label, parts in sorted(ranges.items()):
        start_U, count_U = np.array(parts, dtype=np.int64).T
        offset_U = np.cumsum(count_U) - count_U
        domains.append(DomainSequences(label, start_U, offset_U, int(count_U.sum())))
    return domains


def mix_domains(packed: PackedDataset, temperature: float) -> MixtureDataset:
    """Return a dataset that draws the domains of `packed` with p ~ num_sequences^(1/temperature).

    Raises ConfigError on data.temperature: not positive, or more domains than a block has places.
    """
    domains = domains_to_draw(packed, "data.temperature", temperature)
    weights = task_weights([domain.size for domain in domains], temperature)
    return MixtureDataset(packed, tuple(domains), block_quotas(weights))


def domains_to_draw(packed: PackedDataset, field: str, value: object) -> list[DomainSequences]:
    """Return the domains with a sequence. Raises ConfigError on `field` if a block lacks places."""
    domains = sequences_of_domains(packed.runs, packed.num_sequences, packed.seq_len)
    if len(domains) > BLOCK_SIZE:
        allowed = f"works for up to {BLOCK_SIZE} domains, not {len(domains)}"
        raise ConfigError(field, value, allowed, "leave it out")
    return domains


@dataclass(frozen=True, eq=False)
class MixtureDataset:
    """Sequences of a packed dataset, drawn by domain.

    `samples` and `sample_labels` are those of the packed dataset. Methods and their arguments are
    those of `TokenDataset`.
    """

    packed: PackedDataset
    domains: tuple[DomainSequences, ...]
    quota_D: np.ndarray
    """Samples of each domain per block of BLOCK_SIZE."""

    @property
    def num_sequences(self) -> int:
        """Number of different sequences."""
        return self.packed.num_sequences

    @property
    def seq_len(self) -> int:
        """Targets per sequence."""
        return self.packed.seq_len

    @property
    def shares(self) -> dict[int, float]:
        """Fraction of all samples by label."""
        return {
            domain.label: int(quota) / BLOCK_SIZE
            for domain, quota in zip(self.domains, self.quota_D, strict=True)
        }

    def batch(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Return samples of one step, drawn by domain: int64 [count, seq_len + 1]."""
        index_N = self.sequence_indices(step, first, count, global_batch)
        return self.packed.read_sequences(index_N * self.seq_len)

    def labels(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Return the label of each sample of `batch`: int64 [count]."""
        sample_N = global_sample_indices(step, first, count, global_batch)
        domain_N, _ = draw_domains(sample_N, self.quota_D, self.packed.seed)
        label_D = np.array([domain.label for domain in self.domains], dtype=np.int64)
        return np.asarray(label_D[domain_N])

    def sequence_indices(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Return the sequence that each sample of one step reads: int64 [count]."""
        sample_N = global_sample_indices(step, first, count, global_batch)
        domain_N, draw_N = draw_domains(sample_N, self.quota_D, self.packed.seed)
        index_N = np.empty_like(draw_N)
        for number, domain in enumerate(self.domains):
            in_domain_N = domain_N == number
            epoch_M, position_M = np.divmod(draw_N[in_domain_N], domain.size)
            # One seed per domain: domains of equal size (translations) must not share an order.
            seed = int(counter_hash(self.packed.seed, domain.label)[0])
            shuffled_M = permute(position_M, domain.size, seed, epoch_M)
            index_N[in_domain_N] = domain.sequence_index(shuffled_M)
        return index_N

    def masks(self, step: int, first: int, count: int, global_batch: int) -> TokenMasks:
        """Return positions and masks of the samples of `batch`."""
        index_N = self.sequence_indices(step, first, count, global_batch)
        return self.packed.read_masks(index_N * self.seq_len)

    def sample_masks(self, first: int, count: int) -> TokenMasks:
        """Return positions and masks of the sequences of `samples`."""
        return self.packed.sample_masks(first, count)

    def samples(self, first: int, count: int) -> np.ndarray:
        """Return consecutive sequences in stored order: int64 [count, seq_len + 1]."""
        return self.packed.samples(first, count)

    def sample_labels(self, first: int, count: int) -> np.ndarray:
        """Return the label of each sequence of `samples`: int64 [count]."""
        return self.packed.sample_labels(first, count)


def task_weights(sizes: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Return the sampling probability of each task; `temperature=math.inf` makes them equal.

    Raises ConfigError for a size that is not positive and finite, or a temperature of 0 or less.
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
            "use 1 for proportional sampling, 5 for a flatter mixture",
        )
    # Divided by the largest, so that no power overflows.
    largest = max(sizes)
    raised = [(size / largest) ** (1 / temperature) for size in sizes]
    return [value / sum(raised) for value in raised]


def block_quotas(weights: Sequence[float]) -> np.ndarray:
    """Return the samples of each task per block: int64 [D], each at least 1, sum BLOCK_SIZE."""
    assert 1 <= len(weights) <= BLOCK_SIZE, (
        f"{len(weights)} tasks do not fit into a block of {BLOCK_SIZE}"
    )
    exact_D = np.asarray(weights, dtype=np.float64) / math.fsum(weights) * BLOCK_SIZE
    quota_D = np.maximum(1, np.floor(exact_D)).astype(np.int64)
    while (missing := BLOCK_SIZE - int(quota_D.sum())) != 0:
        remainder_D = exact_D - quota_D
        # argmax and argmin take the first of equal values. Too many samples are assigned if rare
        # tasks were raised to 1; they are taken back where more than 1 is left.
        if missing > 0:
            quota_D[remainder_D.argmax()] += 1
        else:
            quota_D[np.where(quota_D > 1, remainder_D, np.inf).argmin()] -= 1
    return quota_D


def draw_domains(
    sample_N: np.ndarray, quota_D: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the domain of each sample and the number of earlier samples of that domain.

    Args:
        sample_N: int64 [N], run-wide sample indices.
        quota_D: samples of each domain per block, see `block_quotas`.
        seed: of the blocks' shuffles.

    Returns:
        (domain_N, draw_N), int64 [N] each.
    """
    domain_N, draw_N = np.empty_like(sample_N), np.empty_like(sample_N)
    for block in np.unique(sample_N // BLOCK_SIZE).tolist():
        domain_B, earlier_B = _shuffled_block(block, quota_D, seed)
        in_block_N = sample_N // BLOCK_SIZE == block
        position_N = sample_N[in_block_N] % BLOCK_SIZE
        domain_N[in_block_N] = domain_B[position_N]
        draw_N[in_block_N] = block * quota_D[domain_B[position_N]] + earlier_B[position_N]
    return domain_N, draw_N


def _shuffled_block(block: int, quota_D: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the domain at each position of a block and its earlier occurrences in the block.

    Both are int64 [BLOCK_SIZE].
    """
    sorted_B = np.repeat(np.arange(len(quota_D)), quota_D)
    domain_B = sorted_B[permute(np.arange(BLOCK_SIZE), BLOCK_SIZE, seed ^ _BLOCK_SALT, block)]
    earlier_B = np.empty(BLOCK_SIZE, dtype=np.int64)
    # A stable sort keeps the positions of one domain in order: the k-th one is its k-th draw.
    earlier_B[np.argsort(domain_B, kind="stable")] = np.concatenate(
        [np.arange(quota) for quota in quota_D]
    )
    return domain_B, earlier_B


def tasks_of_step(
    step: int, first: int, count: int, global_batch: int, weights: Sequence[float], seed: int
) -> list[int]:
    """Return the tasks of some samples of one step.

    Args:
        step: optimizer step, from 0.
        first: index of the first sample in the global batch.
        count: number of consecutive samples.
        global_batch: samples per step, over all ranks.
        weights: sampling probability of each task, see `task_weights`.
        seed: of the draw.
    """
    sample_N = global_sample_indices(step, first, count, global_batch)
    task_N, _ = draw_domains(sample_N, block_quotas(weights), seed)
    tasks: list[int] = task_N.tolist()
    return tasks
