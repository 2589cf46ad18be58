"""The datasets of a run of a language model: both splits, the tokenizer and the domains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dmoe.data.sequences.token_masks import TokenMasks
from dmoe.data.tokenizers import Tokenizer

if TYPE_CHECKING:
    from dmoe.data.instruct import ChatTemplate


class TokenDataset(Protocol):
    """Sequences of seq_len + 1 tokens: seq_len inputs and, shifted by one, seq_len targets."""

    @property
    def num_sequences(self) -> int | None:
        """Number of different sequences; None if the dataset is endless."""

    @property
    def seq_len(self) -> int:
        """Targets per sequence."""

    def batch(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Return consecutive samples of one step, in shuffled order, epoch after epoch.

        A function of its arguments and the seed alone: ranks read disjoint ranges of the same
        global batch.

        Args:
            step: optimizer step, from 0.
            first: index of the first sample in the global batch.
            count: number of samples.
            global_batch: samples per step, over all ranks.

        Returns:
            int64 [count, seq_len + 1].
        """

    def labels(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Return the label of each sample of `batch`: int64 [count].

        A label is an index into `DatasetSplits.domains`: the domain of the document in which the
        sequence starts. Arguments as in `batch`.
        """

    def samples(self, first: int, count: int) -> np.ndarray:
        """Return sequences first .. first + count - 1 for evaluation: int64 [count, seq_len + 1].

        In stored order; held-out sequences alternate between the domains. Never wraps: the caller
        keeps first + count within `num_sequences` (an assertion).
        """

    def sample_labels(self, first: int, count: int) -> np.ndarray:
        """Return the label of each sequence of `samples`: int64 [count]."""

    def masks(self, step: int, first: int, count: int, global_batch: int) -> TokenMasks:
        """Return positions and masks of the samples of `batch`. Arguments as in `batch`."""

    def sample_masks(self, first: int, count: int) -> TokenMasks:
        """Return positions and masks of the sequences of `samples`."""


@dataclass(frozen=True)
class DatasetSplits:
    """The training and the held-out dataset of a run, and their tokenizer."""

    train: TokenDataset
    held_out: TokenDataset
    tokenizer: Tokenizer
    fingerprint: str
    """SHA-256 (hex) of the token streams, the tokenizer, seq_len and the hold-out."""
    summary: str
    domains: tuple[str, ...]
    """Domain names by label: those of data.source, sorted, then those that only data.eval_source
    has, sorted."""
    eval_only: tuple[str, ...] = ()
    """Domains that training does not have: the last ones of `domains`."""
    document_mask: bool = False
    """Whether the documents of a sequence do not see each other."""
    chat: ChatTemplate | None = None
    """How a conversation is written (data.format=instruct)."""

    def sequences_per_domain(self) -> dict[str, tuple[int, int]]:
        """Return (training, held-out) sequences by domain; ValueError for endless datasets."""
        if self.train.num_sequences is None or self.held_out.num_sequences is None:
            raise ValueError("an endless dataset has no number of sequences")
        train_D, held_out_D = (
            np.bincount(
                split.sample_labels(0, split.num_sequences or 0), minlength=len(self.domains)
            )
            for split in (self.train, self.held_out)
        )
        return {
            name: (int(train_D[label]), int(held_out_D[label]))
            for label, name in enumerate(self.domains)
        }

    def describe(self) -> str:
        """Return one line: source, files, bytes, tokens, sequences, fingerprint (12 digits)."""
        return f"{self.summary}; fingerprint {self.fingerprint[:12]}"
