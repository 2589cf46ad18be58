"""Packing: documents become one token stream, and the stream is cut into sequences of seq_len.

The token stream is  sep doc_0 sep doc_1 sep ... doc_n sep.  Sequence i holds the tokens i * S ..
(i + 1) * S inclusive (S = seq_len): S inputs and, shifted by one, S targets. Consecutive sequences
share one token, so every token up to the end of the last sequence is a target exactly once, except
the separator that opens the stream. The tail that does not fill a sequence is not used.

A sequence may span documents. With `document_mask` attention and positions end at the boundary
(`token_masks.py`); without, the model sees the separator alone (as in GPT-3).

The label of a sequence is the domain of the document in which it starts, as a number; a sequence
that continues into another domain keeps it. A separator belongs to the document after it. Only the
positions where the domain changes are stored (`DomainRuns`): a corpus is ordered by domain, so they
are few, and a label costs one binary search.

Held-out sequences are evaluated in another order (`held_out.py`).

Letters: S seq_len, B sequences, N positions or sequences, U runs of one domain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.order import sequence_indices
from dmoe.data.sequences.token_masks import (
    ANSWER,
    NO_MASKS,
    PADDING,
    TokenMasks,
    positions_in_documents,
)
from dmoe.data.tokenizers import Tokenizer

DomainRuns = tuple[tuple[int, int], ...]
"""(position in the token stream, label) where a run of one domain starts; ascending from 0."""

ONE_DOMAIN: DomainRuns = ((0, 0),)


def domain_runs(lengths: Sequence[int], domains: Sequence[str], names: Sequence[str]) -> DomainRuns:
    """Return the domain runs of a token stream.

    Args:
        lengths: tokens of each document, its closing separator included.
        domains: the domain of each document.
        names: all domains; a label is an index into them.
    """
    assert len(lengths) == len(domains), f"{len(lengths)} documents have {len(domains)} domains"
    runs: list[tuple[int, int]] = []
    position = 0
    for length, domain in zip(lengths, domains, strict=True):
        label = names.index(domain)
        if not runs or runs[-1][1] != label:
            runs.append((position, label))
        position += length
    return tuple(runs) or ONE_DOMAIN


def domain_labels(position_N: np.ndarray, runs: DomainRuns | np.ndarray) -> np.ndarray:
    """Return the label at each position of the token stream: int64 [N].

    `runs` may be an array too, int64 [U, 2], which is faster for many calls.
    """
    start_U, label_U = np.asarray(runs, dtype=np.int64).T
    return np.asarray(label_U[np.searchsorted(start_U, position_N, side="right") - 1])


def record_lengths(chunks: Iterable[np.ndarray], lengths: list[int]) -> Iterator[np.ndarray]:
    """Yield the chunks unchanged and append the number of tokens of each to `lengths`."""
    for chunk in chunks:
        lengths.append(len(chunk))
        yield chunk


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the stored token dtype: little-endian uint16 if the vocabulary fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def token_chunks(contents: Iterable[bytes], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the token stream in chunks: the opening separator, then each document and a separator.

    Chunks are one-dimensional arrays of `token_dtype(vocab_size)`.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    yield np.array([tokenizer.separator], dtype=dtype)
    for content in contents:
        yield np.append(tokenizer.encode(content), tokenizer.separator).astype(dtype)


def token_hash(chunks: Iterable[np.ndarray]) -> str:
    """Return the SHA-256 (hex) of a token stream; the division into chunks does not change it."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(np.ascontiguousarray(chunk).data)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class PackedDataset:
    """Sequences of a token stream that is stored in one or more arrays (in memory or shards).

    A sequence may start in one array and end in the next, so the sequences do not depend on the
    shard size. Every read checks the tokens against `vocab_size`: a damaged shard must not become
    an index error inside a model. Methods and their arguments are those of `TokenDataset`.
    """

    arrays: Sequence[np.ndarray]
    seq_len: int
    seed: int
    vocab_size: int
    split: str
    runs: DomainRuns = ONE_DOMAIN
    """Where the domain changes."""
    document_start_N: np.ndarray | None = None
    """int64, ascending from 0: position in the token stream of the separator before each document,
    which belongs to it. May be a memory map. None: not known."""
    document_mask: bool = False
    """Whether documents are not to see each other; needs their starts."""
    role_N: np.ndarray | None = None
    """uint8: PADDING, GIVEN or ANSWER of each token of the stream. None: text, all predicted."""
    _run_UD: np.ndarray = field(init=False, repr=False)
    """`runs` as an array."""

    def __post_init__(self) -> None:
        assert self.seq_len >= 1
        object.__setattr__(self, "_run_UD", np.array(self.runs, dtype=np.int64).reshape(-1, 2))
        assert self.document_start_N is not None or not self.document_mask, "no document starts"
        if self.num_sequences == 0:
            fix = f"set data.seq_len={self.num_tokens - 1} or less, or use more text"
            if self.num_tokens < 2:
                fix = "use more text"
            raise ConfigError(
                "data.seq_len",
                self.seq_len,
                f"must be less than the {self.num_tokens} tokens of the {self.split} split",
                fix,
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream, separators included."""
        return sum(len(array) for array in self.arrays)

    @property
    def num_sequences(self) -> int:
        """Whole sequences in the stream."""
        return max(0, self.num_tokens - 1) // self.seq_len

    def batch(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Return samples of one step in shuffled order (order.py): int64 [count, seq_len + 1]."""
        index_B = sequence_indices(step, first, count, global_batch, self.num_sequences, self.seed)
        return self.read_sequences(index_B * self.seq_len)

    def samples(self, first: int, count: int) -> np.ndarray:
        """Return consecutive sequences in stored order: int64 [count, seq_len + 1]."""
        return self.read_sequences(self._indices(first, count) * self.seq_len)

    def labels(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Return the label of each sample of `batch`: int64 [count]."""
        index_B = sequence_indices(step, first, count, global_batch, self.num_sequences, self.seed)
        return domain_labels(index_B * self.seq_len, self._run_UD)

    def sample_labels(self, first: int, count: int) -> np.ndarray:
        """Return the label of each sequence of `samples`: int64 [count]."""
        return domain_labels(self._indices(first, count) * self.seq_len, self._run_UD)

    def masks(self, step: int, first: int, count: int, global_batch: int) -> TokenMasks:
        """Return positions and masks of the samples of `batch`."""
        index_B = sequence_indices(step, first, count, global_batch, self.num_sequences, self.seed)
        return self.read_masks(index_B * self.seq_len)

    def sample_masks(self, first: int, count: int) -> TokenMasks:
        """Return positions and masks of the sequences of `samples`."""
        return self.read_masks(self._indices(first, count) * self.seq_len)

    def read_masks(self, start_B: np.ndarray) -> TokenMasks:
        """Return positions and masks of the sequences of `read_sequences`."""
        if not self.document_mask and self.role_N is None:
            return NO_MASKS
        position_BS = None
        if self.document_mask and self.document_start_N is not None:
            position_BS = positions_in_documents(start_B, self.seq_len, self.document_start_N)
        if self.role_N is None:
            return TokenMasks(position_BS)
        role_BS = self.role_N[start_B[:, None] + np.arange(self.seq_len + 1)]
        return TokenMasks(position_BS, role_BS[:, 1:] == ANSWER, role_BS[:, :-1] != PADDING)

    def read_sequences(self, start_B: np.ndarray) -> np.ndarray:
        """Return the seq_len + 1 tokens from each stream position on: int64 [B, seq_len + 1]."""
        token_BS = np.empty((len(start_B), self.seq_len + 1), dtype=np.int64)
        offsets = np.cumsum([0] + [len(array) for array in self.arrays])
        for token_S, start in zip(token_BS, start_B.tolist(), strict=True):
            self._copy(token_S, start, offsets)
        if token_BS.size and not 0 <= token_BS.min() <= token_BS.max() < self.vocab_size:
            wrong = token_BS[(token_BS < 0) | (token_BS >= self.vocab_size)][0]
            raise ConfigError(
                "data.source",
                f"the {self.split} split",
                f"must hold tokens below {self.vocab_size}, not {wrong}",
                "name the tokenizer that made them; or the shards are damaged: prepare them again",
            )
        return token_BS

    def _indices(self, first: int, count: int) -> np.ndarray:
        assert 0 <= first <= first + count <= self.num_sequences, (
            f"samples {first}+{count} of {self.num_sequences}"
        )
        return np.arange(first, first + count, dtype=np.int64)

    def _copy(self, token_S: np.ndarray, start: int, offsets: np.ndarray) -> None:
        """Fill `token_S` from position `start` on, across as many arrays as needed."""
        number = int(np.searchsorted(offsets, start, side="right")) - 1
        done = 0
        while done < len(token_S):
            offset = start + done - int(offsets[number])
            part = self.arrays[number][offset : offset + len(token_S) - done]
            token_S[done : done + len(part)] = part
            done += len(part)
            number += 1
